"""BatchNorm: statistics over every axis but the channels', remembered for inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from normkit import _checks
from normkit._arrays import backend_of
from normkit._backend import Array, Backend, DType
from normkit._definition import Params, State
from normkit._engine import normalize, standardize, with_rank
from normkit._running import Remembering, updated
from normkit._statistics import Axes


@dataclass(frozen=True)
class BatchNorm(Remembering):
    """Batch normalization of each channel: ``(x - mean) / sqrt(variance + eps) * scale + bias``.

    In training, mean and population variance are those of the batch, taken over every axis but
    ``axis``, and the running statistics follow them::

        running = decay * running + (1 - decay) * batch

    Otherwise the running statistics are used. The defaults are PyTorch's; frameworks differ in
    all of them, so there is a constructor for each: :meth:`torch`, :meth:`keras`, :meth:`flax`.

    Args:
        num_features: number of channels.
        axis: the channel axis.
        eps: added to the variance, inside the square root.
        decay: the share of the running statistics that a step keeps, from 0 to 1 (0.9 is what
            PyTorch calls momentum 0.1 and Keras momentum 0.9). None: the running statistics are
            the average over all batches so far.
        correction: which estimate of the variance is remembered: 1 the unbiased one (divided by
            n - 1), 0 the population variance. The batch itself is always normalized with the
            latter.
        scale, bias: whether the layer has them.
        track_running_stats: whether to remember statistics. If not, those of the batch are used
            in inference too.

    Raises:
        ValueError, TypeError: an argument is not what it must be.

    Source: Ioffe & Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

    >>> import numpy as np, normkit as nk
    >>> bn = nk.BatchNorm(3)
    >>> params, state = bn.init()
    >>> x = np.arange(24, dtype="float32").reshape(2, 3, 4)
    >>> y, state = bn.apply(params, state, x, training=True)
    >>> [round(float(v), 4) for v in (y.mean(), y.var(), state["mean"][0])]
    [0.0, 1.0, 0.75]
    """

    num_features: int
    axis: int = 1
    eps: float = 1e-5
    decay: float | None = 0.9
    correction: int = 1
    scale: bool = True
    bias: bool = True
    track_running_stats: bool = True

    def __post_init__(self) -> None:
        _checks.length(self.num_features, "num_features")
        _checks.axis_number(self.axis)
        _checks.epsilon(self.eps)
        _checks.decay_rate(self.decay)
        _checks.estimator(self.correction)

    @classmethod
    def torch(cls, num_features: int, **changes: Any) -> BatchNorm:
        """With the defaults of ``torch.nn.BatchNorm2d``, which are this class's own."""
        return cls(num_features, **changes)

    @classmethod
    def keras(cls, num_features: int, **changes: Any) -> BatchNorm:
        """With the defaults of ``keras.layers.BatchNormalization``."""
        return cls(
            num_features, **{"axis": -1, "eps": 1e-3, "decay": 0.99, "correction": 0} | changes
        )

    @classmethod
    def flax(cls, num_features: int, **changes: Any) -> BatchNorm:
        """With the defaults of ``flax.nnx.BatchNorm`` and ``flax.linen.BatchNorm``."""
        return cls(num_features, **{"axis": -1, "decay": 0.99, "correction": 0} | changes)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return (self.num_features,)

    def parameter_axes(self, ndim: int) -> Axes:
        return _checks.axes_in_range(self.axis, ndim)

    def reduced_axes(self, ndim: int) -> Axes:
        (channel,) = self.parameter_axes(ndim)
        return tuple(axis for axis in range(ndim) if axis != channel)

    def apply(
        self,
        params: Params,
        state: State,
        x: Array,
        *,
        training: bool = False,
        mask: Array | None = None,
    ) -> tuple[Array, State]:
        """Normalize ``x``; return the result and the new state. Nothing given is changed.

        Args:
            params, state: as from :meth:`init`.
            x: array of at least two dimensions, ``num_features`` long along ``axis``.
            training: use the statistics of ``x`` and update the running ones; else use the
                running ones.
            mask: which values count (booleans), or how often (nonnegative numbers): of the shape
                of ``x``, broadcastable to it at equal rank, or without the channel axis. The rest
                takes no part, even if it is NaN, and comes out as ``bias``. A channel in which no
                more values count than ``correction`` keeps its running statistics; with
                ``decay=None`` all channels do, if there is one such.

        Returns:
            ``(y, state)``; ``y`` has the shape and dtype of ``x``.

        Raises:
            TypeError: ``x`` is not real floating point.
            ValueError: a shape does not fit, or in training a channel has a single value.
        """
        _checks.floating(x, backend_of(x))
        _checks.rank(x, 2, "BatchNorm")
        backend, params, weights = self._check(params, x, mask)
        self._check_state(state, backend)
        if training or not state:
            _checks.values_per_channel(backend.size(x, self.reduced_axes(len(x.shape))))
        return apply_batch_norm(
            x,
            params.get("scale"),
            params.get("bias"),
            state,
            axis=self.axis,
            eps=self.eps,
            decay=self.decay,
            correction=self.correction,
            training=training,
            weights=weights,
            backend=backend,
        )


