"""RMSNorm: LayerNorm that does not centre, and has no bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from normkit import _checks
from normkit._arrays import backend_of
from normkit._backend import Array, Backend, DType
from normkit._definition import Definition, Params, State
from normkit._engine import rescale, with_rank
from normkit._statistics import Axes, cast


@dataclass(frozen=True)
class RMSNorm(Definition):
    """Root-mean-square normalization of each sample: ``x / sqrt(mean(x * x) + eps) * scale``.

    The mean of the squares is taken over ``axes``, and ``scale`` has one value for each position
    along them. The defaults are PyTorch's; frameworks differ in ``eps``, so there is a constructor
    for each: :meth:`torch`, :meth:`keras`, :meth:`flax`.

    Args:
        shape: the lengths of x along ``axes``, an integer if there is one.
        axes: the axes to normalize over, in ascending order; the last ones if None.
        eps: added to the mean of the squares, inside the square root. None: the machine epsilon
            of the dtype that is computed in, 1.2e-7 for float32 and half types.
        scale: whether the layer has one.
        zero_centered: multiply by ``1 + scale``, which starts from zeros (as Gemma does).
        scale_after_cast: multiply by the scale after rounding to the dtype of x, in that dtype (as
            Llama does); if False, before.

    Raises:
        ValueError, TypeError: an argument is not what it must be.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
    arXiv:1910.07467.

    >>> import numpy as np, normkit as nk
    >>> rms = nk.RMSNorm(2)
    >>> params, state = rms.init()
    >>> y, state = rms.apply(params, state, np.array([[1, 7]], dtype="float32"))
    >>> y.round(4).tolist() == np.array([[0.2, 1.4]], "float32").tolist()
    True
    """

    shape: int | tuple[int, ...]
    axes: int | tuple[int, ...] | None = None
    eps: float | None = None
    scale: bool = True
    zero_centered: bool = False
    scale_after_cast: bool = False

    bias: bool = field(default=False, init=False, repr=False)  # it has none

    def __post_init__(self) -> None:
        shape, axes = _checks.shape_and_axes(self.shape, self.axes)
        if self.eps is not None:
            _checks.epsilon(self.eps)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "axes", axes)

    @classmethod
    def torch(cls, shape: int | tuple[int, ...], **changes: Any) -> RMSNorm:
        """With the defaults of ``torch.nn.RMSNorm``, which are this class's own."""
        return cls(shape, **changes)

    @classmethod
    def keras(cls, shape: int | tuple[int, ...], **changes: Any) -> RMSNorm:
        """With the defaults of ``keras.layers.RMSNormalization``."""
        return cls(shape, **{"eps": 1e-6} | changes)

    @classmethod
    def flax(cls, shape: int | tuple[int, ...], **changes: Any) -> RMSNorm:
        """With the defaults of ``flax.nnx.RMSNorm`` and ``flax.linen.RMSNorm``."""
        return cls(shape, **{"eps": 1e-6} | changes)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        assert isinstance(self.shape, tuple)
        return self.shape

    @property
    def first_scale(self) -> float:
        return 0.0 if self.zero_centered else 1.0

    def parameter_axes(self, ndim: int) -> Axes:
        return _checks.axes_in_range(self.axes, ndim)

    def reduced_axes(self, ndim: int) -> Axes:
        return self.parameter_axes(ndim)

    def apply(
        self,
        params: Params,
        state: State,
        x: Array,
        *,
        training: bool = False,
        mask: Array | None = None,
    ) -> tuple[Array, State]:
        """Normalize ``x``. Training and inference are the same, and nothing is remembered.

        Args:
            params, state: as from :meth:`init`; ``state`` is empty.
            x: array with the lengths ``shape`` along ``axes``.
            training: accepted so that every layer is called alike.
            mask: which values count (booleans), or how often (nonnegative numbers): of the shape
                of ``x``, broadcastable to it at equal rank, or without the last of ``axes``. The
                rest takes no part, even if it is NaN, and comes out as zero.

        Returns:
            ``(y, state)``; ``y`` has the shape and dtype of ``x``.

        Raises:
            TypeError: ``x`` is not real floating point.
            ValueError: a shape does not fit.
        """
        backend, params, weights = self._check(params, x, mask)
        y = apply_rms_norm(
            x,
            params.get("scale"),
            axes=self.parameter_axes(len(x.shape)),
            eps=self.eps,
            zero_centered=self.zero_centered,
            scale_after_cast=self.scale_after_cast,
            weights=weights,
            backend=backend,
        )
        return y, state


def apply_rms_norm(
    x: Array,
    scale: Array | None,
    *,
    axes: Axes,
    parameter_axes: Axes | None = None,
    eps: float | None,
    zero_centered: bool = False,
    scale_after_cast: bool = False,
    weights: Array | None = None,
    dtype: DType | None = None,
    backend: Backend,
) -> Array:
    """What :meth:`RMSNorm.apply` does once everything is checked: adapters call this.

    ``scale`` lies along ``parameter_axes``, which are ``axes`` if None; both are nonnegative and
    ascending.
    """
    if scale is not None:
        along = axes if parameter_axes is None else parameter_axes
        scale = with_rank(scale, along, len(x.shape), backend)
        if zero_centered:
            # In the dtype of the statistics: in a half type 1 + scale would lose its digits.
            scale = 1 + cast(scale, backend.statistics_dtype(scale.dtype), backend)
    return rescale(
        x,
        axes,
        scale,
        eps=eps,
        weights=weights,
        scale_after_cast=scale_after_cast,
        dtype=dtype,
        backend=backend,
    )


def rms_norm(
    x: Array,
    scale: Array | None = None,
    *,
    axes: int | Sequence[int] = -1,
    eps: float = 1e-6,
    mask: Array | None = None,
) -> Array:
    """Divide ``x`` by its root mean square over ``axes``.

    Args:
        x: array of any shape.
        scale: of the lengths of ``x`` along ``axes``, in ascending order of axes.
        axes: axis or axes to normalize over.
        eps: added to the mean of the squares, inside the square root.
        mask: see :meth:`RMSNorm.apply`.

    Returns:
        ``x / sqrt(mean(x * x) + eps) * scale``, with the shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not real floating point.
        ValueError: a shape or axis does not fit, or ``eps`` is not above 0.

    Over the last axes the same as ``torch.nn.functional.rms_norm(x, shape, scale, eps)``.

    >>> import numpy as np, normkit as nk
    >>> nk.rms_norm(np.array([[1.0, 7.0]])).round(4).tolist()
    [[0.2, 1.4]]
    """
    backend = backend_of(x)
    _checks.floating(x, backend)
    _checks.epsilon(eps)
    reduced = _checks.axes_in_range(axes, len(x.shape))
    shape = tuple(x.shape[axis] for axis in reduced)
    return apply_rms_norm(
        x,
        _checks.parameter(scale, x, shape, "scale", backend),
        axes=reduced,
        eps=eps,
        weights=_checks.weights_for(x, mask, reduced[-1] if reduced else None, backend),
        backend=backend,
    )
