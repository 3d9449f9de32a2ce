"""LayerNorm for PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import normkit as nk
from normkit import _checks
from normkit._layer_norm import apply_layer_norm

from . import _usual
from ._autocast import result_dtype
from ._backend import BACKEND
from ._leaf import leaf, nested, traced


class LayerNorm(nn.LayerNorm):
    """Layer normalization: ``torch.nn.LayerNorm`` with its arguments and parameters, and a mask.

    Unlike the native layer's, its results are right to the last digits whatever the mean of the
    input is.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in
            ``torch.nn.LayerNorm``.
        axes: the axes to normalize over, as many as ``normalized_shape`` has lengths and in
            ascending order; the last ones if None.
        scale: whether there is a ``weight``, if ``elementwise_affine``.

    Shape: any with the lengths ``normalized_shape`` along ``axes``; the output is alike.

    >>> LayerNorm(4)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    axes: tuple[int, ...] | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        axes: int | Sequence[int] | None = None,
        scale: bool = True,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if axes is not None:
            _, self.axes = _checks.shape_and_axes(self.normalized_shape, axes)
        if not scale:
            self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input``; ``mask`` says which values count (see ``nk.LayerNorm.apply``)."""
        if traced(input):
            return leaf(self, input, mask)
        if mask is None and (y := _usual.layer_norm(self, input)) is not None:
            return y
        _checks.floating(input, BACKEND)
        if nested(input, self, mask):
            return super().forward(input)
        axes = _checks.axes_in_range(self._axes(), input.ndim)
        _checks.lengths(input, axes, self.normalized_shape, self)
        return apply_layer_norm(
            input,
            self.weight,
            self.bias,
            axes=axes,
            eps=self.eps,
            weights=_checks.weights_for(input, mask, axes[-1], BACKEND),
            dtype=result_dtype(input),
            backend=BACKEND,
        )

    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.normalized_shape), 0)) if self.axes is None else self.axes

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.weight is None and self.bias is not None:
            text += ", scale=False"
        return text if self.axes is None else f"{text}, axes={self.axes}"


def build(definition: nk.LayerNorm, **options: Any) -> LayerNorm:
    """The layer that ``definition`` describes."""
    shape = definition.parameter_shape
    last = tuple(range(-len(shape), 0))
    return LayerNorm(
        shape,
        definition.eps,
        definition.scale or definition.bias,
        definition.bias,
        axes=None if definition.axes == last else definition.axes,
        scale=definition.scale,
        **options,
    )


def describe(layer: nn.LayerNorm) -> nk.LayerNorm:
    """The definition of ``layer``, a native one or normkit's."""
    return nk.LayerNorm(
        tuple(layer.normalized_shape),
        axes=getattr(layer, "axes", None),
        eps=layer.eps,
        scale=layer.weight is not None,
        bias=layer.bias is not None,
    )