def apply_batch_norm(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    state: State,
    *,
    axis: int | Axes,
    apart: Axes = (),
    eps: float,
    decay: float | None,
    correction: int,
    training: bool,
    weights: Array | None = None,
    dtype: DType | None = None,
    backend: Backend,
) -> tuple[Array, State]:
    """What :meth:`BatchNorm.apply` does once everything is checked: adapters call this.

    ``scale`` and ``bias`` have the lengths of ``x`` along ``axis``, which may be several axes in
    ascending order; ``weights`` have the rank of ``x``. ``state`` is empty, or has ``mean`` and
    ``var``, and ``count`` if anyone wants the batches counted. Each position along the axes
    ``apart`` has statistics of its own, and their average is remembered.
    """
    ndim = len(x.shape)
    channels = axis if isinstance(axis, tuple) else (axis % ndim,)

    def wide(p: Array | None) -> Array | None:
        return None if p is None else with_rank(p, channels, ndim, backend)

    scale, bias = wide(scale), wide(bias)
    if training or not state:
        axes = tuple(a for a in range(ndim) if a not in channels and a not in apart)
        y, batch = standardize(
            x,
            axes,
            scale,
            bias,
            eps=eps,
            weights=weights,
            remember=training and bool(state),
            dtype=dtype,
            backend=backend,
        )
        if batch is not None:
            state = updated(state, batch, apart, decay, correction, backend)
        return y, state
    y = normalize(
        x,
        wide(state["mean"]),
        wide(state["var"]),
        scale,
        bias,
        eps=eps,
        weights=weights,
        dtype=dtype,
        backend=backend,
    )
    return y, state


def batch_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
) -> Array:
    """Normalize each channel of ``x`` with the batch's own mean and population variance.

    Args:
        x: array of at least two dimensions.
        scale, bias: one value a channel, shape (C,).
        axis: the channel axis; C is the length of ``x`` along it.
        eps: added to the variance, inside the square root.
        mask: see :meth:`BatchNorm.apply`.

    Returns:
        ``(x - mean) / sqrt(variance + eps) * scale + bias``, with the shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not real floating point.
        ValueError: a shape does not fit, ``eps`` is not above 0, or a channel has a single value.

    The same as ``torch.nn.functional.batch_norm(x, None, None, scale, bias, training=True)``.

    >>> import numpy as np, normkit as nk
    >>> nk.batch_norm(np.array([[1.0, 10.0], [3.0, 30.0]]), eps=1e-12).round(6).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """
    backend = backend_of(x)
    _checks.floating(x, backend)
    _checks.rank(x, 2, "batch_norm")
    _checks.epsilon(eps)
    (channel,) = _checks.axes_in_range(axis, len(x.shape))
    shape = (x.shape[channel],)
    others = tuple(a for a in range(len(x.shape)) if a != channel)
    _checks.values_per_channel(backend.size(x, others))
    y, _ = apply_batch_norm(
        x,
        _checks.parameter(scale, x, shape, "scale", backend),
        _checks.parameter(bias, x, shape, "bias", backend),
        {},
        axis=channel,
        eps=eps,
        decay=None,
        correction=0,
        training=True,
        weights=_checks.weights_for(x, mask, channel, backend),
        backend=backend,
    )
    return y
