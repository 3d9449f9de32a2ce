"""Load normalization layers that were taken out of a model into a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from normkit._bundle import (
    KINDS,
    Bundle,
    Entry,
    check_bundle,
    differences,
    field_names,
    shown,
)
from normkit._definition import Definition
from normkit._extract import named_entry
from normkit._models import slots_of
from normkit._port import same_values
from normkit._report import Report
from normkit._slot import Slot

Names = str | Mapping[str, str] | Callable[[str], str | None] | None

# The fields that say which parameters there are: they cannot be taken over from another layer.
_FIXED = {
    "num_features", "num_channels", "shape", "scale", "bias", "track_running_stats",
}  # fmt: skip


# Where the channels lie is a matter of the model around, so these are taken over by name only.
_PLACES = {"axis", "axes"}


@dataclass(frozen=True)
class Restored(Report):
    """What was loaded, layer by layer. ``print`` shows it as a table.

    Attributes:
        heads, rows: the table: name in the model, name in the bundle, and what has changed.
        variables: of a Linen module, the new variables; else None.
    """

    variables: Any = None


def restore(
    model: Any,
    bundle: Bundle,
    names: Names = None,
    *,
    adopt: bool | Collection[str] = False,
    keep: Collection[str] = (),
    variables: Any = None,
    inputs: Any = None,
) -> Restored:
    """Load the normalization layers of ``bundle`` into ``model``, in place.

    Every layer of the model takes one of the bundle, and none is left over. All of it is checked
    before anything is changed; if anything fails, nothing is.

    Args:
        model: of any framework, as for ``nk.extract``.
        bundle: from ``nk.extract`` or ``nk.load``.
        names: which layer takes which: None for equal names; ``"order"`` for the order that both
            have them in; or the name in the bundle for each name in the model, as a mapping (a
            layer that it lacks takes the one of its own name) or a function, which may return None
            for a layer that is to be left as it is.
        adopt: what to do where the definitions differ (``eps``, ``decay``, ``correction``, ...),
            so that the layer would not compute the same. If false, that is an error. If true, the
            layer takes over the definition, as far as its framework allows that, but for the axes,
            which are those of the model around it; or name the fields that it may take over. A
            Keras model around ``model`` that was used before has the old ones in its compiled
            functions: ``compile`` it again.
        keep: fields in which the model may differ and stays as it is: ``["axis"]`` where its
            channels lie along another axis than in the model that the bundle is from.
        variables, inputs: of a Linen module, see ``nk.extract``. The new variables are in the
            result; its layers cannot take over anything.

    Returns:
        A report that prints as a table.

    Raises:
        ValueError: names, shapes or definitions do not fit, each one named; or statistics are NaN
            or negative.

    >>> import normkit as nk, normkit.numpy
    >>> trained, fresh = (nk.numpy.layer(nk.BatchNorm(3, eps=eps)) for eps in (1e-3, 1e-5))
    >>> print(nk.restore(fresh, nk.extract(trained), adopt=True))
    | layer    | from     | changed             |
    | -------- | -------- | ------------------- |
    | (itself) | (itself) | eps: 1e-05 to 0.001 |
    """
    check_bundle(bundle, "restore")
    _check_fields("adopt", () if isinstance(adopt, bool) else adopt)
    _check_fields("keep", keep)
    slots = slots_of(model, variables=variables, inputs=inputs)
    pairs = _paired(slots, bundle, names)
    plans, wrong = [], []
    for slot, name in pairs:
        plan = _Plan(slot, named_entry(slot), bundle[name], adopt, keep)
        plans.append((plan, name))
        wrong += [f"{shown(slot.name)}: {line}" for line in plan.wrong()]
    if wrong:
        msg = f"{_lines(wrong)}nothing was changed. {_HINT}"
        raise ValueError(msg)
    changed = _carry_out([plan for plan, _ in plans])
    rows = tuple(
        (shown(p.slot.name), shown(name), what)
        for (p, name), what in zip(plans, changed, strict=True)
    )
    new = slots[0].variables if slots else variables
    return Restored(("layer", "from", "changed"), rows, new)


_HINT = (
    "With adopt=True a layer takes over what it can, but for its axes; with keep=[...] it may "
    "differ in these fields. Sizes, and which parameters there are, must be equal."
)


def _check_fields(argument: str, given: Collection[str]) -> None:
    """Of a field that is misspelt, or fixed, nothing may depend."""
    known = {name for kind in KINDS.values() for name in field_names(kind)} - _FIXED
    if unknown := sorted(set([given] if isinstance(given, str) else given) - known):
        msg = (
            f"{argument} names fields of definitions, any of {', '.join(sorted(known))}, but got "
            f"{', '.join(map(repr, unknown))}."
        )
        raise ValueError(msg)


@dataclass
class _Plan:
    """What a layer is to become."""

    slot: Slot
    before: Entry
    entry: Entry
    adopt: bool | Collection[str]
    keep: Collection[str]

    @property
    def old(self) -> Definition:
        return self.before.definition

    @property
    def new(self) -> Definition:
        """The definition of the bundle, but for the fields that stay."""
        names = field_names(type(self.entry.definition))
        stays = {name: getattr(self.old, name) for name in self.keep if name in names}
        return replace(self.entry.definition, **stays)  # type: ignore[type-var]

    def wrong(self) -> list[str]:
        given = self.entry.definition
        if type(given) is not type(self.old):
            return [
                f"it is a {type(self.old).__name__}, but the bundle has a {type(given).__name__}"
            ]
        found = [
            f"{name} is {mine!r} in the model, but {theirs!r} in the bundle"
            for name, mine, theirs in differences(self.old, self.new)
            if name in _FIXED or not self._may(name)
        ]
        count = {"count"} & self.before.arrays.keys() - self.entry.arrays.keys()
        if count and getattr(self.new, "decay", 0.0) is None:
            found.append("a cumulative average needs a count of batches, and the bundle has none")
        trouble = self.entry.trouble()
        return found if trouble is None else [*found, trouble]

    def _may(self, name: str) -> bool:
        if isinstance(self.adopt, bool):
            return self.adopt and name not in _PLACES
        return name in self.adopt

    def carry_out(self) -> None:
        if self.new != self.old:
            self.slot.configure(self.new)
            if left := differences(self.slot.definition, self.new):
                kind = type(self.slot.layer)
                names = " and ".join(f"{name}={theirs!r}" for name, _, theirs in left)
                msg = (
                    f"{shown(self.slot.name)}: a {kind.__module__.partition('.')[0]} "
                    f"{kind.__name__} cannot take over {names}; nothing was changed. "
                    f"{self.slot.remedy}"
                )
                raise ValueError(msg)
        self.slot.write(self.entry.arrays)

    def undo(self) -> None:
        if self.slot.definition != self.old:
            self.slot.configure(self.old)
        self.slot.write(self.before.arrays)

    def changes(self) -> str:
        """What is not as it was in the model, or in the bundle, now that all is written."""
        found = [f"{name}: {a!r} to {b!r}" for name, a, b in differences(self.old, self.new)]
        written = self.slot.read()
        for name in sorted(written.keys() & self.entry.arrays.keys()):
            got, given = written[name], self.entry.arrays[name]
            if same_values(got, given):
                continue
            with np.errstate(over="ignore"):
                rounded = given.astype(got.dtype)
            if not same_values(got, rounded) or not same_values(np.isinf(got), np.isinf(given)):
                msg = (
                    f"{shown(self.slot.name)}: {name} does not hold what it was given: it shares "
                    f"memory with another layer, or its dtype, {got.dtype}, is too narrow; nothing "
                    f"was changed."
                )
                raise ValueError(msg)
            found.append(f"{name} rounded to {got.dtype}")
        return "; ".join(found)


def _carry_out(plans: list[_Plan]) -> list[str]:
    """What has changed in each layer; nothing, if anything is raised."""
    done = []
    try:
        for plan in plans:
            done.append(plan)
            plan.carry_out()
        return [plan.changes() for plan in plans]
    except BaseException:
        for plan in reversed(done):
            plan.undo()
        raise


def _paired(slots: list[Slot], bundle: Bundle, names: Names) -> list[tuple[Slot, str]]:
    """Each layer of the model, and the name in the bundle of what it takes."""
    if names == "order":
        if len(slots) != len(bundle):
            msg = (
                f"the model has {len(slots)} normalization layers, but the bundle has "
                f"{len(bundle)}; nothing was changed.\nmodel: {_listed(s.name for s in slots)}\n"
                f"bundle: {_listed(bundle)}"
            )
            raise ValueError(msg)
        return list(zip(slots, bundle, strict=True))
    aliases = {alias: name for name, entry in bundle.items() for alias in (name, *entry.aliases)}
    pairs, wrong = [], []
    for slot in slots:
        name = _name(names, slot)
        if name is None:
            continue
        if name in aliases:
            pairs.append((slot, aliases[name]))
        else:
            wrong.append(f"{shown(slot.name)} of the model: the bundle has no {shown(name)!r}")
    taken = {name for _, name in pairs}
    wrong += [
        f"{shown(name)} of the bundle: no layer of the model takes it"
        for name in bundle
        if name not in taken
    ]
    if isinstance(names, Mapping):
        unknown = names.keys() - {name for slot in slots for name in (slot.name, *slot.aliases)}
        wrong += [f"{shown(name)}: the model has no such layer" for name in sorted(unknown)]
    if wrong:
        msg = (
            f"{_lines(wrong)}nothing was changed. Say which is which with names=, a mapping from "
            f'names in the model to names in the bundle, or names="order".\n'
            f"model: {_listed(s.name for s in slots)}\nbundle: {_listed(bundle)}"
        )
        raise ValueError(msg)
    return pairs


def _name(names: Names, slot: Slot) -> str | None:
    if names is None:
        return slot.name
    if isinstance(names, str) or not (isinstance(names, Mapping) or callable(names)):
        msg = f'names is None, "order", a mapping or a function, but got {names!r}.'
        raise ValueError(msg)
    if not isinstance(names, Mapping):
        return names(slot.name)
    own = [name for name in (slot.name, *slot.aliases) if name in names]
    return names[own[0]] if own else slot.name


def _lines(wrong: list[str]) -> str:
    return "".join(f"{line};\n" for line in wrong)


def _listed(names: Any) -> str:
    return ", ".join(shown(name) for name in names) or "none"
