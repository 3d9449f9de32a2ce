"""LayerNorm: statistics over the axes that the parameters lie along, for each sample alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normkit import _checks
from normkit._arrays import backend_of
from normkit._backend import Array, Backend, DType
from normkit._definition import Definition, Params, State
from normkit._engine import standardize, with_rank
from normkit._statistics import Axes


@dataclass(frozen=True)
class LayerNorm(Definition):
    """Layer normalization of each sample: ``(x - mean) / sqrt(variance + eps) * scale + bias``.

    Mean and population variance are taken over ``axes``, and ``scale`` and ``bias`` have one value
    for each position along them. The defaults are PyTorch's; frameworks differ in ``eps``, so
    there is a constructor for each: :meth:`torch`, :meth:`keras`, :meth:`flax`.

    Args:
        shape: the lengths of x along ``axes``, an integer if there is one.
        axes: the axes to normalize over, in ascending order; the last ones if None.
        eps: added to the variance, inside the square root.
        scale, bias: whether the layer has them.

    Raises:
        ValueError, TypeError: an argument is not what it must be.

    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    >>> import numpy as np, normkit as nk
    >>> ln = nk.LayerNorm(4)
    >>> params, state = ln.init()
    >>> y, state = ln.apply(params, state, np.array([[1, 2, 3, 4]], dtype="float32"))
    >>> y.round(4).tolist() == np.array([[-1.3416, -0.4472, 0.4472, 1.3416]], "float32").tolist()
    True
    """

    shape: int | tuple[int, ...]
    axes: int | tuple[int, ...] | None = None
    eps: float = 1e-5
    scale: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        shape, axes = _checks.shape_and_axes(self.shape, self.axes)
        _checks.epsilon(self.eps)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "axes", axes)

    @classmethod
    def torch(cls, shape: int | tuple[int, ...], **changes: Any) -> LayerNorm:
        """With the defaults of ``torch.nn.LayerNorm``, which are this class's own."""
        return cls(shape, **changes)

    @classmethod
    def keras(cls, shape: int | tuple[int, ...], **changes: Any) -> LayerNorm:
        """With the defaults of ``keras.layers.LayerNormalization``."""
        return cls(shape, **{"eps": 1e-3} | changes)

    @classmethod
    def flax(cls, shape: int | tuple[int, ...], **changes: Any) -> LayerNorm:
        """With the defaults of ``flax.nnx.LayerNorm`` and ``flax.linen.LayerNorm``."""
        return cls(shape, **{"eps": 1e-6} | changes)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        assert isinstance(self.shape, tuple)
        return self.shape

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
                rest takes no part, even if it is NaN, and comes out as ``bias``.

        Returns:
            ``(y, state)``; ``y`` has the shape and dtype of ``x``.

        Raises:
            TypeError: ``x`` is not real floating point.
            ValueError: a shape does not fit.
        """
        backend, params, weights = self._check(params, x, mask)
        axes = self.parameter_axes(len(x.shape))
        y = apply_layer_norm(
            x,
            params.get("scale"),
            params.get("bias"),
            axes=axes,
            eps=self.eps,
            weights=weights,
            backend=backend,
        )
        return y, state


def apply_layer_norm(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    *,
    axes: Axes,
    parameter_axes: Axes | None = None,
    eps: float,
    weights: Array | None = None,
    dtype: DType | None = None,
    backend: Backend,
) -> Array:
    """What :meth:`LayerNorm.apply` does once everything is checked: adapters call this.

    ``scale`` and ``bias`` lie along ``parameter_axes``, which are ``axes`` if None; both are
    nonnegative and ascending.
    """
    along = axes if parameter_axes is None else parameter_axes
    ndim = len(x.shape)

    def wide(p: Array | None) -> Array | None:
        return None if p is None else with_rank(p, along, ndim, backend)

    y, _ = standardize(
        x, axes, wide(scale), wide(bias), eps=eps, weights=weights, dtype=dtype, backend=backend
    )
    return y


def layer_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axes: int | Sequence[int] = -1,
    eps: float = 1e-5,
    mask: Array | None = None,
) -> Array:
    """Normalize ``x`` over ``axes``, each sample with its own mean and population variance.

    Args:
        x: array of any shape.
        scale, bias: of the lengths of ``x`` along ``axes``, in ascending order of axes.
        axes: axis or axes to normalize over.
        eps: added to the variance, inside the square root.
        mask: see :meth:`LayerNorm.apply`.

    Returns:
        ``(x - mean) / sqrt(variance + eps) * scale + bias``, with the shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not real floating point.
        ValueError: a shape or axis does not fit, or ``eps`` is not above 0.

    Over the last axes the same as ``torch.nn.functional.layer_norm(x, shape, scale, bias)``.

    >>> import numpy as np, normkit as nk
    >>> nk.layer_norm(np.array([[1.0, 2.0, 3.0, 4.0]])).round(4).tolist()
    [[-1.3416, -0.4472, 0.4472, 1.3416]]
    """
    backend = backend_of(x)
    _checks.floating(x, backend)
    _checks.epsilon(eps)
    reduced = _checks.axes_in_range(axes, len(x.shape))
    shape = tuple(x.shape[axis] for axis in reduced)
    return apply_layer_norm(
        x,
        _checks.parameter(scale, x, shape, "scale", backend),
        _checks.parameter(bias, x, shape, "bias", backend),
        axes=reduced,
        eps=eps,
        weights=_checks.weights_for(x, mask, reduced[-1] if reduced else None, backend),
        backend=backend,
    )
