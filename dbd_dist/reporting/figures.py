"""Figures as SVG elements inside the page: they take its colours and its font, so that they suit light and dark.

Matplotlib draws with placeholder colours that no palette has; they are replaced by the page's CSS variables afterwards.
It is imported where something is drawn, since it takes a second.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from dbd_dist.reporting.wording import printable

CLASS_COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#b8a800", "#8c564b", "#7f7f7f", "#7a4fbf", "#17a5a5",
)  # fmt: skip
"""Of given labels, in class order (Okabe and Ito's, and more where those run out); readable on white and on black."""

_PLACEHOLDERS = {
    "ink": "#010203", "soft": "#010204", "rule": "#010205", "clean": "#010206", "poisoned": "#010207",
    "mark": "#010208", "paper": "#010209",
}  # fmt: skip
"""CSS variable -> the colour that stands for it while matplotlib draws."""

_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: the reader's font, selectable, small
    "svg.image_inline": True,
    "font.size": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _PLACEHOLDERS["soft"],
    "axes.labelcolor": _PLACEHOLDERS["soft"],
    "xtick.color": _PLACEHOLDERS["soft"],
    "ytick.color": _PLACEHOLDERS["soft"],
    "text.color": _PLACEHOLDERS["ink"],
    "text.parse_math": False,  # a "$" in a name is a dollar sign
    "grid.color": _PLACEHOLDERS["rule"],
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": "cycler('color', ['#010203'])",
}
_INCHES = {"small": (3.5, 2.2), "wide": (4.4, 2.9), "square": (4.0, 4.0), "broad": (7.0, 3.2)}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    x: Sequence[float]
    y: Sequence[float]
    look: str = "ink"
    """"clean", "poisoned" or "ink": colour, dash and marker."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Losses of one split in bins."""

    edges: np.ndarray
    """float64 (bins + 1,)."""
    clean: np.ndarray
    """float64 (bins,): percent of the clean samples; of all samples where the two are not shown separately."""
    poisoned: np.ndarray | None
    """float64 (bins,): percent of the poisoned samples; None where there are none, or that is not known."""
    threshold: float
    """The highest loss that was kept."""
    kept: int
    count: int
    kept_poisoned: int | None
    poisoned_count: int | None


def loss_histogram(loss: np.ndarray, kept: np.ndarray, poisoned: np.ndarray | None, bins: int = 40) -> Histogram:
    """Count losses (n,) in equal bins, clean and poisoned apart, each as percent of its own kind.

    The poisoned are a few percent: counted together with the clean ones they would not be seen.

    Args:
        loss: float (n,).
        kept: bool (n,): which labels the filter kept.
        poisoned: bool (n,), or None where that is not known.
    """
    low, high = float(loss.min()), float(loss.max())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)

    def share(of: np.ndarray) -> np.ndarray:
        return 100 * np.histogram(loss[of], edges)[0] / max(int(of.sum()), 1)

    apart = poisoned is not None and bool(poisoned.any())
    return Histogram(
        edges=edges,
        clean=share(~poisoned if poisoned is not None and apart else np.ones(len(loss), dtype=bool)),
        poisoned=share(poisoned) if poisoned is not None and apart else None,
        threshold=float(loss[kept].max()) if kept.any() else low,
        kept=int(kept.sum()),
        count=len(loss),
        kept_poisoned=None if poisoned is None else int((kept & poisoned).sum()),
        poisoned_count=None if poisoned is None else int(poisoned.sum()),
    )


# -- drawing


@contextmanager
def canvas(size: str) -> Iterator[tuple[Any, Any]]:
    """A matplotlib figure and its axes, whatever the reader's own settings are."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=_INCHES[size], layout="constrained")
        yield figure, figure.subplots()


def svg(figure: Any, name: str, alt: str) -> Markup:
    """A figure as an SVG element; `name` keeps its ids apart from those of the page's other figures."""
    stream = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return inline(stream.getvalue(), name, alt)


