"""The normalization layers of a model, as values of no framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normkit._batch_norm import BatchNorm
from normkit._definition import Definition
from normkit._group_norm import GroupNorm
from normkit._instance_norm import InstanceNorm
from normkit._layer_norm import LayerNorm
from normkit._report import table
from normkit._rms_norm import RMSNorm

Arrays = dict[str, NDArray[Any]]

KINDS: dict[str, type[Definition]] = {
    kind.__name__: kind for kind in (BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm)
}


@dataclass(frozen=True, eq=False)
class Entry:
    """A normalization layer, taken out of its model.

    Attributes:
        definition: what it computes.
        arrays: its parameters and state, as far as it has them: ``scale`` and ``bias``, ``mean``,
            ``var`` and ``count`` (of batches, if the framework counts them).
        training: whether it takes the statistics of its input where it could do otherwise; None if
            each call decides.
        aliases: its other names, if it is in several places of the model.

    Raises:
        ValueError: an array has not the shape that the definition gives it, or does not belong to
            such a layer.
    """

    definition: Definition
    arrays: Arrays
    training: bool | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        d = self.definition
        shapes = {name: d.parameter_shape for name in ("scale", "bias") if getattr(d, name)}
        if getattr(d, "track_running_stats", False):
            shapes |= {"mean": d.parameter_shape, "var": d.parameter_shape}
        if missing := shapes.keys() - self.arrays.keys():
            msg = f"{d} needs {' and '.join(sorted(missing))}, but got {_names(self.arrays)}."
            raise ValueError(msg)
        if "mean" in shapes:
            shapes["count"] = ()
        for name, array in self.arrays.items():
            if name not in shapes:
                msg = f"{d} has no {name!r}."
                raise ValueError(msg)
            if array.shape != shapes[name]:
                msg = f"{name!r} of {d} has shape {shapes[name]}, but got {array.shape}."
                raise ValueError(msg)

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the parameters; float32 if there are none."""
        given = [self.arrays[name].dtype for name in ("scale", "bias") if name in self.arrays]
        return given[0] if given else np.dtype(np.float32)

    def trouble(self) -> str | None:
        """Why nothing can be computed with these statistics; None if all is well."""
        if "var" in self.arrays:
            variance = self.arrays["var"].astype(np.float64)
            if not np.all(variance >= 0):
                wrong = int(np.sum(~(variance >= 0)))
                return f"the running variance of {wrong} channels is negative or NaN"
            if np.isnan(self.arrays["mean"].astype(np.float64)).any():
                return "the running mean is NaN"
        return None


class Bundle(Mapping[str, Entry]):
    """The normalization layers of a model by name, in the order of the model. See ``nk.extract``.

    A mapping from names to entries, each with ``definition``, ``arrays`` (NumPy), ``training`` and
    ``aliases``. ``print`` shows it as a table.

    Args:
        entries: an :class:`Entry` for each name.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<Bundle of {len(self)} normalization layers>"

    def __str__(self) -> str:
        if not self:
            return "no normalization layers"
        rows = [(shown(name), str(entry.definition)) for name, entry in self.items()]
        return table(("layer", "definition"), rows, left=2)


def check_bundle(value: object, call: str) -> None:
    """Refuse what is no bundle: more likely another argument, or a model."""
    if not isinstance(value, Bundle):
        kind = type(value).__name__
        msg = f"{call} takes a bundle, from nk.extract or nk.load, but got a {kind}."
        raise TypeError(msg)


def shown(name: str) -> str:
    """A name as a table has it: that of a model which is a layer itself is empty."""
    escaped = name.encode("unicode_escape").decode() if not name.isprintable() else name
    return escaped.replace("|", "\\|") or "(itself)"


def field_names(kind: type[Definition]) -> list[str]:
    """The arguments that make a definition of that kind."""
    return [f.name for f in fields(kind) if f.init]  # type: ignore[arg-type]


def differences(a: Definition, b: Definition) -> list[tuple[str, Any, Any]]:
    """The fields in which two definitions of a kind differ, with both values."""
    return [
        (name, getattr(a, name), getattr(b, name))
        for name in field_names(type(a))
        if getattr(a, name) != getattr(b, name)
    ]


def to_fields(definition: Definition) -> dict[str, Any]:
    """What makes ``definition``, as values of JSON."""
    names = field_names(type(definition))
    return {"kind": type(definition).__name__} | {n: _plain(getattr(definition, n)) for n in names}


def from_fields(found: Mapping[str, Any]) -> Definition:
    """The definition that :func:`to_fields` was given.

    Raises:
        TypeError, ValueError: there is none with these fields.
    """
    given = dict(found)
    kind = KINDS.get(str(given.pop("kind", None)))
    if kind is None:
        msg = f"there is no layer {found.get('kind')!r}; normkit has {_names(KINDS)}."
        raise ValueError(msg)
    known = field_names(kind)
    if surplus := given.keys() ^ set(known):
        msg = (
            f"{kind.__name__} has the fields {_names(known)}, but not right are {_names(surplus)}."
        )
        raise ValueError(msg)
    types = {f.name: str(f.type).split(" | ") for f in fields(kind)}  # type: ignore[arg-type]
    for name, value in given.items():
        if not any(_TYPES[each](value) for each in types[name]):
            msg = f"{name} of a {kind.__name__} is {value!r}."
            raise ValueError(msg)
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# How the fields of definitions are annotated, and what of JSON is such a value.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "None": lambda value: value is None,
    "bool": lambda value: isinstance(value, bool),
    "int": _is_integer,
    "float": lambda value: isinstance(value, float) or _is_integer(value),
    "tuple[int, ...]": lambda value: isinstance(value, list) and all(map(_is_integer, value)),
}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def _names(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "nothing"
