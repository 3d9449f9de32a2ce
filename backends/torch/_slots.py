"""The normalization layers of a model, to be read and written."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normkit._bundle import Arrays, Entry, differences
from normkit._definition import Definition
from normkit._extras import bfloat16
from normkit._slot import Slot

from . import _portable

# The attribute for each field of a definition, of the layers that have it.
_ATTRIBUTES = {
    "eps": "eps",
    "decay": "momentum",
    "correction": "correction",
    "axis": "axis",
    "axes": "axes",
    "num_groups": "num_groups",
    "zero_centered": "zero_centered",
    "scale_after_cast": "scale_after_cast",
}
_NAMES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}


class _Slot(Slot):
    @property
    def definition(self) -> Definition:
        return _portable.definition(self.layer)

    @property
    def training(self) -> bool | None:
        return self.layer.training if isinstance(self.layer, _NormBase) else None

    def read(self) -> Arrays:
        return {name: array(t) for name, t in self._tensors().items()}

    def write(self, arrays: Arrays) -> None:
        own = self.layer._parameters | self.layer._buffers
        with torch.no_grad():
            for name, t in self._tensors().items():
                if own.get(_NAMES[name]) is not t:
                    msg = (
                        f"{self.name!r} computes its {_NAMES[name]} from other parameters (a "
                        f"parametrization, pruning or weight norm), so that it cannot be written; "
                        f"remove that first."
                    )
                    raise ValueError(msg)
                if name in arrays:
                    t.copy_(tensor(arrays[name]).view(t.shape))

    def configure(self, definition: Definition) -> None:
        for field, _, new in differences(self.definition, definition):
            if field in _ATTRIBUTES and hasattr(self.layer, _ATTRIBUTES[field]):
                if field == "decay" and new is not None:
                    new = round(1 - new, 15)
                setattr(self.layer, _ATTRIBUTES[field], new)

    def _tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self.layer, own, None) for name, own in _NAMES.items()}
        found = {name: t for name, t in found.items() if t is not None}
        if any(t.is_meta for t in found.values()):
            msg = f"{self.name!r} is on the meta device and has no values; load them first."
            raise ValueError(msg)
        return found


def slots(model: nn.Module) -> list[Slot]:
    """The normalization layers of ``model``, in the order of ``named_modules``."""
    if isinstance(model, torch.jit.ScriptModule):
        msg = "a scripted module does not say what its layers are; take those of the original one."
        raise TypeError(msg)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _portable.KINDS):
            names.setdefault(module, []).append(name)
    return [_Slot(first, layer, tuple(rest)) for layer, (first, *rest) in names.items()]


def made(entry: Entry, **options: Any) -> nn.Module:
    """A new layer that computes what ``entry`` does."""
    options = {"dtype": getattr(torch, entry.dtype.name)} | options
    layer = _portable.layer(entry.definition, **options)
    for name in entry.arrays.keys() & {"mean", "var"}:
        # Which may be wider than parameters of a half type.
        buffer = getattr(layer, _NAMES[name])
        wide = torch.promote_types(buffer.dtype, getattr(torch, entry.arrays[name].dtype.name))
        setattr(layer, _NAMES[name], buffer.to(wide))
    _Slot("", layer).write(entry.arrays)
    return layer.train(entry.training is not False)


def array(t: Tensor) -> Any:
    """A copy of ``t``, with its dtype."""
    t = t.detach().cpu()
    if t.dtype == torch.bfloat16:
        return t.contiguous().view(torch.int16).numpy().view(bfloat16()).copy()
    return t.numpy().copy()


def tensor(a: Any) -> Tensor:
    """A tensor of the values of ``a``, with its dtype."""
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(a).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(a))