def inline(svg: str, name: str, alt: str) -> Markup:
    """Matplotlib's SVG file made an element of an HTML page.

    Args:
        svg: the file's text.
        name: prefix of its ids.
        alt: what the figure says, for those who do not see it; from strangers in part, and escaped here.
    """
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.S)  # it would apply to the whole page
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib\.axis)[^"]*"', "", body)
    body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for variable, colour in _PLACEHOLDERS.items():
        body = body.replace(colour, f"var(--{variable})")
    head = f'<svg viewBox="{view.group(1)}" role="img" aria-label="{escape(printable(alt, 600))}">'
    return Markup(head + body.rstrip())  # matplotlib escapes the text that it draws


_LOOKS: dict[str, dict[str, Any]] = {
    "ink": {"color": _PLACEHOLDERS["ink"], "linestyle": "-", "linewidth": 1.4},
    "clean": {"color": _PLACEHOLDERS["clean"], "linestyle": "-", "linewidth": 1.6, "marker": "o", "markersize": 3.5},
    "poisoned": {
        "color": _PLACEHOLDERS["poisoned"], "linestyle": (0, (4, 2)), "linewidth": 1.6, "marker": "s",
        "markersize": 3.5,
    },
}  # fmt: skip


def colour(name: str) -> str:
    """What stands for a colour of the page while matplotlib draws: "ink", "soft", "rule", "clean", "poisoned"..."""
    return _PLACEHOLDERS[name]


def look(name: str) -> dict[str, Any]:
    """Colour, dash and marker of a curve: "ink", "clean" or "poisoned"."""
    return dict(_LOOKS[name])


def curves(name: str, alt: str, series: Sequence[Line], *, x_title: str, y_title: str, percent: bool = False) -> Markup:
    """Curves over epochs; with `percent` on a scale from 0 to 100 %."""
    from matplotlib.ticker import MaxNLocator

    with canvas("small") as (figure, axes):
        for line in series:
            axes.plot(line.x, line.y, **{"marker": "o", "markersize": 2.5} | _LOOKS[line.look])
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        if percent:
            axes.set_ylim(-3, 103)
            axes.set_yticks([0, 25, 50, 75, 100])
        else:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        return svg(figure, name, alt)


def loss_bars(name: str, alt: str, histogram: Histogram) -> Markup:
    """A histogram of losses with the filter's threshold."""
    clean, poisoned = _PLACEHOLDERS["clean"], _PLACEHOLDERS["poisoned"]
    with canvas("wide") as (figure, axes):
        axes.stairs(histogram.clean, histogram.edges, fill=True, color=clean, alpha=0.35, linewidth=0)
        axes.stairs(histogram.clean, histogram.edges, color=clean, linewidth=1.2)
        top = float(histogram.clean.max())
        if histogram.poisoned is not None:
            axes.stairs(histogram.poisoned, histogram.edges, fill=True, color=poisoned, alpha=0.35, linewidth=0)
            axes.stairs(histogram.poisoned, histogram.edges, color=poisoned, linewidth=1.2, linestyle=(0, (4, 2)))
            top = max(top, float(histogram.poisoned.max()))
        axes.set_ylim(0, top * 1.16)
        axes.axvline(histogram.threshold, color=_PLACEHOLDERS["ink"], linewidth=1.2, linestyle=(0, (1, 1.5)))
        left, right = axes.get_xlim()
        at = (histogram.threshold - left) / (right - left)
        # beside the line, on the side where there is room for it
        x, align, text = (-4, "right", "kept ←") if at > 0.5 else (4, "left", "→ label dropped")
        axes.annotate(
            text, (histogram.threshold, top * 1.15), xytext=(x, 0), textcoords="offset points", ha=align, va="top"
        )
        axes.set_xlabel("loss of the given label")
        axes.set_ylabel("% of images" if histogram.poisoned is None else "% of its kind")
        axes.grid(axis="x", visible=False)
        return svg(figure, name, alt)


def scatter(name: str, alt: str, points: np.ndarray, labels: np.ndarray | None, poisoned: np.ndarray | None) -> Markup:
    """Samples in the plane: dots in the colour of their given label, poisoned ones as crosses on top.

    Args:
        points: float (n, 2).
        labels: int (n,), or None where they are not known.
        poisoned: bool (n,), or None.
    """
    crosses = np.zeros(len(points), dtype=bool) if poisoned is None else poisoned
    with canvas("square") as (figure, axes):
        for label in [None] if labels is None else np.unique(labels):
            of = ~crosses if labels is None or label is None else ~crosses & (labels == label)
            colour = _PLACEHOLDERS["clean"] if label is None else CLASS_COLOURS[int(label) % len(CLASS_COLOURS)]
            axes.plot(*points[of].T, "o", markersize=3.2, color=colour, markeredgewidth=0, alpha=0.85)
        # a cross in the label's colour could not be told from the dots that it lies on
        axes.plot(*points[crosses].T, "x", markersize=5, markeredgewidth=2.6, color=_PLACEHOLDERS["paper"])
        axes.plot(*points[crosses].T, "x", markersize=5, markeredgewidth=1.3, color=_PLACEHOLDERS["mark"])
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set(visible=True, color=_PLACEHOLDERS["rule"])
        return svg(figure, name, alt)
