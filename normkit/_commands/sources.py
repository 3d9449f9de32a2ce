"""The files that normalization layers are found in: bundles, PyTorch checkpoints, Keras models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
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

CHECKPOINT = (
    "A checkpoint does not say what its layers compute: eps, momentum, groups and axes are those "
    "of the code that made it."
)

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
        if ending != ".safetensors" and _is_safetensors(path):
            return _of_safetensors(path)
        if ending == ".keras":
            return _of_keras(path)
        if ending in (".pt", ".pth", ".bin", ".ckpt"):
            return _of_checkpoint(path)
        if ending == ".safetensors":
            return _of_safetensors(path)
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


def _is_safetensors(path: str) -> bool:
    """By its content: a length of eight bytes, and the beginning of a JSON object."""
    with Path(path).open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < Path(path).stat().st_size


def _of_safetensors(path: str) -> list[Found]:
    try:
        return _described(load(path))
    except ValueError as error:
        if "was not written by" not in str(error):
            raise
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return _of_tensors(shapes, file.get_tensor)
    except SafetensorError as error:
        msg = f"{path!r} is damaged: {error}."
        raise RefusedError(msg) from error


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
    except OSError:
        raise
    except Exception as error:  # PyTorch raises of every kind at a file that is damaged
        msg = (
            f"{path!r} is damaged, or holds more than tensors, and is not loaded, since that could "
            f"run what is in it. Save model.state_dict() instead."
        )
        raise RefusedError(msg) from error
    if not isinstance(found, Mapping):
        msg = f"{path!r} has no state dict, but a {type(found).__name__}."
        raise RefusedError(msg)
    tensors = {n: t for n, t in _flat(found) if isinstance(t, torch.Tensor) and not t.is_meta}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return _of_tensors(shapes, lambda name: slots.array(tensors[name]))


def _of_tensors(shapes: dict[str, tuple[int, ...]], read: Callable[[str], Any]) -> list[Found]:
    """The normalization layers among the tensors of a state dict."""
    layers: dict[str, dict[str, str]] = {}
    for name in shapes:
        layer, _, part = name.rpartition(".")
        if part in _PARTS:
            layers.setdefault(layer, {})[_PARTS[part]] = name
    found = []
    for layer, parts in layers.items():
        kind = _kind({part: shapes[name] for part, name in parts.items()})
        if kind is not None:
            arrays = {part: np.asarray(read(name)) for part, name in parts.items()}
            found.append(Found(layer, None, kind, arrays))
    return found


def _flat(found: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The state dicts in a checkpoint, and what is beside them. Its own prefix is left out."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            usual = not above and name in ("state_dict", "model_state_dict", "model")
            yield from _flat(value, above if usual else f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _kind(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """What has parts of these shapes; None if it is no normalization layer.

    Those alone have flat weights, or weights of the shape that their bias has.
    """
    scale, bias = shapes.get("scale"), shapes.get("bias")
    if "mean" in shapes or "var" in shapes:
        flat = {shape for part, shape in shapes.items() if part != "count"}
        whole = {"mean", "var"} <= shapes.keys() and len(flat) == 1
        return "BatchNorm or InstanceNorm" if whole else None
    if scale is None or not scale or bias not in (None, scale) or (bias is None and len(scale) > 1):
        return None
    return "LayerNorm or GroupNorm" if bias else "RMSNorm, or no normalization"


def _need(package: str, path: str) -> None:
    if find_spec(package) is None:
        msg = f"{path!r} is read with {package}, which is not installed."
        raise RefusedError(msg)


def summary(a: Any) -> str:
    """The range of an array."""
    a = np.asarray(a, np.float64)
    finite = a[np.isfinite(a)]
    broken = f", {a.size - finite.size} not finite" if finite.size < a.size else ""
    return f"{finite.min():.3g} to {finite.max():.3g}{broken}" if finite.size else broken[2:]
