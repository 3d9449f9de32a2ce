"""Normalization layers that mean the same thing in every framework.

A layer is one operation: choose the axes to reduce, standardize over them, scale and shift along
the parameter axes, and maybe remember the statistics. It is written once, against the Array API
(``_engine.py``, ``_statistics.py``); a layer is a short description over it (``_batch_norm.py``,
``_layer_norm.py`` and so on); an adapter makes that a layer of its framework:
``normkit.numpy``, ``normkit.torch``, ``normkit.keras``, ``normkit.flax.nnx``,
``normkit.flax.linen``, each imported by whoever uses it.
"""

from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path
from typing import Any as _Any

from normkit._batch_norm import BatchNorm, batch_norm
from normkit._bundle import Bundle
from normkit._explain import explain
from normkit._extract import extract
from normkit._files import load, save
from normkit._fold import fold
from normkit._group_norm import GroupNorm, group_norm
from normkit._instance_norm import InstanceNorm, instance_norm
from normkit._layer_norm import LayerNorm, layer_norm
from normkit._normalize import normalize
from normkit._port import port
from normkit._restore import restore
from normkit._rms_norm import RMSNorm, rms_norm
from normkit._statistics import Moments, moments

# Installed, the adapters are in this folder; in a checkout they are next to it.
_checkout = _Path(__file__).parents[1]
if (_checkout / "backends").is_dir() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout / "backends"))

__all__ = [
    "BatchNorm",
    "Bundle",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Moments",
    "RMSNorm",
    "batch_norm",
    "explain",
    "extract",
    "fold",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "load",
    "moments",
    "normalize",
    "port",
    "restore",
    "rms_norm",
    "save",
]


def __getattr__(name: str) -> _Any:
    if name == "__version__":
        # Asked for when it is wanted: looking it up takes longer than importing the package.
        from importlib.metadata import version

        return version(__name__)
    adapter = f"{__name__}.{name}"
    hint = ""
    if not name.startswith("_") and _find_spec(adapter) is not None:
        hint = f"; an adapter is imported by whoever uses it: import {adapter}"
    msg = f"module {__name__!r} has no attribute {name!r}{hint}"
    raise AttributeError(msg)
