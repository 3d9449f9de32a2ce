"""Normalization layers in a file: safetensors, with the definitions as its metadata.

The tensors are called ``<layer>.<array>``. The metadata have three entries: ``format`` is
``normkit``, ``version`` the version of this layout, and ``layers`` a JSON list with ``name``,
``definition``, ``training``, ``aliases`` and ``arrays`` of each layer.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

import numpy as np

from normkit._bundle import Bundle, Entry, check_bundle, from_fields, to_fields
from normkit._extras import bfloat16, require

_FORMAT, _VERSION = "normkit", "1"
_FIELDS = ("name", "definition", "training", "aliases", "arrays")  # of a layer
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32"}


def save(path: str | os.PathLike[str], bundle: Bundle) -> None:
    """Write ``bundle`` to a file of safetensors, which is read without any framework.

    The file is there as a whole or not at all: one that was there before is replaced at the end.

    Args:
        path: of the file.
        bundle: from ``nk.extract``.

    Raises:
        ImportError: the package ``safetensors`` is not installed.
        OSError: the file cannot be written.

    Source of the format: https://huggingface.co/docs/safetensors.
    """
    require("safetensors", "normkit.save", "files")
    check_bundle(bundle, "save")
    from safetensors.numpy import save as serialized

    tensors: dict[str, Any] = {}
    layers = []
    for name, entry in bundle.items():
        tensors |= {f"{name}.{n}": np.array(a, order="C") for n, a in entry.arrays.items()}
        definition, arrays = to_fields(entry.definition), sorted(entry.arrays)
        values = name, definition, entry.training, list(entry.aliases), arrays
        layers.append(dict(zip(_FIELDS, values, strict=True)))
    metadata = {"format": _FORMAT, "version": _VERSION, "layers": json.dumps(layers)}
    _replace(path, serialized(tensors, metadata))


def load(path: str | os.PathLike[str]) -> Bundle:
    """The bundle that :func:`save` wrote.

    Nothing in the file is run or trusted: it holds numbers and JSON, and all of it is checked.

    Args:
        path: of the file.

    Raises:
        ImportError: the package ``safetensors`` is not installed.
        OSError: the file cannot be read.
        ValueError: it is damaged, of another kind, or of a later version of normkit.
    """
    require("safetensors", "normkit.load", "files")
    data = Path(path).read_bytes()
    try:
        layers = _layers(_metadata(data))
        tensors = _tensors(data)
        bundle = _bundle(layers, tensors)
    except _Refused as error:
        msg = f"{os.fspath(path)!r} {error}"
        raise ValueError(msg) from error.__cause__
    return bundle


class _Refused(Exception):
    """What is wrong with a file."""


def _metadata(data: bytes) -> dict[str, Any]:
    # The header of safetensors is a length of eight bytes and JSON.
    length = int.from_bytes(data[:8], "little")
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
    except (ValueError, AttributeError, RecursionError) as error:
        msg = "is no file of safetensors, or it is damaged."
        raise _Refused(msg) from error
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        msg = "has no definitions of normalization layers: it was not written by normkit.save."
        raise _Refused(msg)
    if metadata.get("version") != _VERSION:
        msg = (
            f"has version {metadata.get('version')!r}, but this normkit reads {_VERSION!r}; "
            f"a later one may read it."
        )
        raise _Refused(msg)
    return metadata


def _layers(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        layers = json.loads(metadata["layers"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        msg = "is damaged: it does not say which layers it has."
        raise _Refused(msg) from error
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        msg = "is damaged: it has no list of layers."
        raise _Refused(msg)
    return layers


def _tensors(data: bytes) -> dict[str, Any]:
    from safetensors import SafetensorError, deserialize

    try:
        found = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        msg = f"is damaged: {error}."
        raise _Refused(msg) from error
    tensors = {}
    for name, tensor in found:
        dtype = bfloat16() if tensor["dtype"] == "BF16" else _DTYPES.get(tensor["dtype"])
        if dtype is None:
            msg = f"has a tensor {name!r} of dtype {tensor['dtype']}, which no layer has."
            raise _Refused(msg)
        tensors[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"]).copy()
    return tensors


def _bundle(layers: list[dict[str, Any]], tensors: dict[str, Any]) -> Bundle:
    entries: dict[str, Entry] = {}
    for layer in layers:
        fields: list[Any] = [layer.get(field) for field in _FIELDS]
        name, definition, training, aliases, arrays = fields
        well = (
            isinstance(name, str)
            and _are_strings(aliases)
            and _are_strings(arrays)
            and (training is None or isinstance(training, bool))
            and isinstance(definition, dict)
        )
        if not well or name in entries:
            msg = "is damaged: a layer is not described as it has to be."
            raise _Refused(msg)
        try:
            own = {n: tensors.pop(f"{name}.{n}") for n in arrays}
            entries[name] = Entry(from_fields(definition), own, training, tuple(aliases))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            msg = f"is damaged, or of another kind, at the layer {name!r}: {error}"
            raise _Refused(msg) from error
    if tensors:
        msg = f"has tensors that belong to no layer: {', '.join(sorted(tensors)[:5])}."
        raise _Refused(msg)
    return Bundle(entries)


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` where it does not show before it is complete."""
    target = Path(os.path.realpath(path))  # a link stays one
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            if target.exists():
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
