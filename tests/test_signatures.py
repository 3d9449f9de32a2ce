"""Each native layer has its twin, with every option that it has; and the documents say so."""

from __future__ import annotations

import importlib
import inspect
import runpy
from pathlib import Path

import pytest

from harness import backends

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "signatures.py"))
FRAMEWORKS = [
    f
    for f in SCRIPT["FRAMEWORKS"]
    if any(name.startswith(f.native.split(".")[0]) for name in backends.chosen())
]
PAIRS = [pair for framework in FRAMEWORKS for pair in SCRIPT["twins"](framework)]
pairs = pytest.mark.parametrize(
    ("native", "ours"), PAIRS, ids=[f"{ours.__module__}.{ours.__name__}" for _, ours in PAIRS]
)


def default(p: inspect.Parameter):
    """To compare: initializers and factories are functions that are made anew each time."""
    plain = isinstance(p.default, int | float | str | type | tuple | list | None)
    return p.default if plain else type(p.default)


@pairs
def test_every_option_is_there(native, ours):
    has, wanted = SCRIPT["options"](ours), SCRIPT["options"](native)
    assert wanted
    for name, p in wanted.items():
        assert name in has, f"{ours} lacks {name}"
        other = (native.__name__, name) in SCRIPT["OTHER_DEFAULT"]
        assert (default(has[name]) != default(p)) == other, name
        assert has[name].kind == p.kind, name
    # Those that may be given by position stand at the same one.
    by_position = [
        [name for name, p in found.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
        for found in (has, wanted)
    ]
    assert by_position[0] == by_position[1]


@pairs
def test_every_argument_of_a_call_is_there(native, ours):
    has, wanted = SCRIPT["call_options"](ours), SCRIPT["call_options"](native)
    assert wanted.keys() <= has.keys()
    assert "mask" in has


@pairs
def test_it_is_one_of_the_native_kind(native, ours):
    assert issubclass(ours, native)
    assert ours.__doc__
    assert ours.__name__ == native.__name__


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.title)
def test_no_native_layer_is_missing(framework):
    native = importlib.import_module(framework.native)
    found = {
        name
        for name, cls in vars(native).items()
        if isinstance(cls, type) and ("Norm" in name or "LRN" in name) and not name.startswith("_")
    }
    assert found == set(framework.classes) | set(framework.without)


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.title)
def test_no_class_of_normkit_is_missing(framework):
    ours = importlib.import_module(framework.ours)
    found = {name for name in ours.__all__ if isinstance(getattr(ours, name), type)}
    assert found == set(framework.classes) | set(framework.new)


def test_the_page_is_up_to_date():
    if len(FRAMEWORKS) == len(SCRIPT["FRAMEWORKS"]):
        assert SCRIPT["PAGE"].read_text() == SCRIPT["page"](), "run: python docs/signatures.py"
