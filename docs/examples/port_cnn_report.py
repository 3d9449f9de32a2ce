"""What ``port_cnn.py`` shows: the table and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from digits_report import MUTED, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from port_cnn import Results

WAYS = {"native": "native layers, weights copied", "normkit": "ported with normkit"}
ROUNDING = float(np.finfo("float32").eps)
# What the two panels show: the attribute of Distances, the title and what it is relative to.
PANELS = {
    "scores": ("Scores of the test images", "largest difference, by the largest score"),
    "var": ("Running variances", "largest relative difference"),
}


def table(results: Results) -> str:
    """The distances from Keras, step by step."""
    found = results.distances
    wide = 20 * len(PANELS)

    def row(first: str, cells: list[str], width: int) -> str:
        return f"{first:<6}" + "".join(f"{cell:>{width}}" for cell in cells)

    rule = "-" * (6 + 2 * wide)
    lines = [
        f"Before the port, {results.accuracy:.1%} of the test images are right.\n",
        "Distances from the network in Keras:",
        row("", [WAYS[way] for way in WAYS], wide),
        row("", ["scores", "running variance"] * len(WAYS), 20),
        row("step", [name for _, name in found] * len(PANELS), 10),
        rule,
    ]
    for step in range(len(next(iter(found.values())).scores)):
        cells = [
            f"{getattr(distances, panel)[step]:.0e}"
            for way in WAYS
            for panel in PANELS
            for distances in (d for (by, _), d in found.items() if by == way)
        ]
        lines.append(row(str(step), cells, 10))
    lines += [rule, f"Of {results.images} test images, not predicted as in Keras:"]
    for (way, name), distances in found.items():
        first, last = distances.unlike[0], distances.unlike[-1]
        title = f"{name}, {WAYS[way]}"
        lines.append(f"  {title:<40}{first:>3} after the port, {last:>2} after the steps")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Save the picture at ``path``: the distances by step, on a logarithmic scale."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 5.4), sharey=True)
    for axes, (attribute, (title, unit)) in zip(panels, PANELS.items(), strict=True):
        curves(axes, results, attribute)
        axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=26)
        axes.annotate(unit, (0, 1.025), xycoords="axes fraction", color=MUTED)
        axes.set_xlabel("training steps after the port")
    panels[0].legend(loc=(0.22, 0.42), frameon=False, handlelength=3.5)
    panels[0].set_ylabel("distance from the network in Keras")
    figure.suptitle(
        "A network trained in Keras goes on training elsewhere", x=0.075, ha="left", fontsize=17
    )
    figure.subplots_adjust(left=0.075, right=0.985, top=0.78, bottom=0.11, wspace=0.07)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(axes: Axes, results: Results, attribute: str) -> None:
    """A line for each port: dashed with native layers, solid with normkit's."""
    last = 0
    for (way, name), distances in results.distances.items():
        # Where nothing differs, as in the variances right after the port, there is no logarithm.
        y = np.array([value or np.nan for value in getattr(distances, attribute)])
        last = len(y) - 1
        color = STYLES[name]["color"]
        style = {"linestyle": "--", "dash_capstyle": "round"} if way == "native" else {}
        # The lines of PyTorch are wider, so that they still show where those of Flax cover them.
        width = 3.6 if name == "PyTorch" else 1.6
        style |= {"marker": "o", "markersize": width + 2.4, "label": f"{name}, {WAYS[way]}"}
        axes.plot(y, color=color, linewidth=width, **style)
    axes.set_yscale("log")
    axes.set_ylim(2e-8, 3)
    axes.minorticks_off()
    axes.set_yticks([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])
    axes.set_xlim(-0.3, last + 0.3)
    axes.grid(axis="y", color="#EEEEEE")
    axes.axhline(ROUNDING, color=MUTED, linewidth=1, linestyle=":")
    note = {"color": MUTED, "fontsize": 10, "va": "top"}
    axes.annotate("a float32's last digit", (last + 0.2, ROUNDING * 0.85), ha="right", **note)
    if attribute == "var":
        axes.annotate("0: all equal,\nbit by bit", (-0.2, ROUNDING * 0.85), ha="left", **note)
