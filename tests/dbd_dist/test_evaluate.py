"""What is counted as attack success, against counting by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_prep.attacks import BadNets
from data_prep.beton import read_beton
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from data_prep.pipeline import prepare
from data_prep.sources import Digits
from dbd_dist import seeds
from dbd_dist.data import augment
from dbd_dist.distributed.world import World
from dbd_dist.evaluation import evaluator as evaluating
from dbd_dist.evaluation.evaluator import EvalResult, Evaluator
from dbd_dist.models.heads import Classifier, seeded
from tests.dbd_dist import tiny


class Says(nn.Module):
    """Gives the answers that it was told, in order: first on clean images, then on triggered ones."""

    def __init__(self, answers: np.ndarray):
        super().__init__()
        self._answers = list(answers)

    def forward(self, images: Tensor) -> Tensor:
        given, self._answers = self._answers[: len(images)], self._answers[len(images) :]
        return nn.functional.one_hot(torch.tensor(np.array(given)), 10).float()


def measured_and_counted(mapping: Any, folder: Path) -> tuple[EvalResult, dict[str, float], int]:
    """Of a network with random answers: what the evaluator finds, what a loop counts, and over how many images."""
    rng = np.random.default_rng(0)
    config: dict[str, Any] = {"datasets": folder, "workers": 1}
    source = Digits(train_per_class=24, test_per_class=8)
    dataset = prepare(PrepareConfig(source=source, attack=BadNets(mapping=mapping), **config), progress=False)
    _, labels, _ = read_beton(dataset.test)
    clean, triggered = rng.integers(0, 10, (2, len(labels)))
    triggered[::2] = 3
    hits = kept = total = mistaken = 0
    for true, answer, untriggered in zip(labels, triggered, clean):
        aim = 3 if mapping == "all-to-one" else (true + 1) % 10
        if aim != true:
            total += 1
            hits += answer == aim
            kept += answer == true
            mistaken += untriggered == aim
    measured = Evaluator(dataset, World(), augment.none(), bf16=False).measure(Says(np.concatenate([clean, triggered])))
    counted = {
        "asr": hits / total,
        "asr_untriggered": mistaken / total,
        "robust_acc": kept / total,
        "clean_acc": (clean == labels).mean(),
    }
    return measured, counted, total


@pytest.mark.parametrize(("mapping", "images"), [("all-to-one", 72), ("all-to-all", 80)])
def test_attack_success_is_counted_over_images_that_do_not_belong_to_the_aim(mapping, images, tmp_path):
    measured, counted, total = measured_and_counted(mapping, tmp_path)
    assert total == images
    for name, share in counted.items():
        assert getattr(measured, name) == pytest.approx(share)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("image", [0, 49, 50, 99])
def test_no_class_is_read_from_figures_that_are_not_finite(value, image, digits):
    """The first 50 images are clean, the others triggered."""

    class Fails(Says):
        def forward(self, images: Tensor) -> Tensor:
            at = 100 - len(self._answers)
            logits = super().forward(images)
            if at <= image < at + len(images):
                logits[image - at, 4] = value
            return logits

    evaluator = Evaluator(open_dataset(digits), World(), augment.none(), bf16=False)
    evaluator.measure(Says(np.zeros(100, dtype=np.int64)))
    with pytest.raises(UserError, match="not finite"):
        evaluator.measure(Fails(np.zeros(100, dtype=np.int64)))


def test_measuring_leaves_every_part_in_its_mode(tmp_path):
    """The warm-up's backbone is in eval mode within a model in train mode."""
    config: dict[str, Any] = {"datasets": tmp_path, "workers": 1}
    source = Digits(train_per_class=2, test_per_class=2)
    dataset = prepare(PrepareConfig(source=source, attack=BadNets(), rate=0.2, **config), progress=False)
    model = seeded(lambda: Classifier(tiny.MODEL, 10), seeds.generator(3, "examine")).train()
    model.backbone.eval()
    Evaluator(dataset, World(), augment.none(), bf16=False).measure(model)
    assert model.training
    assert model.head.training
    assert not any(part.training for part in model.backbone.modules())


def test_features_of_many_images_are_progress(monkeypatch):
    """Each batch is: a whole test set may take longer than a watchdog allows."""
    beats: list[int] = []
    monkeypatch.setattr(evaluating, "beat", lambda: beats.append(1))
    monkeypatch.setattr(evaluating, "FORWARD_BATCH", 2)
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = evaluating.pooled_features(nn.Flatten(), images, augment.none())
    assert len(beats) == 3
    whole = augment.normalise(augment.none(), images).flatten(1).float()
    assert torch.equal(features, whole)
