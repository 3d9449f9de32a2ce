"""BatchNorm for PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normkit as nk
from normkit import _checks
from normkit._batch_norm import apply_batch_norm

from . import _usual
from ._backend import BACKEND
from ._buffers import decay_of, know_features, know_whether_it_tracks, state_of, store
from ._leaf import leaf, traced


class _Exact(_BatchNorm):
    """The computation of every BatchNorm here, over the attributes of PyTorch's."""

    axis: int = 1
    correction: int = 1

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input``; ``mask`` says which values count (see ``nk.BatchNorm.apply``)."""
        if traced(input):
            return leaf(self, input, mask)
        if mask is None and (y := _usual.batch_norm(self, input)) is not None:
            return y
        _checks.floating(input, BACKEND)
        self._check_input_dim(input)
        axis = self._check_input(input)
        state = {}
        if self.running_mean is not None and (self.track_running_stats or not self.training):
            state = state_of(self)
        y, new = apply_batch_norm(
            input,
            self.weight,
            self.bias,
            state,
            axis=axis,
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
        (axis,) = _checks.axes_in_range(self.axis, x.ndim)
        _checks.lengths(x, (axis,), (self.num_features,), self)
        own = self.training or self.running_mean is None
        if own or self.eps < 0:  # with statistics that are given, 0 will do
            _checks.epsilon(self.eps)
        if own:
            _checks.values_per_channel(BACKEND.size(x, tuple(set(range(x.ndim)) - {axis})))
        return axis


class BatchNorm(_Exact):
    """Batch normalization over an input of any rank from 2 up.

    ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` in one, with their arguments, parameters, buffers
    and train/eval rules, and a little more. Unlike theirs, its results are right to the last
    digits whatever the mean of the input is, and a step that is refused changes no buffer.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            ``torch.nn.BatchNorm2d``. ``momentum=None`` is the cumulative average.
        axis: the channel axis.
        correction: which estimate ``running_var`` uses: 1 the unbiased one, 0 the population
            variance.
        scale: whether there is a ``weight``, if ``affine``.

    Shape: ``(N, C, ...)``, or C at ``axis``; the output is alike.

    >>> bn = BatchNorm(3)
    >>> bn(torch.randn(8, 3, 5)).shape
    torch.Size([8, 3, 5])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
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

    def _check_input_dim(self, input: Tensor) -> None:
        _checks.rank(input, 2, "BatchNorm")

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.weight is None and self.bias is not None:
            text += ", scale=False"
        for name, usual in (("axis", 1), ("correction", 1)):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)}"
        return text


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``, for ``(N, C)`` and ``(N, C, L)``; with a mask, and exact.

    Its arguments, parameters, buffers and behaviour are the native layer's; state dicts load both
    ways. New are the keyword arguments ``axis``, ``correction`` and ``scale``, and ``mask`` in a
    call: see :class:`BatchNorm`.
    """

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, for ``(N, C, H, W)``; with a mask, and exact.

    Its arguments, parameters, buffers and behaviour are the native layer's; state dicts load both
    ways. New are the keyword arguments ``axis``, ``correction`` and ``scale``, and ``mask`` in a
    call: see :class:`BatchNorm`.
    """

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``, for ``(N, C, D, H, W)``; with a mask, and exact.

    Its arguments, parameters, buffers and behaviour are the native layer's; state dicts load both
    ways. New are the keyword arguments ``axis``, ``correction`` and ``scale``, and ``mask`` in a
    call: see :class:`BatchNorm`.
    """

    _check_input_dim = nn.BatchNorm3d._check_input_dim


class _Lazy(_Exact):
    def initialize_parameters(self, input: Tensor, *, mask: Tensor | None = None) -> None:
        super().initialize_parameters(input)
        know_features(self, input)


class LazyBatchNorm1d(_Lazy, nn.LazyBatchNorm1d):
    """``torch.nn.LazyBatchNorm1d``: a :class:`BatchNorm1d` once the first input shows C."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d):
    """``torch.nn.LazyBatchNorm2d``: a :class:`BatchNorm2d` once the first input shows C."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d):
    """``torch.nn.LazyBatchNorm3d``: a :class:`BatchNorm3d` once the first input shows C."""

    cls_to_become = BatchNorm3d


def build(definition: nk.BatchNorm, **options: Any) -> BatchNorm:
    """The layer that ``definition`` describes."""
    return BatchNorm(
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


def describe(layer: _BatchNorm) -> nk.BatchNorm:
    """The definition of ``layer``, a native one or normkit's."""
    know_whether_it_tracks(layer)
    decay = None if layer.momentum is None else round(1 - layer.momentum, 15)
    if decay is None and layer.running_mean is not None and layer.num_batches_tracked is None:
        decay = 1.0  # there is no cumulative average without a counter
    return nk.BatchNorm(
        layer.num_features,
        axis=getattr(layer, "axis", 1),
        eps=layer.eps,
        decay=decay,
        correction=getattr(layer, "correction", 1),
        scale=layer.weight is not None,
        bias=layer.bias is not None,
        track_running_stats=layer.running_mean is not None,
    )
