"""``python -m normkit inspect FILE``: its normalization layers, and what will bite on a port."""

from __future__ import annotations

import argparse

import numpy as np

from normkit._bundle import field_names, shown
from normkit._commands import sources
from normkit._definition import Definition
from normkit._report import table

# Fields that are no habit of a framework: what the layer is for, and where the channels are.
_ITS_OWN = {
    "num_features", "num_channels", "num_groups", "shape", "axis", "axes", "scale", "bias",
}  # fmt: skip
_FRAMEWORKS = ("torch", "keras", "flax")
_FAR = 1e3  # |mean| / deviation
_MANY = 5  # names in a line


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", help="a bundle (.safetensors), a checkpoint of PyTorch, or a .keras model"
    )


def main(options: argparse.Namespace) -> int:
    layers = sources.read(options.file)
    if not layers:
        print("no normalization layers")
        return 0
    rows = []
    notes: dict[str, list[str]] = {}
    for layer in layers:
        statistics = [sources.summary(layer.arrays.get(n, ())) for n in ("mean", "var")]
        scale = sources.summary(layer.arrays.get("scale", ()))
        rows.append([shown(layer.name), str(layer.definition or layer.kind), *statistics, scale])
        for note in notices(layer):
            notes.setdefault(note, []).append(shown(layer.name))
    print(table(["layer", "definition", "mean", "variance", "scale"], rows, left=2))
    if any(layer.definition is None for layer in layers):
        print(f"\n{sources.CHECKPOINT}")
    if notes:
        print("\nWhat will bite on a port:")
    for note, names in notes.items():
        print(f"- {note}: {_listed(names)}")
    return 0


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return ", ".join(names[:_MANY]) + rest


def notices(layer: sources.Found) -> list[str]:
    """What is unlike elsewhere, or wrong, with ``layer``."""
    found = [] if layer.definition is None else _habits(layer.definition)
    if "var" not in layer.arrays:
        return found
    mean, var = (layer.arrays[name].astype(np.float64) for name in ("mean", "var"))
    broken = ~(var >= 0) | np.isnan(mean)
    if broken.any():
        note = f"{broken.sum()} of {var.size} channels have statistics that are NaN or negative"
        return [*found, note]
    if np.all(mean == 0) and np.all(var == 1):
        found.append("it has never seen a batch: its statistics are those that it began with")
    eps = getattr(layer.definition, "eps", None) or 1e-5  # PyTorch's, of a checkpoint
    if small := np.sum(var < eps):
        found.append(
            f"{small} of {var.size} channels vary less than eps, which decides their scale"
        )
    if far := np.sum(np.abs(mean) > _FAR * np.sqrt(var + eps)):
        found.append(
            f"{far} of {var.size} channels have a mean over {_FAR:g} times their spread, which "
            f"costs native layers their digits"
        )
    return found


def _habits(definition: Definition) -> list[str]:
    """The frameworks whose own layer would compute something else, and in what."""
    kind = type(definition)
    size = [getattr(definition, name) for name in field_names(kind) if name in _SIZES]
    found = []
    for framework in _FRAMEWORKS:
        usual = getattr(kind, framework)(*size)
        unlike = [
            f"{name} {getattr(usual, name)!r}, here {getattr(definition, name)!r}"
            for name in field_names(kind)
            if name not in _ITS_OWN and getattr(usual, name) != getattr(definition, name)
        ]
        if unlike:
            found.append(f"a layer of {framework} has by default {'; '.join(unlike)}")
    return found


_SIZES = {"num_features", "num_groups", "num_channels", "shape"}
