"""Figures for print: each readable in grey, and by readers who do not tell colours apart.

Lines differ in dash and marker, bars in hatching, classes by their names; colours are Okabe and Ito's on top of that.
Matplotlib is imported where something is drawn, since it takes a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbd_dist.reporting.figures import CLASS_COLOURS, Histogram
from dbd_dist.reporting.wording import printable

_LOOKS: tuple[dict[str, Any], ...] = tuple(
    {"color": colour, "linestyle": dash, "marker": marker, "fillstyle": fill}
    for fill, colour, dash, marker in (
        ("full", "#000000", "-", "o"), ("full", "#0072b2", (0, (5, 2)), "s"), ("full", "#d55e00", (0, (1, 1)), "^"),
        ("full", "#009e73", (0, (5, 1, 1, 1)), "D"), ("full", "#cc79a7", (0, (8, 2)), "v"),
        ("full", "#56b4e9", "-", "P"), ("full", "#e69f00", (0, (3, 1, 1, 1, 1, 1)), "X"),
        ("full", "#7f7f7f", (0, (2, 2)), "*"), ("none", "#000000", (0, (5, 2)), "o"), ("none", "#0072b2", "-", "s"),
        ("none", "#d55e00", (0, (8, 2)), "^"), ("none", "#009e73", (0, (1, 1)), "D"),
        ("none", "#cc79a7", (0, (5, 1, 1, 1)), "v"), ("none", "#56b4e9", (0, (2, 2)), "P"),
        ("none", "#e69f00", "-", "X"), ("none", "#7f7f7f", (0, (3, 1, 1, 1, 1, 1)), "*"),
    )
)  # fmt: skip
"""No two have the same marker and filling, nor the same marker and dash."""
_FILLS = (
    ("#404040", ""), ("#ffffff", "////"), ("#b0b0b0", ""), ("#ffffff", "...."), ("#7fb2d9", "\\\\\\\\"),
    ("#ffffff", "xxxx"), ("#f0d080", "----"), ("#d0d0d0", "oo"), ("#ffffff", "||||"), ("#8c8c8c", "////"),
    ("#ffffff", ""), ("#ffffff", "++++"), ("#8c8c8c", "...."), ("#ffffff", "----"), ("#8c8c8c", "xxxx"),
    ("#ffffff", "**"), ("#ffffff", "\\\\\\\\"), ("#8c8c8c", "||||"), ("#ffffff", "oo"), ("#f0d080", "**"),
)  # fmt: skip
"""No two have the same hatching and a grey that print does not keep apart."""
AMONG_LINES = 3
"""Entries of a legend that hides no line."""
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dbd",  # the same ids for the same figure
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d8d8d8",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "text.parse_math": False,  # a "$" in a name is a dollar sign
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "savefig.dpi": 200,
}


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures look as they do here, whatever the reader's own settings are. For drawing and saving."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def _figure(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.asarray(figure.subplots(rows, columns, squeeze=False, **options))


def _legend(figure: Any, ax: Any, place: str) -> None:
    """Among the lines where it is small, else above them."""
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) <= AMONG_LINES:
        ax.legend(loc=place, fontsize=7.5)
        return
    rows = -(-len(handles) // 3)
    figure.set_figheight(figure.get_figheight() + 0.17 * rows)
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=7.5)


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Samples in the plane."""

    title: str
    points: np.ndarray
    """float (n, 2)."""
    labels: np.ndarray
    """int (n,): as given."""
    poisoned: np.ndarray
    """bool (n,)."""
    class_names: Sequence[str]


def clouds(parts: Sequence[Cloud]) -> Any:
    """t-SNE of one kind of features beside another: poisoned samples in black, classes named where they lie."""
    from matplotlib import patheffects

    figure, axes = _figure(3.5 * len(parts), 3.7, columns=len(parts))
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    for part, ax in zip(parts, axes[0], strict=True):
        for label in np.unique(part.labels[~part.poisoned]):
            of = ~part.poisoned & (part.labels == label)
            colour = CLASS_COLOURS[int(label) % len(CLASS_COLOURS)]
            ax.plot(*part.points[of].T, "o", markersize=3, color=colour, markeredgewidth=0, alpha=0.45)
        bad = part.points[part.poisoned]
        ax.plot(*bad.T, "x", markersize=4.5, markeredgewidth=2.4, color="white")
        ax.plot(*bad.T, "x", markersize=4.5, markeredgewidth=1.2, color="black", label="poisoned")
        for label in np.unique(part.labels[~part.poisoned]):
            of = ~part.poisoned & (part.labels == label)
            x, y = np.median(part.points[of], axis=0)
            name = printable(part.class_names[int(label)], 14)
            ax.text(x, y, name, ha="center", va="center", fontsize=8, weight="bold", path_effects=halo)
        ax.set(title=part.title, xticks=[], yticks=[])
        ax.set_aspect("equal", adjustable="datalim")
        ax.grid(visible=False)
        for spine in ax.spines.values():
            spine.set(visible=True, color="#b0b0b0")
    if any(part.poisoned.any() for part in parts):
        axes[0][0].legend(loc="lower left", handlelength=1, borderpad=0.2)
    return figure


