"""What ``digits.py`` shows: the table and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

if TYPE_CHECKING:
    from digits import Results, Trio
    from matplotlib.axes import Axes

# The lines are of falling width, so that those below still show where the curves coincide.
STYLES = {
    "PyTorch": {"color": "#E4572E", "linewidth": 6, "solid_capstyle": "round"},
    "Keras": {"color": "#E8A317", "linewidth": 3.2, "solid_capstyle": "round"},
    "Flax": {"color": "#23395B", "linewidth": 1.3},
}
INK, MUTED, APART = "#222222", "#777777", "#8A3FFC"
plt.switch_backend("Agg")
plt.rcParams.update(
    {
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": "#BBBBBB",
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def table(results: Results) -> str:
    """How far the frameworks are apart, with native layers and with normkit's."""
    trios = results.native, results.normkit

    def row(title: str, cells: list[str]) -> str:
        return f"{title:<40}" + "".join(f"{cell:>16}" for cell in cells)

    def apart(title: str, values: list[np.ndarray], axis: int) -> str:
        return row(title, [f"{np.ptp(value, axis=axis).max():.1e}" for value in values])

    unlike = [(t.predictions() != t.predictions()[0]).any(0).sum() for t in trios]
    right = [accuracies(t, results) for t in trios]
    rule = "-" * 72
    lines = [
        row("Largest difference between frameworks", ["native", "normkit"]),
        rule,
        apart("training loss, in any step", [t.losses for t in trios], 1),
        apart("test loss, in any evaluation", [t.test_losses for t in trios], 1),
        apart("running mean, after training", [t.running("mean") for t in trios], 0),
        apart("running variance, after training", [t.running("var") for t in trios], 0),
        row("test accuracy, after training", [f"{np.ptp(r):.1%}" for r in right]),
        row("test images not predicted alike", [f"{u} of {len(results.labels)}" for u in unlike]),
        rule,
    ]
    for i, name in enumerate(STYLES):
        lines.append(row(f"test accuracy in {name}", [f"{r[i]:.1%}" for r in right]))
    return "\n".join(lines)


def moved(results: Results) -> str:
    """Whether the networks that took over the state trained in PyTorch predict the same."""
    here = results.normkit.scores[0]
    lines = ["The state trained in PyTorch, moved into new networks:"]
    for name, there in results.moved.items():
        alike = (there.argmax(-1) == here.argmax(-1)).sum()
        worst = abs(there - here).max()
        lines.append(
            f"  {name:<6} predicts {alike} of {len(here)} test images alike; "
            f"largest difference in a score {worst:.1e}"
        )
    return "\n".join(lines)


def accuracies(trio: Trio, results: Results) -> np.ndarray:
    """The share of test images that each framework's network gets right after training."""
    return (trio.predictions() == results.labels).mean(-1)


def draw(results: Results, path: Path) -> Path:
    """Save the picture at ``path``: the test losses, and how far they are apart."""
    figure, axes = plt.subplots(
        2, 2, figsize=(12, 8), sharex=True, sharey="row", height_ratios=(3, 2)
    )
    titles = "Each framework's own layers", "The same network with normkit's layers"
    reasons = "their defaults: eps, momentum and variance differ", "one definition for all three"
    trios = results.native, results.normkit
    for column, (title, trio) in enumerate(zip(titles, trios, strict=True)):
        curves(axes[0, column], trio)
        axes[0, column].set_title(title, loc="left", fontsize=14, fontweight="bold", pad=26)
        place = {"xycoords": "axes fraction", "color": MUTED}
        axes[0, column].annotate(reasons[column], (0, 1.025), **place)
        differences(axes[1, column], trio)
    axes[0, 0].set_ylim(0, None)
    for column, trio in enumerate(trios):
        label(axes[0, column], trio, accuracies(trio, results))
    axes[0, 0].set_ylabel("test loss")
    axes[1, 0].set_ylabel("largest difference\nbetween the three")
    figure.suptitle(
        "One network, three frameworks: same weights, same batches, same steps",
        x=0.085,
        ha="left",
        fontsize=17,
    )
    figure.subplots_adjust(left=0.085, right=0.865, top=0.85, bottom=0.08, wspace=0.4, hspace=0.16)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def curves(axes: Axes, trio: Trio) -> None:
    """The three test losses, the widest line first."""
    for style, loss in zip(STYLES.values(), trio.test_losses.T, strict=True):
        axes.plot(trio.evaluated, loss, **style)
    axes.set_xlim(0, trio.evaluated[-1])
    axes.grid(axis="y", color="#EEEEEE")


def label(axes: Axes, trio: Trio, right: np.ndarray) -> None:
    """Name the curves at their ends, in the order of the ends and a line apart at least."""
    ends, height = trio.test_losses[-1], 0.0
    for i in np.argsort(ends, kind="stable"):
        name, style = list(STYLES.items())[i]
        height = max(ends[i] / axes.get_ylim()[1] - 0.02, height)
        text = f"{name} {right[i]:.1%}"
        place = {"xycoords": "axes fraction", "annotation_clip": False}
        axes.annotate(text, (1.02, height), color=style["color"], fontweight="bold", **place)
        height += 0.065
    axes.annotate("final test accuracy:", (1.02, height + 0.01), color=MUTED, fontsize=10, **place)


def differences(axes: Axes, trio: Trio) -> None:
    """How far the largest of the three is from the smallest, on a logarithmic scale."""
    steps, apart = trio.evaluated, np.ptp(trio.test_losses, axis=1)
    axes.set_yscale("log")
    axes.set_ylim(1e-9, 100)
    axes.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1])
    axes.grid(axis="y", color="#EEEEEE")
    axes.fill_between(steps, apart, 1e-9, color=APART, alpha=0.15, linewidth=0)
    axes.plot(steps, apart, color=APART, linewidth=2)
    axes.set_xlabel("training step")
    worst = np.format_float_positional(apart.max(), 2, fractional=False, trim="-")
    axes.annotate(
        f"at most {worst}",
        (0.5, apart.max()),
        xycoords=("axes fraction", "data"),
        xytext=(0, 9),
        textcoords="offset points",
        color=APART,
        fontweight="bold",
        ha="center",
    )
