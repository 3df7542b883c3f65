"""Numbers behind the figures, and SVG that fits into the page."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from dbd_dist.reporting import embedding, figures, gallery
from dbd_dist.reporting.arrays import Split

LOSS = np.array([0.0, 1.0, 2.0, 3.0, 9.0, 10.0])
KEPT = np.array([True, True, True, False, False, False])
POISONED = np.array([False, False, False, False, True, True])


def test_histogram_and_threshold():
    bins = figures.loss_histogram(LOSS, KEPT, POISONED, bins=5)
    assert bins.edges.tolist() == [0, 2, 4, 6, 8, 10]
    assert bins.clean.tolist() == [50, 50, 0, 0, 0]  # 0, 1 | 2, 3
    assert bins.poisoned is not None
    assert bins.poisoned.tolist() == [0, 0, 0, 0, 100]
    assert bins.threshold == 2.0
    assert (bins.kept, bins.count, bins.kept_poisoned, bins.poisoned_count) == (3, 6, 0, 2)


def test_histogram_without_truth_or_poison():
    for poisoned in (None, np.zeros(6, dtype=bool)):
        bins = figures.loss_histogram(LOSS, KEPT, poisoned, bins=5)
        assert bins.poisoned is None
        assert np.isclose(bins.clean.sum(), 100)


def test_equal_losses_make_a_histogram():
    bins = figures.loss_histogram(np.full(6, 2.5), KEPT, POISONED)
    assert bins.clean.sum() == 100
    assert figures.loss_bars("h", "all the same", bins).startswith("<svg")


def test_figures_as_large_as_float32_has_are_drawn():
    largest = float(np.finfo(np.float32).max)
    line = figures.Line(x=[1, 2**53], y=[-largest, largest])
    assert "</svg>" in figures.curves("f", "large", [line], x_title="epoch", y_title="loss")
    bins = figures.loss_histogram(np.array([-largest, largest]), np.array([True, False]), None)
    assert "</svg>" in figures.loss_bars("h", "large", bins)


def test_svg_is_an_element_of_the_page():
    line = figures.Line(x=[1, 2], y=[1.0, 0.5], look="clean")
    svg = figures.curves("fig7", 'a "quoted" <b>', [line], x_title="epoch", y_title="$x$")
    assert svg.startswith('<svg viewBox="')
    assert svg.endswith("</svg>")
    assert 'aria-label="a &#34;quoted&#34; &lt;b&gt;"' in svg
    assert "$x$" in svg
    assert "var(--clean)" in svg
    for never in ("http:", "<style", "<metadata", "font-family", "#0102"):
        assert never not in svg
    assert svg.count('id="') == svg.count('id="fig7-')
    assert svg.count("url(#") == svg.count("url(#fig7-")


def test_suspects_are_the_dropped_of_highest_loss():
    split = Split(loss=np.array([5.0, 9.0, 1.0, 9.0, 7.0]), kept=np.array([False, False, True, False, True]),
                  first_loss=np.zeros(5), first_kept=np.zeros(5, dtype=bool))  # fmt: skip
    assert gallery.suspects(split).tolist() == [1, 3, 0]
    assert gallery.suspects(split, 2).tolist() == [1, 3]


def test_points_chosen_hold_enough_poisoned_ones():
    poisoned = np.zeros(5000, dtype=bool)
    poisoned[:40] = True
    chosen = embedding.choose(np.arange(5000), poisoned, limit=100)
    assert len(np.unique(chosen)) == 100
    assert poisoned[chosen].sum() == 20
    assert np.array_equal(chosen, embedding.choose(np.arange(5000), poisoned, limit=100))
    assert poisoned[embedding.choose(np.arange(50), poisoned, limit=45)].sum() == 35  # ten clean ones are all there are
    assert len(embedding.choose(np.arange(5000), None, limit=100)) == 100


def test_features_that_make_no_picture_give_a_reason():
    assert "5 samples" in str(embedding.embed(np.zeros((5, 3), dtype=np.float32)))
    assert "the same" in str(embedding.embed(np.ones((50, 3), dtype=np.float32)))
    largest = np.finfo(np.float32).max * np.array([[-1], [1]] * 10, dtype=np.float32)
    assert np.isfinite(embedding.embed(largest)).all()
    points = embedding.embed(np.random.default_rng(0).normal(0, 1e4, (20, 1)).astype(np.float32))
    assert isinstance(points, np.ndarray)
    assert np.isfinite(points).all()


def test_import_is_light():
    code = (
        "import sys, dbd_dist.reporting.page; heavy = ('matplotlib', 'sklearn', 'torch', 'jinja2');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
