"""InstanceNorm for PyTorch."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

import normkit as nk
from normkit import _checks
from normkit._batch_norm import apply_batch_norm

from . import _usual
from ._backend import BACKEND
from ._buffers import decay_of, know_features, know_whether_it_tracks, state_of, store
from ._leaf import leaf, traced


class _Exact(_InstanceNorm):
    """The computation of every InstanceNorm here, over the attributes of PyTorch's."""

    axis: int = 1
    correction: int = 1

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input``; ``mask`` says which values count (see ``nk.InstanceNorm.apply``)."""
        if traced(input):
            return leaf(self, input, mask)
        if mask is None and (y := _usual.instance_norm(self, input)) is not None:
            return y
        _checks.floating(input, BACKEND)
        self._check_input_dim(input)
        if input.ndim == self._get_no_batch_dim():
            mask = None if mask is None else mask.unsqueeze(0)
            return self.forward(input.unsqueeze(0), mask=mask).squeeze(0)
        axis = self._check_input(input)
        state = {}
        if self.running_mean is not None and self.track_running_stats:
            state = state_of(self)
        if self.training or not state:
            size = BACKEND.size(input, tuple(set(range(1, input.ndim)) - {axis}))
            _checks.values_per_group(size, "InstanceNorm")
        y, new = apply_batch_norm(
            input,
            self.weight,
            self.bias,
            state,
            axis=axis,
            apart=(0,),
            eps=self.eps,
            decay=decay_of(self, state),
            correction=self.correction,
            training=self.training,
            weights=_checks.weights_for(input, mask, axis, BACKEND),
            backend=BACKEND,
        )
        store(new, state)
        return y

    def _check_input(self, x: Tensor) -> int:
        (axis,) = _checks.channel_axis(self.axis, x.ndim)
        if self.affine or self.running_mean is not None:
            _checks.lengths(x, (axis,), (self.num_features,), self)
        elif x.shape[axis] != self.num_features:
            warnings.warn(
                f"num_features is {self.num_features}, but the input has {x.shape[axis]} channels; "
                f"without parameters and running statistics the layer does not use it.",
                stacklevel=3,
            )
        return axis


class InstanceNorm(_Exact):
    """Instance normalization over an input of any rank from 3 up.

    ``torch.nn.InstanceNorm1d``, ``2d`` and ``3d`` in one, with their arguments, parameters,
    buffers and train/eval rules, and a little more. Unlike theirs, its results are right to the
    last digits whatever the mean of the input is, ``num_batches_tracked`` counts the batches, and
    the layer keeps the memory format of its input.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            ``torch.nn.InstanceNorm2d``. ``momentum=None`` is the cumulative average (natively
            there is no update then).
        axis: the channel axis; the first axis is the batch's.
        correction: which estimate ``running_var`` uses: 1 the unbiased one, 0 the population
            variance.
        scale: whether there is a ``weight``, if ``affine``.

    Shape: ``(N, C, ...)``, or C at ``axis``; the output is alike.

    >>> InstanceNorm(3)(torch.randn(8, 3, 5)).shape
    torch.Size([8, 3, 5])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        axis: int = 1,
        correction: int = 1,
        scale: bool = True,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            bias=bias,
        )
        _checks.axis_number(axis)
        _checks.estimator(correction)
        self.axis = axis
        self.correction = correction
        if not scale:
            self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def _get_no_batch_dim(self) -> int:
        return 0  # the rank is open, so a batch is always expected

    def _check_input_dim(self, input: Tensor) -> None:
        _checks.rank(input, 3, "InstanceNorm")

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.weight is None and self.bias is not None:
            text += ", scale=False"
        for name, usual in (("axis", 1), ("correction", 1)):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)}"
        return text


class InstanceNorm1d(InstanceNorm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d``, for ``(N, C, L)`` and ``(C, L)``; with a mask, and exact.

    See :class:`InstanceNorm`.
    """

    _check_input_dim = nn.InstanceNorm1d._check_input_dim
    _get_no_batch_dim = nn.InstanceNorm1d._get_no_batch_dim


class InstanceNorm2d(InstanceNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d``, for ``(N, C, H, W)`` and ``(C, H, W)``; with a mask, and exact.

    See :class:`InstanceNorm`.
    """

    _check_input_dim = nn.InstanceNorm2d._check_input_dim
    _get_no_batch_dim = nn.InstanceNorm2d._get_no_batch_dim


class InstanceNorm3d(InstanceNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d``, for ``(N, C, D, H, W)`` and ``(C, D, H, W)``; with a mask.

    See :class:`InstanceNorm`.
    """

    _check_input_dim = nn.InstanceNorm3d._check_input_dim
    _get_no_batch_dim = nn.InstanceNorm3d._get_no_batch_dim


class _Lazy(_Exact):
    def initialize_parameters(self, input: Tensor, *, mask: Tensor | None = None) -> None:
        super().initialize_parameters(input)
        know_features(self, input)


class LazyInstanceNorm1d(_Lazy, nn.LazyInstanceNorm1d):
    """``torch.nn.LazyInstanceNorm1d``: an :class:`InstanceNorm1d` once the first input shows C."""

    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(_Lazy, nn.LazyInstanceNorm2d):
    """``torch.nn.LazyInstanceNorm2d``: an :class:`InstanceNorm2d` once the first input shows C."""

    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(_Lazy, nn.LazyInstanceNorm3d):
    """``torch.nn.LazyInstanceNorm3d``: an :class:`InstanceNorm3d` once the first input shows C."""

    cls_to_become = InstanceNorm3d


def build(definition: nk.InstanceNorm, **options: Any) -> InstanceNorm:
    """The layer that ``definition`` describes."""
    return InstanceNorm(
        definition.num_features,
        definition.eps,
        # Rounded so that the decay comes back as it was written.
        None if definition.decay is None else round(1 - definition.decay, 15),
        definition.scale or definition.bias,
        definition.track_running_stats,
        bias=definition.bias,
        scale=definition.scale,
        axis=definition.axis,
        correction=definition.correction,
        **options,
    )


def describe(layer: _InstanceNorm) -> nk.InstanceNorm:
    """The definition of ``layer``, a native one or normkit's."""
    know_whether_it_tracks(layer)
    if layer.momentum is None:
        # The native layer then leaves its running statistics as they are.
        decay = None if isinstance(layer, _Exact) else 1.0
    else:
        decay = round(1 - layer.momentum, 15)
    return nk.InstanceNorm(
        layer.num_features,
        axis=getattr(layer, "axis", 1),
        eps=layer.eps,
        decay=decay,
        correction=getattr(layer, "correction", 1),
        scale=layer.weight is not None,
        bias=layer.bias is not None,
        track_running_stats=layer.running_mean is not None,
    )
