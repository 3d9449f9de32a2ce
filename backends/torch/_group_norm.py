"""GroupNorm for PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import normkit as nk
from normkit import _checks
from normkit._group_norm import apply_group_norm, group_size

from . import _usual
from ._autocast import result_dtype
from ._backend import BACKEND
from ._leaf import leaf, traced


class GroupNorm(nn.GroupNorm):
    """Group normalization: ``torch.nn.GroupNorm`` with its arguments and parameters, and a mask.

    Unlike the native layer's, its results are right to the last digits whatever the mean of the
    input is, and a group of a single value is refused for any batch size.

    Args:
        num_groups, num_channels, eps, affine, device, dtype, bias: as in ``torch.nn.GroupNorm``.
        axis: the channel axis; the first axis is the batch's.
        scale: whether there is a ``weight``, if ``affine``.

    Shape: ``(N, C, ...)``, or C at ``axis``; the output is alike.

    >>> GroupNorm(2, 6)(torch.randn(3, 6, 5)).shape
    torch.Size([3, 6, 5])
    """

    axis: int = 1

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        axis: int = 1,
        scale: bool = True,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, bias=bias)
        _checks.axis_number(axis)
        self.axis = axis
        if not scale:
            self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input``; ``mask`` says which values count (see ``nk.GroupNorm.apply``)."""
        if traced(input):
            return leaf(self, input, mask)
        if mask is None and (y := _usual.group_norm(self, input)) is not None:
            return y
        _checks.floating(input, BACKEND)
        _checks.rank(input, 2, "GroupNorm")
        (axis,) = _checks.channel_axis(self.axis, input.ndim)
        _checks.lengths(input, (axis,), (self.num_channels,), self)
        _checks.values_per_group(group_size(input, self.num_groups, BACKEND), "GroupNorm")
        return apply_group_norm(
            input,
            self.weight,
            self.bias,
            groups=self.num_groups,
            axis=axis,
            eps=self.eps,
            weights=_checks.weights_for(input, mask, axis, BACKEND),
            dtype=result_dtype(input),
            backend=BACKEND,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.weight is None and self.bias is not None:
            text += ", scale=False"
        return text if self.axis == 1 else f"{text}, axis={self.axis}"


def build(definition: nk.GroupNorm, **options: Any) -> GroupNorm:
    """The layer that ``definition`` describes."""
    return GroupNorm(
        definition.num_groups,
        definition.num_channels,
        definition.eps,
        definition.scale or definition.bias,
        bias=definition.bias,
        scale=definition.scale,
        axis=definition.axis,
        **options,
    )


def describe(layer: nn.GroupNorm) -> nk.GroupNorm:
    """The definition of ``layer``, a native one or normkit's."""
    return nk.GroupNorm(
        layer.num_groups,
        layer.num_channels,
        axis=getattr(layer, "axis", 1),
        eps=layer.eps,
        scale=layer.weight is not None,
        bias=layer.bias is not None,
    )
