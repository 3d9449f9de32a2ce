"""Pictures of what was measured, with matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from normkit._commands import RefusedError


def check(path: str) -> None:
    """Refuse before anything is measured, if there is nothing to draw with, or no place for it."""
    if find_spec("matplotlib") is None:
        msg = "--plot needs matplotlib; install it with: pip install 'normkit[bench]'"
        raise RefusedError(msg)
    if Path(path).suffix not in (".png", ".svg", ".pdf") or not Path(path).parent.is_dir():
        msg = f"--plot takes a file .png, .svg or .pdf in a folder that is there, not {path!r}."
        raise RefusedError(msg)


def bench(cells: list[dict[str, Any]], path: str) -> None:
    """The ratio of each cell, with its quartiles: a panel for each framework."""
    plt = _pyplot()
    kinds = list(dict.fromkeys((c["framework"], c["mode"]) for c in cells))
    rows = list(dict.fromkeys(_label(c) for c in cells))
    size = (2.2 + 2.1 * len(kinds), 1.4 + 0.2 * len(rows))
    figure, panels = plt.subplots(1, len(kinds), sharey=True, squeeze=False, figsize=size)
    for panel, kind in zip(panels[0], kinds, strict=True):
        mine = [c for c in cells if (c["framework"], c["mode"]) == kind]
        for c in mine:
            low, ratio, high = c["ratio"]
            y = rows.index(_label(c))
            color = "tab:blue" if ratio <= 1.05 else "tab:red"
            panel.plot([low, high], [y, y], color=color, lw=3, alpha=0.4, solid_capstyle="butt")
            panel.plot(ratio, y, "o", color=color, ms=4)
        panel.axvline(1, color="0.3", lw=1)
        panel.set(xscale="log", title=f"{kind[0]}\n{kind[1]}", xlim=(0.03, 12))
        panel.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        panel.grid(axis="x", which="both", alpha=0.15)
        panel.grid(axis="y", alpha=0.15)
    panels[0][0].set_yticks(range(len(rows)), rows, fontsize=7)
    panels[0][0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel("time of normkit / time of the native layer (left of 1: faster)", fontsize=9)
    _save(figure, path)


def errors(rows: list[dict[str, Any]], path: str) -> None:
    """The error against the mean of x: a panel for each layer."""
    plt = _pyplot()
    kinds = list(dict.fromkeys((r["layer"], r["work"], r["result"]) for r in rows))
    columns = 4
    lines = -(-len(kinds) // columns)
    figure, panels = plt.subplots(
        lines, columns, sharex=True, sharey=True, squeeze=False, figsize=(11, 0.8 + 2.3 * lines)
    )
    for panel in panels.flat[len(kinds) :]:
        panel.remove()
    names = list(rows[0]["errors"]["normkit"]) if rows else []
    colors = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    for panel, kind in zip(panels.flat, kinds, strict=False):
        mine = [r for r in rows if (r["layer"], r["work"], r["result"]) == kind]
        ticks = range(len(mine))
        for side, style in (("native", "x--"), ("normkit", "o-")):
            for name in names:
                found = [r["errors"][side][name] for r in mine]
                panel.plot(ticks, found, style, color=colors[name], ms=4, lw=1)
        panel.set(yscale="log", title=f"{kind[0]}, {kind[1].removesuffix('+grad')}: {kind[2]}")
        panel.title.set_fontsize(9)
        panel.set_xticks(ticks, [f"{r['offset']:g}" for r in mine])
        panel.tick_params(labelbottom=True, labelsize=8)
        panel.grid(alpha=0.2)
    styles = {"normkit": ("o-", "0.3"), "native layer": ("x--", "0.3")}
    styles |= {name: ("-", color) for name, color in colors.items()}
    handles = [
        plt.Line2D([], [], color=c, marker=s[0].strip("-"), ls=s.lstrip("ox"))
        for s, c in styles.values()
    ]
    figure.legend(handles, styles, loc="lower right", ncols=2, fontsize=8, frameon=False)
    figure.supxlabel("mean of x (its standard deviation is 1)", fontsize=9)
    figure.supylabel("largest error / largest value", fontsize=9)
    _save(figure, path)


def _label(cell: dict[str, Any]) -> str:
    shape = "x".join(map(str, cell["shape"]))
    return f"{cell['layer']} {cell['work']} {shape} {cell['dtype']}"


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: str) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
