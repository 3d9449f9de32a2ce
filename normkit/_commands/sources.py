"""The files that normalization layers are found in: bundles, PyTorch checkpoints, Keras models."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from normkit import load
from normkit._bundle import Arrays
from normkit._commands import RefusedError
from normkit._definition import Definition
from normkit._extract import extract

# How the parts of a layer are called in a state dict of PyTorch.
_PARTS = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
    "num_batches_tracked": "count",
}


@dataclass(frozen=True)
class Found:
    """A layer in a file.

    Attributes:
        name: its name there.
        definition: what it computes, if the file says so.
        kind: what it is, as far as that is known.
        arrays: its parameters and statistics.
    """

    name: str
    definition: Definition | None
    kind: str
    arrays: Arrays


def read(path: str) -> list[Found]:
    """The normalization layers in the file ``path``.

    Raises:
        RefusedError: it cannot be read, or is of no kind that is known.
    """
    ending = Path(path).suffix
    try:
        if ending == ".keras":
            return _of_keras(path)
        if ending in (".pt", ".pth", ".bin", ".ckpt"):
            return _of_checkpoint(path)
        if ending == ".safetensors":
            return _described(load(path))
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise RefusedError(str(error)) from error
    msg = (
        f"{path!r} is none of the files that are read here: a bundle (.safetensors), a checkpoint "
        f"of PyTorch (.pt, .pth, .bin, .ckpt) or a model of Keras (.keras)."
    )
    raise RefusedError(msg)


def _described(bundle: Any) -> list[Found]:
    return [
        Found(name, e.definition, type(e.definition).__name__, e.arrays)
        for name, e in bundle.items()
    ]


def _of_keras(path: str) -> list[Found]:
    _need("keras", path)
    backends = ("tensorflow", "jax", "torch")
    here = [name for name in backends if find_spec(name) is not None]
    if here and "KERAS_BACKEND" not in os.environ:
        os.environ["KERAS_BACKEND"] = here[0]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    keras = import_module("keras")
    import_module("normkit.keras")  # so that its layers are known by their names
    try:
        # Code of the file's own is not run.
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises of every kind at a file that is damaged
        msg = f"Keras cannot load {path!r}: {error}"
        raise RefusedError(msg) from error
    return _described(extract(model))


def _of_checkpoint(path: str) -> list[Found]:
    _need("torch", path)
    torch, slots = import_module("torch"), import_module("normkit.torch._slots")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).partition("\n")[0]
        msg = (
            f"{path!r} is damaged, or holds more than tensors, and is not loaded, since that could "
            f"run what is in it: {first} Save model.state_dict() instead."
        )
        raise RefusedError(msg) from error
    layers: dict[str, Arrays] = {}
    for name, t in _state_dict(found, path).items():
        layer, _, part = name.rpartition(".")
        if part in _PARTS and isinstance(t, torch.Tensor):
            layers.setdefault(layer, {})[_PARTS[part]] = slots.array(t)
    kinds = {name: _kind(arrays) for name, arrays in layers.items()}
    return [Found(name, None, kind, layers[name]) for name, kind in kinds.items() if kind]


def _state_dict(found: Any, path: str) -> Mapping[str, Any]:
    """The state dict in a checkpoint, which may have other things beside it."""
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        msg = f"{path!r} has no state dict, but a {type(found).__name__}."
        raise RefusedError(msg)
    return found


def _kind(arrays: Arrays) -> str | None:
    """What has these parts; None if it is no normalization layer. Those alone have flat weights."""
    if "mean" in arrays and "var" in arrays:
        return "BatchNorm or InstanceNorm"
    scale = arrays.get("scale")
    if scale is None or scale.ndim != 1:
        return None
    return "LayerNorm or GroupNorm" if "bias" in arrays else "RMSNorm, or no normalization"


def _need(package: str, path: str) -> None:
    if find_spec(package) is None:
        msg = f"{path!r} is read with {package}, which is not installed."
        raise RefusedError(msg)


def summary(a: Any) -> str:
    """The range of an array."""
    a = np.asarray(a, np.float64)
    return f"{a.min():.3g} to {a.max():.3g}" if a.size else ""
