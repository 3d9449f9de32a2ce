"""RMSNorm for PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import normkit as nk
from normkit import _checks
from normkit._rms_norm import apply_rms_norm

from . import _usual
from ._autocast import result_dtype
from ._backend import BACKEND
from ._leaf import leaf, nested, traced


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalization: ``torch.nn.RMSNorm`` with its arguments, and a mask.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in ``torch.nn.RMSNorm``.
        axes: the axes to normalize over, as many as ``normalized_shape`` has lengths and in
            ascending order; the last ones if None.
        zero_centered: multiply by ``1 + weight``, which starts from zeros (as Gemma does).
        scale_after_cast: multiply by the weight after rounding to the dtype of the input, in that
            dtype (as Llama does); if False, before.

    Shape: any with the lengths ``normalized_shape`` along ``axes``; the output is alike.

    >>> RMSNorm(4)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    axes: tuple[int, ...] | None = None
    zero_centered: bool = False
    scale_after_cast: bool = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        axes: int | Sequence[int] | None = None,
        zero_centered: bool = False,
        scale_after_cast: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        if axes is not None:
            _, self.axes = _checks.shape_and_axes(self.normalized_shape, axes)
        self.zero_centered = zero_centered
        self.scale_after_cast = scale_after_cast
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Normalize ``x``; ``mask`` says which values count (see ``nk.RMSNorm.apply``)."""
        if traced(x):
            return leaf(self, x, mask)
        if mask is None and (y := _usual.rms_norm(self, x)) is not None:
            return y
        _checks.floating(x, BACKEND)
        if nested(x, self, mask):
            return super().forward(x)
        axes = _checks.axes_in_range(self._axes(), x.ndim)
        _checks.lengths(x, axes, self.normalized_shape, self)
        return apply_rms_norm(
            x,
            self.weight,
            axes=axes,
            eps=self.eps,
            zero_centered=self.zero_centered,
            scale_after_cast=self.scale_after_cast,
            weights=_checks.weights_for(x, mask, axes[-1], BACKEND),
            dtype=result_dtype(x),
            backend=BACKEND,
        )

    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.normalized_shape), 0)) if self.axes is None else self.axes

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name, usual in (("axes", None), ("zero_centered", False), ("scale_after_cast", False)):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)}"
        return text


def build(definition: nk.RMSNorm, **options: Any) -> RMSNorm:
    """The layer that ``definition`` describes."""
    shape = definition.parameter_shape
    last = tuple(range(-len(shape), 0))
    return RMSNorm(
        shape,
        definition.eps,
        definition.scale,
        axes=None if definition.axes == last else definition.axes,
        zero_centered=definition.zero_centered,
        scale_after_cast=definition.scale_after_cast,
        **options,
    )


def describe(layer: nn.RMSNorm) -> nk.RMSNorm:
    """The definition of ``layer``, a native one or normkit's."""
    return nk.RMSNorm(
        tuple(layer.normalized_shape),
        axes=getattr(layer, "axes", None),
        eps=layer.eps,
        scale=layer.weight is not None,
        zero_centered=getattr(layer, "zero_centered", False),
        scale_after_cast=getattr(layer, "scale_after_cast", False),
    )
