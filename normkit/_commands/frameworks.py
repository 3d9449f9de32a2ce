"""The frameworks that can be measured, and the process that each of them gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from normkit._commands import RefusedError


@dataclass(frozen=True)
class Framework:
    """A framework, as an adapter runs it.

    Attributes:
        adapter: the package of normkit's whose ``_compared`` module has the layers.
        needs: packages that must be installed.
        modes: the ways to run a layer that ``bench`` compares; ``check`` takes the first.
        dtypes: those of x that it computes in.
        usual: whether ``bench`` runs it unasked.
        environment: variables of its process.
        without: packages that are kept from it.
    """

    adapter: str
    needs: tuple[str, ...]
    modes: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    usual: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def _keras(backend: str, *modes: str, usual: bool = False) -> Framework:
    needs, environment = ("keras", backend), {"KERAS_BACKEND": backend}
    return Framework("keras", needs, modes, usual=usual, environment=environment)


FRAMEWORKS = {
    "numpy": Framework("numpy", ("numpy",), ("plain",), ("float32",), without=("numba",)),
    "numpy-numba": Framework("numpy", ("numpy", "numba"), ("plain",), ("float32",)),
    "torch": Framework("torch", ("torch",), ("eager", "compile")),
    "keras-tensorflow": _keras("tensorflow", "graph", "xla", usual=True),
    "keras-jax": _keras("jax", "jit"),
    "keras-torch": _keras("torch", "eager"),
    "flax-nnx": Framework("flax.nnx", ("jax", "flax"), ("jit",)),
    "flax-linen": Framework("flax.linen", ("jax", "flax"), ("jit",), usual=False),
}


def missing(name: str) -> list[str]:
    """The packages that framework ``name`` needs and that are not installed."""
    return [package for package in FRAMEWORKS[name].needs if find_spec(package) is None]


def named(names: list[str]) -> list[str]:
    """The frameworks that somebody means: by name, or by the part of it before the hyphen.

    Raises:
        RefusedError: there is none of that name.
    """
    found = []
    for name in names:
        meant = [each for each in FRAMEWORKS if name in (each, each.partition("-")[0])]
        if not meant:
            msg = f"no framework is called {name!r}; there are {', '.join(FRAMEWORKS)}."
            raise RefusedError(msg)
        found += meant
    return list(dict.fromkeys(found))


def divided(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Those of ``names`` that are here; for the others, what they lack.

    Raises:
        RefusedError: none is here.
    """
    lacking = {name: missing(name) for name in names}
    here = [name for name, packages in lacking.items() if not packages]
    absent = {name: ", ".join(packages) for name, packages in lacking.items() if packages}
    if not here:
        lines = "; ".join(f"{name}, for lack of {packages}" for name, packages in absent.items())
        msg = f"there is nothing to run: not here are {lines}."
        raise RefusedError(msg)
    return here, absent


def run(name: str, task: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """What a process of framework ``name`` says while it does ``task``, a function of child.py.

    Raises:
        RuntimeError: the process failed; with the end of what it printed.
    """
    framework = FRAMEWORKS[name]
    job = {
        "adapter": framework.adapter,
        "without": framework.without,
        "task": task,
        "arguments": arguments,
    }
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "normkit._commands.child", json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=quiet | dict(os.environ) | framework.environment,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield from map(json.loads, process.stdout)
        except BaseException:
            process.kill()
            raise
        if process.wait():
            said.seek(0)
            msg = f"{name} failed ({process.returncode}):\n{said.read()[-3000:]}"
            raise RuntimeError(msg)
