"""The dtype of results under automatic mixed precision."""

from __future__ import annotations

import torch
from torch import Tensor


def result_dtype(x: Tensor) -> torch.dtype | None:
    """float32 where CUDA's autocast has it so, as of layer_norm, group_norm and rms_norm.

    None, for the dtype of ``x``, elsewhere: see "Autocast Op Reference" in PyTorch's manual.
    """
    on = x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
    return torch.float32 if on else None
