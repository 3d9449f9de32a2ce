"""Writes docs/drop-ins.md: every option of every native layer, and what becomes of it in normkit.

It is read off the signatures of the installed frameworks::

    python docs/signatures.py
"""

from __future__ import annotations

import importlib
import inspect
import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

PAGE = Path(__file__).with_name("drop-ins.md")


class Framework(NamedTuple):
    """Where a framework has its layers, and which of those normalize but have no twin."""

    title: str
    native: str  # the module with the native layers
    ours: str
    classes: list[str]
    without: dict[str, str]  # name -> why
    new: dict[str, str]  # classes that only normkit has -> what they are


FRAMEWORKS = [
    Framework(
        "PyTorch",
        "torch.nn",
        "normkit.torch",
        [
            *(
                f"{lazy}{kind}{n}d"
                for kind in ("BatchNorm", "InstanceNorm")
                for lazy in ("", "Lazy")
                for n in (1, 2, 3)
            ),
            "LayerNorm",
            "GroupNorm",
            "RMSNorm",
        ],
        {
            "SyncBatchNorm": "its statistics are those of several processes",
            "LocalResponseNorm": "it has no statistics to standardize with",
            "CrossMapLRN2d": "it has no statistics to standardize with",
        },
        {
            "BatchNorm": "`BatchNorm1d`, `2d` and `3d` in one, for any rank",
            "InstanceNorm": "`InstanceNorm1d`, `2d` and `3d` in one, for any rank",
        },
    ),
    Framework(
        "Keras",
        "keras.layers",
        "normkit.keras",
        ["BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"],
        {
            "SpectralNormalization": "it normalizes the weights of another layer",
            "UnitNormalization": "it divides by a norm, and has neither statistics nor weights",
            "Normalization": "its statistics are those of a data set, given before training",
        },
        {
            "InstanceNormalization": "a group for each channel, which may remember statistics",
        },
    ),
    *(
        Framework(
            f"Flax {title}",
            f"flax.{api}",
            f"normkit.flax.{api}",
            ["BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm"],
            {
                "SpectralNorm": "it normalizes the weights of another layer",
                "WeightNorm": "it normalizes the weights of another layer",
            },
            {},
        )
        for api, title in (("nnx", "NNX"), ("linen", "Linen"))
    ),
]

# Options that are taken, but do not do quite what they do natively.
DIFFERENT = {
    "use_fast_variance": "accepted, and of no effect: there is one algorithm, and it is exact",
    "axis_name": "if it is given, Flax' own computation is used, with its own accuracy",
    "axis_index_groups": "as `axis_name`",
    "renorm": "if it is on, Keras' own computation is used",
    "renorm_clipping": "as `renorm`",
    "renorm_momentum": "as `renorm`",
    "synchronized": "if it is on, Keras' own computation is used",
}
# Options whose default is written in another way.
OTHER_DEFAULT = {
    ("RMSNorm", "scale_init"): "None, its default, is ones, or zeros with `zero_centered`",
}
# What a signature has that is no option of a user's.
_INTERNAL = {"self", "kwargs", "parent"}


def options(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's parameters, by name and in order."""
    found = inspect.signature(cls.__init__).parameters
    return {name: p for name, p in found.items() if name not in _INTERNAL}


def call_options(cls: type) -> dict[str, inspect.Parameter]:
    """What a call takes beyond the input."""
    for method in ("forward", "call", "__call__"):
        if method in vars(cls) or any(method in vars(base) for base in cls.__mro__[:-1]):
            found = dict(inspect.signature(getattr(cls, method)).parameters)
            return {n: p for n, p in list(found.items())[2:] if n not in _INTERNAL}
    raise TypeError(cls)


def shown(name: str, p: inspect.Parameter) -> str:
    """An option as it is written, with its default."""
    if p.default is p.empty:
        return f"`{name}`"
    default = p.default
    if callable(default) or hasattr(default, "default_factory"):
        return f"`{name}`"
    text = "{}" if default == {} else getattr(default, "__name__", None) or repr(default)
    return f"`{name}`" if len(text) > 16 else f"`{name}={text}`"


def twins(framework: Framework) -> list[tuple[type, type]]:
    """The native classes, each with normkit's."""
    native, ours = (importlib.import_module(name) for name in (framework.native, framework.ours))
    return [(getattr(native, name), getattr(ours, name)) for name in framework.classes]


def section(framework: Framework) -> list[str]:
    lines = [f"## {framework.title}", ""]
    lines += [f"`{framework.ours}` has the classes of `{framework.native}`, by the same names.", ""]
    lines += ["| class | native options | new options | new in a call |", "|---|---|---|---|"]
    for native, ours in twins(framework):
        taken = [shown(name, p) for name, p in options(native).items()]
        cells = [
            [shown(n, p) for n, p in read(ours).items() if n not in read(native)]
            for read in (options, call_options)
        ]
        columns = [f"`{ours.__name__}`", *(", ".join(cell) for cell in (taken, *cells))]
        lines.append(f"| {' | '.join(columns)} |")
    different = {n for native, _ in twins(framework) for n in options(native)} & DIFFERENT.keys()
    notes = [f"- `{name}`: {DIFFERENT[name]}." for name in DIFFERENT if name in different]
    notes += [
        f"- `{option}` of `{cls}`: {why}."
        for (cls, option), why in OTHER_DEFAULT.items()
        if any(
            cls == native.__name__ and option in options(native) for native, _ in twins(framework)
        )
    ]
    if notes:
        lines += ["", "Taken, but not quite as natively:", "", *notes]
    lines += ["", "Without a twin:", ""]
    lines += [f"- `{framework.native}.{name}`: {why}." for name, why in framework.without.items()]
    if framework.new:
        lines += ["", "Only in normkit:", ""]
        lines += [f"- `{framework.ours}.{name}`: {what}." for name, what in framework.new.items()]
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    lines = [
        "# Every option of the drop-in layers",
        "",
        "Each native normalization layer has a twin in normkit, with all its options, in their",
        "order and with their defaults. This page is made from the signatures of the installed",
        "frameworks by `docs/signatures.py`.",
        "",
    ]
    for framework in FRAMEWORKS:
        lines += section(framework)
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
