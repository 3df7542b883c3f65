"""Neural Cleanse against loops: the schedule of the cost, all classes at once, the anomaly index, unlearning."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from dbd_dist.config import override
from dbd_dist.data import augment
from dbd_dist.launch.local import run_local
from dbd_dist.presets import preset
from dbd_dist.reporting.page import render
from dbd_dist.runtime.pictures import trigger_sheet
from dbd_dist.stages import Inversion, Patching
from dbd_dist.stages.context import EpochEnd
from dbd_dist.stages.flagged import flag
from dbd_dist.stages.inversion import CostSchedule, anomaly_index, invert, stamp
from dbd_dist.stages.patching import patch, stamped_some

PX = 6
RAW = augment.none(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
QUICK = Inversion(rounds=40, steps=10, per_class=8, patience=3)


def linear(classes: int = 5, planted: int | None = None) -> Any:
    """A classifier of flattened images; white pixels in a corner make the planted class certain."""
    weights = torch.randn(classes, 3, PX, PX, generator=torch.Generator().manual_seed(1)) * 0.5
    weights -= weights.mean(dim=(1, 2, 3), keepdim=True)  # no class is preferred
    if planted is not None:
        weights[planted, :, 0, :2] = 20.0
    bias = torch.zeros(classes)
    if planted is not None:
        bias[planted] = -39.0  # ordinary images, at most half white, reach about 30
    return lambda images: images.flatten(1) @ weights.flatten(1).T + bias


def pictures(count: int = 64) -> Tensor:
    return torch.randint(
        0, 128, (count, 3, PX, PX), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )  # fmt: skip


def batches(config: Inversion) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(7)
    images = pictures()
    return [
        images[torch.randint(len(images), (config.per_class,), generator=drawn)]
        for _ in range(config.rounds * config.steps)
    ]


def starts(classes: int) -> list[Tensor]:
    return [torch.randn(4, PX, PX, generator=torch.Generator().manual_seed(k)) for k in range(classes)]


# -- the anomaly index


def test_anomaly_index_by_hand():
    """Median 10, absolute deviations 0, 1, 2, 1, 8 with median 1."""
    found = anomaly_index(torch.tensor([10.0, 11.0, 12.0, 9.0, 2.0]))
    assert found.tolist() == pytest.approx([0, -1 / 1.4826, -2 / 1.4826, 1 / 1.4826, 8 / 1.4826])
    assert anomaly_index(torch.tensor([3.0, 3.0, 3.0, 1.0])).tolist() == [0.0] * 4


# -- the cost


class OneClass:
    """The schedule of one class, step by step."""

    def __init__(self, config: Inversion):
        self.config, self.cost, self.best, self.reference = config, 0.0, math.inf, math.inf
        self.high = self.low = self.stale = 0
        self.raised = self.lowered = self.over = False

    def update(self, success: float, norm: float) -> bool:
        config = self.config
        smaller = False
        if success >= config.success:
            self.high, self.low = self.high + 1, 0
            if norm < self.best:
                self.best, smaller = norm, True
        else:
            self.high, self.low = 0, self.low + 1
        if self.high >= config.patience:
            self.high = 0
            if self.cost == 0:
                self.cost = config.cost
            else:
                self.cost, self.raised = self.cost * config.multiplier, True
        elif self.cost > 0 and self.low >= config.patience:
            self.low, self.lowered = 0, True
            self.cost /= config.multiplier**1.5
        if self.best < 0.99 * self.reference:
            self.stale, self.reference = 0, self.best
        else:
            self.stale += 1
        self.over = self.raised and self.lowered and self.stale >= 5 * config.patience
        return smaller


def test_the_schedule_of_many_is_that_of_each():
    config, classes, numbers = Inversion(patience=2), 6, random.Random(0)
    schedule, singles = CostSchedule(config, classes), [OneClass(config) for _ in range(classes)]
    ended = set()
    for _ in range(200):
        active = schedule.active.tolist()
        assert active == [k for k in range(classes) if not singles[k].over]
        if not active:
            break
        success = [numbers.choice([0.5, 0.98, 0.99, 1.0, 1.0]) for _ in active]
        norms = [numbers.uniform(1, 9) for _ in active]
        found = schedule.update(torch.tensor(success), torch.tensor(norms))
        expected = [singles[k].update(s, n) for k, s, n in zip(active, torch.tensor(success).tolist(), norms)]
        assert found.tolist() == expected
        assert schedule.cost.tolist() == pytest.approx([one.cost for one in singles])
        assert schedule.best.tolist() == pytest.approx([one.best for one in singles])
        ended |= {k for k in range(classes) if singles[k].over}
    assert len(ended) > 1
    assert any(one.cost > config.cost for one in singles)


# -- inversion


def test_images_with_triggers_pixel_by_pixel():
    images, triggers = torch.rand(2, 3, 4, 4), torch.rand(3, 4, 4, 4)
    found = stamp(images, triggers)
    for a in range(3):
        for b in range(2):
            for c in range(3):
                for y in range(4):
                    for x in range(4):
                        mask = triggers[a, 0, y, x]
                        expected = (1 - mask) * images[b, c, y, x] + mask * triggers[a, 1 + c, y, x]
                        assert found[a, b, c, y, x] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.slow
def test_all_classes_at_once_find_what_each_finds_alone():
    classify = linear()
    together = invert(QUICK, classify, RAW, range(5), starts(5), batches(QUICK))
    for k in range(5):
        alone = invert(QUICK, classify, RAW, [k], [starts(5)[k]], batches(QUICK))
        torch.testing.assert_close(together[k], alone[0], rtol=1e-4, atol=1e-5)
    stamped = stamp(pictures().float() / 255, together)
    for k in range(5):
        success = (classify(stamped[k]).argmax(dim=1) == k).float().mean()
        assert success >= 0.95
    assert (together[:, 0].sum(dim=(1, 2)) < 0.5 * PX * PX).all()


def test_a_planted_trigger_is_found_where_it_is():
    config = replace(QUICK, rounds=60)
    found = invert(config, linear(6, planted=2), RAW, range(6), starts(6), batches(config))
    scores = anomaly_index(found[:, 0].sum(dim=(1, 2)))
    assert scores.argmax() == 2
    assert found[2, 0, 0, :2].sum() > 0.8 * found[2, 0].sum()
    assert (found[2, 1:, 0, :2] > 0.5).all()


@pytest.mark.parametrize("images", [512, 8])
def test_two_ranks_and_groups_find_what_one_does(alone, two_ranks, images):
    expected = tiny.invert(alone, 512)
    for found in two_ranks(tiny.invert, images):
        np.testing.assert_allclose(found["triggers"], expected["triggers"], atol=2e-3)


def test_triggers_are_those_of_float32_whatever_the_run_computes_in(alone):
    """In bfloat16 the index of a target came out a fifth lower on photographs."""
    assert torch.equal(tiny.invert(alone, 512, bf16=True)["triggers"], tiny.invert(alone, 512)["triggers"])


# -- unlearning


def test_a_share_of_the_images_carries_the_trigger():
    pixels, triggers = pictures(4), torch.rand(2, 4, PX, PX)
    found = stamped_some(pixels, triggers, torch.tensor([-1, 0, 1, -1]))
    assert torch.equal(found[0], pixels[0])
    assert torch.equal(found[3], pixels[3])
    for i, k in ((1, 0), (2, 1)):
        expected = (1 - triggers[k, :1]) * pixels[i] + triggers[k, :1] * triggers[k, 1:] * 255
        assert (found[i].float() - expected).abs().max() <= 0.5 + 1e-3
    assert torch.equal(stamped_some(pixels, triggers, torch.full((4,), -1)), pixels)


def test_unlearning_trains_on_clean_images_of_true_labels(alone):
    rows: list[dict[str, float]] = []

    def report(end: EpochEnd) -> None:
        rows.append(end.metrics)

    context = replace(tiny.make_context(alone, tiny.make_images(24), report=report), holdout=tiny.make_images(60))
    config = Patching(epochs=6, batch=12, lr=0.05, share=0.5, augment=tiny.WEAK)
    model = tiny.make_classifier(context)
    patch(config, model, torch.rand(1, 4, 16, 16), context, None)
    assert len(rows) == 6
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_without_a_found_target_the_model_stays(alone):
    context = replace(tiny.make_context(alone, tiny.make_images()), holdout=tiny.make_images(20), model=tiny.MODEL)
    state = tiny.make_classifier(context).state_dict()
    nothing = flag(classes=torch.empty(0, dtype=torch.int64), class_scores=torch.zeros(4))
    given = {"model": state, "flagged": nothing, "triggers": torch.rand(4, 4, 16, 16)}
    assert Patching().run(context, given, None)["model"] is state


# -- a whole run


@pytest.mark.slow
def test_a_run_leaves_triggers_and_their_picture(tmp_path, with_holdout: Path):
    config = preset("smoke").config("nc")
    settings = {
        "compute.workers": 1, "compute.threads": 1, "compute.precision": "fp32", "inversion.rounds": 2,
        "inversion.steps": 2, "inversion.anomaly": 0.001, "patching.batch": 6, "patching.epochs": 2,
    }  # fmt: skip
    config = override(replace(config, data=with_holdout), settings)
    result = run_local(config, storage=tmp_path, name="run", quiet=True)
    assert result is not None
    assert result["needs_clean"]
    assert result["seconds"].keys() == {"supervised", "inversion", "patching"}
    found, scores = result["flagged"], np.array(result["flagged"]["class_scores"])
    assert found["classes"] == np.flatnonzero(scores > 0.001).tolist() != []
    assert found["samples"] is None
    assert found["class_tpr"] in (0.0, 1.0)
    stored = np.load(tmp_path / "run" / "triggers.npz")
    assert stored["triggers"].shape == (10, 4, 16, 16)
    norms = torch.from_numpy(stored["triggers"].astype(np.float32))[:, 0].sum(dim=(1, 2))
    np.testing.assert_allclose(anomaly_index(norms), scores, rtol=0.05, atol=0.05)
    with Image.open(tmp_path / "run" / "triggers.png") as picture:
        assert picture.size[0] > 900
    page = render([tmp_path / "run"])
    assert "What detectors flagged" in page
    assert page.count("Mask and pattern of the trigger") == 1


def test_flagged_classes_come_first_and_framed():
    triggers, scores = torch.zeros(12, 4, 16, 16), torch.linspace(0, 1, 12)
    triggers[11, 0, :8] = 1.0
    plain, framed = (np.asarray(trigger_sheet(triggers, scores, classes)) for classes in ((), (11,)))
    changed = np.flatnonzero((plain != framed).any(axis=(0, 2)))
    assert changed.max() < 110
    top = plain[34 : 34 + 96, 6 : 6 + 96]
    assert top[:40].mean() > 250
    assert top[56:].mean() < 5
