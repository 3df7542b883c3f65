"""The drawings of a sweep's page: sensitivity, parallel coordinates, importance, Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from dbd_dist.reporting.figures import canvas, colour, look, svg
from dbd_dist.reporting.wording import printable
from tune_spaces.space import Choice, Distribution, Range


def sensitivity(
    name: str, alt: str, x_title: str, points: Sequence[tuple[float, Mapping[str, float | None]]]
) -> Markup:
    """Clean accuracy, attack success and the share of poisoned images that were kept, in percent, over one field; the
    mean where several trials have the same value."""
    with canvas("wide") as (figure, axes):
        for metric, style, marker in (("clean_acc", "clean", "o"), ("asr", "poisoned", "s"), ("kept", "ink", "^")):
            values: dict[float, list[float]] = {}
            for x, metrics in points:
                value = metrics.get(metric)
                if value is not None:
                    values.setdefault(x, []).append(value)
            xs = sorted(values)
            axes.plot(xs, [100 * float(np.mean(values[x])) for x in xs], **look(style) | {"marker": marker})
        axes.set_xlabel(printable(x_title))
        axes.set_ylabel("%")
        axes.set_ylim(-3, 103)
        return svg(figure, name, alt)


def parallel(
    name: str,
    alt: str,
    vary: Mapping[str, Distribution],
    rows: Sequence[Mapping[str, Any]],
    signed: Sequence[float],
    metric: str,
) -> Markup:
    """A line a trial through its values, each field from its low end at the bottom to its high end; the better the
    metric, the darker."""
    titles = [*vary, metric]
    low, high = min(signed), max(signed)
    with canvas("broad") as (figure, axes):
        for i in np.argsort(signed):
            share = 1.0 if high == low else (signed[i] - low) / (high - low)
            heights = [height(given, rows[i][field]) for field, given in vary.items()]
            strength = 0.15 + 0.85 * share
            axes.plot(
                range(len(titles)), [*heights, share], color=colour("clean"), alpha=strength, linewidth=0.8 + share
            )
        axes.set_xticks(range(len(titles)), [printable(title, 24) for title in titles], rotation=20, ha="right")
        axes.set_yticks([0, 1], ["low", "high"])
        return svg(figure, name, alt)


def height(given: Distribution, value: Any) -> float:
    """Where a value lies in its distribution, 0 to 1."""
    if isinstance(given, Choice):
        places = max(len(given.values) - 1, 1)
        return given.values.index(value) / places if value in given.values else 0.0
    if isinstance(given, Range) and given.log:
        low, high, at = np.log([given.low, given.high, max(value, 1e-300)])
    else:
        low, high, at = given.low, given.high, value
    return float(np.clip((at - low) / (high - low), 0, 1))


def bars(name: str, alt: str, values: Mapping[str, float]) -> Markup:
    """How much of the metric's variation each field explains."""
    with canvas("wide") as (figure, axes):
        names = list(values)[::-1]
        axes.barh([printable(n, 30) for n in names], [values[n] for n in names], color=colour("clean"), height=0.6)
        axes.set_xlabel("importance")
        axes.grid(axis="y", visible=False)
        return svg(figure, name, alt)


def scatter(
    name: str, alt: str, points: Sequence[tuple[float, float]], front: Sequence[int], titles: Sequence[str]
) -> Markup:
    """Trials over two metrics, those of the Pareto front joined by a line."""
    with canvas("wide") as (figure, axes):
        every = np.asarray(points, dtype=float)
        axes.plot(*every.T, "o", markersize=4, color=colour("clean"), alpha=0.6)
        best = every[list(front)]
        best = best[np.argsort(best[:, 0])]
        axes.plot(*best.T, **look("poisoned"))
        axes.set_xlabel(printable(titles[0]))
        axes.set_ylabel(printable(titles[1]))
        return svg(figure, name, alt)
