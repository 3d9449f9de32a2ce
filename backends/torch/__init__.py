"""normkit for PyTorch: drop-in layers, and any definition as a ``torch.nn.Module``.

>>> import torch, normkit as nk, normkit.torch
>>> block = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), nk.torch.BatchNorm2d(8))
>>> block(torch.randn(4, 1, 5, 5)).shape
torch.Size([4, 8, 3, 3])
>>> nk.torch.layer(nk.LayerNorm.flax(16))
LayerNorm((16,), eps=1e-06, elementwise_affine=True, bias=True)
"""

from normkit._extras import require as _require

_require("torch", "normkit.torch", "torch")

from normkit.torch._batch_norm import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from normkit.torch._convert import convert, revert
from normkit.torch._fold import fold
from normkit.torch._freeze import freeze, unfreeze
from normkit.torch._group_norm import GroupNorm
from normkit.torch._instance_norm import (
    InstanceNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from normkit.torch._layer_norm import LayerNorm
from normkit.torch._portable import definition, layer
from normkit.torch._recalibrate import recalibrate
from normkit.torch._rms_norm import RMSNorm

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "RMSNorm",
    "convert",
    "definition",
    "fold",
    "freeze",
    "layer",
    "recalibrate",
    "revert",
    "unfreeze",
]
