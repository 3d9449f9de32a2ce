"""InstanceNorm: statistics over the positions of each channel, for each sample alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from normkit import _checks
from normkit._arrays import backend_of
from normkit._backend import Array
from normkit._batch_norm import apply_batch_norm
from normkit._definition import Params, State
from normkit._running import Remembering
from normkit._statistics import Axes


@dataclass(frozen=True)
class InstanceNorm(Remembering):
    """Instance normalization of each sample and channel: ``(x - mean) / sqrt(variance + eps)``.

    Mean and population variance are taken over all positions of one channel of one sample; with
    ``scale`` and ``bias``, which have one value a channel, the result is ``... * scale + bias``.
    The defaults are PyTorch's; there is a constructor for each framework's: :meth:`torch`,
    :meth:`keras`, :meth:`flax`.

    Args:
        num_features: number of channels.
        axis: the channel axis. The first axis of x is the batch's.
        eps: added to the variance, inside the square root.
        decay: the share of the running statistics that a step keeps, from 0 to 1. None: they are
            the average over all batches so far.
        correction: which estimate of the variance is remembered: 1 the unbiased one, 0 the
            population variance.
        scale, bias: whether the layer has them.
        track_running_stats: whether to remember the average of mean and variance over the samples
            of a batch, and use that in inference. If not, each sample has its own there too.

    Raises:
        ValueError, TypeError: an argument is not what it must be.

    Source: Ulyanov, Vedaldi & Lempitsky, "Instance Normalization", 2016, arXiv:1607.08022.

    >>> import numpy as np, normkit as nk
    >>> norm = nk.InstanceNorm(1)
    >>> params, state = norm.init()
    >>> x = np.array([[[1, 3]], [[10, 30]]], dtype="float32")
    >>> y, state = norm.apply(params, state, x)
    >>> y.round(3).tolist()
    [[[-1.0, 1.0]], [[-1.0, 1.0]]]
    """

    num_features: int
    axis: int = 1
    eps: float = 1e-5
    decay: float | None = 0.9
    correction: int = 1
    scale: bool = False
    bias: bool = False
    track_running_stats: bool = False

    def __post_init__(self) -> None:
        _checks.length(self.num_features, "num_features")
        _checks.axis_number(self.axis)
        _checks.epsilon(self.eps)
        _checks.decay_rate(self.decay)
        _checks.estimator(self.correction)

    @classmethod
    def torch(cls, num_features: int, **changes: Any) -> InstanceNorm:
        """With the defaults of ``torch.nn.InstanceNorm2d``, which are this class's own."""
        return cls(num_features, **changes)

    @classmethod
    def keras(cls, num_features: int, **changes: Any) -> InstanceNorm:
        """With the defaults of ``keras.layers.GroupNormalization(groups=-1)``."""
        return cls(num_features, **_AFFINE_LAST | {"eps": 1e-3} | changes)

    @classmethod
    def flax(cls, num_features: int, **changes: Any) -> InstanceNorm:
        """With the defaults of ``flax.nnx.InstanceNorm`` and ``flax.linen.InstanceNorm``."""
        return cls(num_features, **_AFFINE_LAST | {"eps": 1e-6} | changes)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return (self.num_features,)

    def parameter_axes(self, ndim: int) -> Axes:
        return _checks.channel_axis(self.axis, ndim)

    def reduced_axes(self, ndim: int) -> Axes:
        (channel,) = self.parameter_axes(ndim)
        return tuple(axis for axis in range(1, ndim) if axis != channel)

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
            x: array of at least three dimensions, the first of which is the batch's;
                ``num_features`` long along ``axis``.
            training: use the statistics of ``x`` and update the running ones; else use the
                running ones, if there are any.
            mask: which values count (booleans), or how often (nonnegative numbers): of the shape
                of ``x``, broadcastable to it at equal rank, or without the channel axis. The rest
                takes no part, even if it is NaN, and comes out as ``bias``. An instance in which
                no more values count than ``correction`` takes no part in the running statistics.

        Returns:
            ``(y, state)``; ``y`` has the shape and dtype of ``x``.

        Raises:
            TypeError: ``x`` is not real floating point.
            ValueError: a shape does not fit, or an instance has a single value to take its
                statistics from.
        """
        _checks.floating(x, backend_of(x))
        _checks.rank(x, 3, "InstanceNorm")
        backend, params, weights = self._check(params, x, mask)
        self._check_state(state, backend)
        if training or not state:
            size = backend.size(x, self.reduced_axes(len(x.shape)))
            _checks.values_per_group(size, "InstanceNorm")
        return apply_batch_norm(
            x,
            params.get("scale"),
            params.get("bias"),
            state,
            axis=self.axis,
            apart=(0,),
            eps=self.eps,
            decay=self.decay,
            correction=self.correction,
            training=training,
            weights=weights,
            backend=backend,
        )


_AFFINE_LAST = {"axis": -1, "decay": 0.99, "correction": 0, "scale": True, "bias": True}


def instance_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
) -> Array:
    """Normalize each channel of each sample of ``x`` with its own mean and population variance.

    Args:
        x: array of at least three dimensions, the first of which is the batch's.
        scale, bias: one value a channel, shape (C,).
        axis: the channel axis; C is the length of ``x`` along it.
        eps: added to the variance, inside the square root.
        mask: see :meth:`InstanceNorm.apply`.

    Returns:
        ``(x - mean) / sqrt(variance + eps) * scale + bias``, with the shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not real floating point.
        ValueError: a shape or axis does not fit, ``eps`` is not above 0, or a channel of a sample
            has a single value.

    The same as ``torch.nn.functional.instance_norm(x, weight=scale, bias=bias)``.

    >>> import numpy as np, normkit as nk
    >>> nk.instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=1e-12).round(6).tolist()
    [[[-1.0, 1.0], [-1.0, 1.0]]]
    """
    backend = backend_of(x)
    _checks.floating(x, backend)
    _checks.rank(x, 3, "instance_norm")
    _checks.epsilon(eps)
    ndim = len(x.shape)
    (channel,) = _checks.channel_axis(axis, ndim)
    shape = (x.shape[channel],)
    positions = tuple(a for a in range(1, ndim) if a != channel)
    _checks.values_per_group(backend.size(x, positions), "instance_norm")
    y, _ = apply_batch_norm(
        x,
        _checks.parameter(scale, x, shape, "scale", backend),
        _checks.parameter(bias, x, shape, "bias", backend),
        {},
        axis=channel,
        apart=(0,),
        eps=eps,
        decay=None,
        correction=0,
        training=True,
        weights=_checks.weights_for(x, mask, channel, backend),
        backend=backend,
    )
    return y
