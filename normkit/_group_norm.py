"""GroupNorm: statistics over groups of channels, for each sample alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from normkit import _checks
from normkit._arrays import backend_of
from normkit._backend import Array, Backend, DType
from normkit._definition import Definition, Params, State
from normkit._engine import standardize, with_rank
from normkit._statistics import Axes


@dataclass(frozen=True)
class GroupNorm(Definition):
    """Group normalization of each sample: ``(x - mean) / sqrt(variance + eps) * scale + bias``.

    The channels are divided, in their order, into groups of equal size. Mean and population
    variance are taken over the channels of a group and all positions; ``scale`` and ``bias`` have
    one value a channel. The defaults are PyTorch's; there is a constructor for each framework's:
    :meth:`torch`, :meth:`keras`, :meth:`flax`.

    Args:
        num_groups: number of groups; 1 normalizes each sample as a whole.
        num_channels: number of channels, a multiple of ``num_groups``.
        axis: the channel axis. The first axis of x is the batch's.
        eps: added to the variance, inside the square root.
        scale, bias: whether the layer has them.

    Raises:
        ValueError, TypeError: an argument is not what it must be.

    Source: Wu & He, "Group Normalization", ECCV 2018, arXiv:1803.08494.

    >>> import numpy as np, normkit as nk
    >>> gn = nk.GroupNorm(2, 4)
    >>> params, state = gn.init()
    >>> y, state = gn.apply(params, state, np.array([[1, 3, 10, 30]], dtype="float32"))
    >>> y.round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    num_groups: int
    num_channels: int
    axis: int = 1
    eps: float = 1e-5
    scale: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        _checks.length(self.num_groups, "num_groups")
        _checks.length(self.num_channels, "num_channels")
        _checks.divisible(self.num_channels, self.num_groups)
        _checks.axis_number(self.axis)
        _checks.epsilon(self.eps)

    @classmethod
    def torch(cls, num_groups: int, num_channels: int, **changes: Any) -> GroupNorm:
        """With the defaults of ``torch.nn.GroupNorm``, which are this class's own."""
        return cls(num_groups, num_channels, **changes)

    @classmethod
    def keras(cls, num_groups: int, num_channels: int, **changes: Any) -> GroupNorm:
        """With the defaults of ``keras.layers.GroupNormalization``."""
        return cls(num_groups, num_channels, **{"axis": -1, "eps": 1e-3} | changes)

    @classmethod
    def flax(cls, num_groups: int, num_channels: int, **changes: Any) -> GroupNorm:
        """With the defaults of ``flax.nnx.GroupNorm`` and ``flax.linen.GroupNorm``."""
        return cls(num_groups, num_channels, **{"axis": -1, "eps": 1e-6} | changes)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return (self.num_channels,)

    @property
    def groups(self) -> int:
        return self.num_groups

    def parameter_axes(self, ndim: int) -> Axes:
        return _checks.channel_axis(self.axis, ndim)

    def reduced_axes(self, ndim: int) -> Axes:
        return tuple(range(1, ndim))

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
            x: array of at least two dimensions, the first of which is the batch's;
                ``num_channels`` long along ``axis``.
            training: accepted so that every layer is called alike.
            mask: which values count (booleans), or how often (nonnegative numbers): of the shape
                of ``x``, broadcastable to it at equal rank, or without the channel axis. The rest
                takes no part, even if it is NaN, and comes out as ``bias``.

        Returns:
            ``(y, state)``; ``y`` has the shape and dtype of ``x``.

        Raises:
            TypeError: ``x`` is not real floating point.
            ValueError: a shape does not fit, or a group has a single value.
        """
        _checks.floating(x, backend_of(x))
        _checks.rank(x, 2, "GroupNorm")
        backend, params, weights = self._check(params, x, mask)
        (channel,) = self.parameter_axes(len(x.shape))
        _checks.values_per_group(group_size(x, self.num_groups, backend), "GroupNorm")
        y = apply_group_norm(
            x,
            params.get("scale"),
            params.get("bias"),
            groups=self.num_groups,
            axis=channel,
            eps=self.eps,
            weights=weights,
            backend=backend,
        )
        return y, state


def group_size(x: Array, groups: int, backend: Backend) -> Any:
    """How many values of ``x`` each group of a sample has."""
    return backend.size(x, tuple(range(1, len(x.shape)))) // groups


def apply_group_norm(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    *,
    groups: int,
    axis: int,
    axes: Axes | None = None,
    eps: float,
    weights: Array | None = None,
    dtype: DType | None = None,
    backend: Backend,
) -> Array:
    """What :meth:`GroupNorm.apply` does once everything is checked: adapters call this.

    Statistics are taken over ``axes``, the channel ``axis`` among them; if None, over all but the
    first. ``weights`` have the rank of ``x``.
    """
    ndim = len(x.shape)
    reduced = range(1, ndim) if axes is None else axes
    # Of the two axes that the channels become, the second holds those of one group.
    reduced = tuple(a if a < axis else a + 1 for a in reduced)

    def wide(p: Array | None) -> Array | None:
        if p is None:
            return None
        return with_rank(backend.split(p, 0, groups), (axis, axis + 1), ndim + 1, backend)

    if weights is not None:
        if weights.shape[axis] is None:  # one for all channels, or one each: known when it runs
            weights = weights + backend.xp.zeros_like(x, dtype=weights.dtype)
        shared = weights.shape[axis] == 1
        weights = backend.split(weights, axis, 1 if shared else groups)
    y, _ = standardize(
        backend.split(x, axis, groups),
        reduced,
        wide(scale),
        wide(bias),
        eps=eps,
        weights=weights,
        dtype=dtype,
        backend=backend,
    )
    return backend.join(y, axis)


def group_norm(
    x: Array,
    num_groups: int,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
) -> Array:
    """Normalize groups of channels of ``x``, each sample with its own mean and variance.

    Args:
        x: array of at least two dimensions, the first of which is the batch's.
        num_groups: number of groups that the channels are divided into, in their order.
        scale, bias: one value a channel, shape (C,).
        axis: the channel axis; C is the length of ``x`` along it.
        eps: added to the variance, inside the square root.
        mask: see :meth:`GroupNorm.apply`.

    Returns:
        ``(x - mean) / sqrt(variance + eps) * scale + bias``, with the shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not real floating point.
        ValueError: a shape or axis does not fit, ``eps`` is not above 0, or a group has a single
            value.

    The same as ``torch.nn.functional.group_norm(x, num_groups, scale, bias)``.

    >>> import numpy as np, normkit as nk
    >>> nk.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=1e-12).round(6).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """
    backend = backend_of(x)
    _checks.floating(x, backend)
    _checks.rank(x, 2, "group_norm")
    _checks.epsilon(eps)
    _checks.length(num_groups, "num_groups")
    (channel,) = _checks.channel_axis(axis, len(x.shape))
    shape = (x.shape[channel],)
    _checks.divisible(shape[0], num_groups)
    _checks.values_per_group(group_size(x, num_groups, backend), "group_norm")
    return apply_group_norm(
        x,
        _checks.parameter(scale, x, shape, "scale", backend),
        _checks.parameter(bias, x, shape, "bias", backend),
        groups=num_groups,
        axis=channel,
        eps=eps,
        weights=_checks.weights_for(x, mask, channel, backend),
        backend=backend,
    )