def histograms(parts: Sequence[tuple[str, Histogram]]) -> Any:
    """Losses right after the warm-up: clean filled, poisoned hatched, the filter's threshold dotted."""
    figure, axes = _figure(3.5 * len(parts), 2.6, columns=len(parts))
    for (title, bins), ax in zip(parts, axes[0], strict=True):
        apart = bins.poisoned is not None
        ax.stairs(bins.clean, bins.edges, fill=True, color="#b9d4ea", edgecolor="#0067a5", linewidth=0.8,
                  label="clean" if apart else "all images")  # fmt: skip
        top = float(bins.clean.max())
        if bins.poisoned is not None:
            ax.stairs(bins.poisoned, bins.edges, fill=True, facecolor="none", edgecolor="black", hatch="/////",
                      linewidth=1.1, label="poisoned")  # fmt: skip
            top = max(top, float(bins.poisoned.max()))
        ax.axvline(bins.threshold, color="black", linewidth=1.2, linestyle=(0, (1, 1.5)), label="kept to the left")
        ax.set(title=title, xlabel="loss of the given label", ylim=(0, 1.25 * top))
        ax.set_ylabel("% of its kind" if apart else "% of images")
        ax.grid(axis="x", visible=False)
        ax.legend(loc="upper center", ncols=3, fontsize=7, handlelength=1.6, columnspacing=1.0)
    return figure


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How well one ranking finds poisoned samples."""

    title: str
    fpr: np.ndarray
    tpr: np.ndarray
    counts: np.ndarray
    """int: numbers of most suspect samples of the target class."""
    precision: np.ndarray
    """Share of poisoned samples among them."""
    poisoned: int
    """All poisoned samples."""


def detection(rankings: Sequence[Ranking]) -> Any:
    """ROC of every ranking, and the share of poisoned samples among its most suspect ones."""
    figure, axes = _figure(7.2, 3.1, columns=2)
    roc, found = axes[0]
    for one, look in zip(rankings, itertools.cycle(_LOOKS)):
        every = max(len(one.fpr) // 8, 1)
        roc.plot(one.fpr, one.tpr, **look, markersize=4, markevery=every, linewidth=1.3, label=one.title)
        every = max(len(one.counts) // 8, 1)
        found.plot(one.counts, 100 * one.precision, **look, markersize=4, markevery=every, linewidth=1.3)
    roc.plot([0, 1], [0, 1], color="#909090", linewidth=0.8)
    roc.set(xlabel="clean samples flagged (FPR)", ylabel="poisoned samples flagged (TPR)", title="ROC of the split",
            xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))  # fmt: skip
    _legend(figure, roc, "lower right")
    total = {one.poisoned for one in rankings}
    for count in total:
        found.axvline(count, color="#909090", linewidth=0.8, linestyle=(0, (1, 1.5)))
    found.set(xlabel="most suspect samples of the target class", ylabel="% of them poisoned", ylim=(-2, 104),
              title="Detection; dotted: all poisoned" if len(total) == 1 else "Detection")  # fmt: skip
    return figure


def gallery(columns: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Any:
    """A test image, the same with the trigger, and the amplified difference, a column an attack.

    Args:
        columns: title, image and triggered image, uint8 (H, W, 3).
    """
    figure, axes = _figure(1.25 * len(columns) + 0.5, 4.3, columns=len(columns), rows=3)
    for number, (title, before, after) in enumerate(columns):
        difference = np.abs(after.astype(np.int16) - before).astype(np.float64)
        factor = 255 / max(1.0, float(difference.max()))
        shown = (before, after, np.round(difference * factor).astype(np.uint8))
        for row, image in enumerate(shown):
            ax = axes[row][number]
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            for spine in ax.spines.values():
                spine.set(visible=True, color="#b0b0b0")
        axes[0][number].set_title(printable(title, 20), fontsize=8)
        axes[2][number].set_xlabel(f"x {factor:.3g}", fontsize=8)
    for row, name in enumerate(("clean", "triggered", "difference")):
        axes[row][0].set_ylabel(name)
    return figure


Curves = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]
"""Method -> epochs and percent of each of its runs."""


def epochs(accuracy: Curves, asr: Curves) -> Any:
    """Clean accuracy and attack success over the epochs of each method's last stage, a line a run."""
    figure, axes = _figure(7.2, 3.0, columns=2, sharey=True)
    looks = dict(zip(dict.fromkeys([*accuracy, *asr]), itertools.cycle(_LOOKS)))
    for ax, title, found in zip(axes[0], ("clean accuracy (BA)", "attack success (ASR)"), (accuracy, asr)):
        for method, lines in found.items():
            for number, (x, y) in enumerate(lines):
                every = max(len(x) // 8, 1)
                ax.plot(x, y, **looks[method], markersize=4, markevery=every, linewidth=1.3,
                        label="_" if number else printable(method, 40))  # fmt: skip
        ax.set(title=title, xlabel="epoch of the last stage", ylim=(-3, 103))
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("%")
    _legend(figure, axes[0][0], "best")
    return figure


def costs(rows: Mapping[str, Mapping[str, float]]) -> Any:
    """Seconds of every stage as stacked bars.

    Args:
        rows: method -> stage's title -> seconds.
    """
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row))
    fills = dict(zip(stages, itertools.cycle(_FILLS)))
    figure, ((ax,),) = _figure(7.2, 0.9 + 0.34 * len(rows) + 0.2 * ((len(stages) + 2) // 3))
    for place, row in enumerate(rows.values()):
        left = 0.0
        for stage, seconds in row.items():
            colour, hatch = fills[stage]
            ax.barh(
                place, seconds, left=left, height=0.7, facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.7
            )
            left += seconds
        ax.text(left, place, f" {left:,.0f} s", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [printable(name, 40) for name in rows])
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("seconds of training, mean over runs")
    handles = [_patch(*fills[stage], printable(stage, 40)) for stage in stages]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=7.5, handlelength=2)
    return figure


def _patch(colour: str, hatch: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.7, label=label)
