"""`dbd craft`: perturbed images and optimised triggers against slow, obvious versions; resuming; what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from cluster import topology
from data_prep.artefacts import fingerprint, read_artefact
from data_prep.beton import read_beton
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import Dataset, open_dataset
from data_prep.errors import UserError
from data_prep.io import lock
from data_prep.io.hashes import sha256_json
from data_prep.pipeline import prepare
from data_prep.plan import choose_poisoned
from data_prep.sources import Digits
from dbd_dist import seeds
from dbd_dist.cli import main
from dbd_dist.config import TrainConfig
from dbd_dist.craft import images as per_image
from dbd_dist.craft import pgd
from dbd_dist.craft import trigger as triggers
from dbd_dist.craft.adaptive import Adaptive
from dbd_dist.craft.craft import Craft, TrainingSet
from dbd_dist.craft.job import Job
from dbd_dist.craft.label_consistent import LabelConsistent, LabelConsistentAttack, stamp_corners
from dbd_dist.craft.trigger import Trigger, fixed_mask, stamp, stamp_quantised
from dbd_dist.data import augment
from dbd_dist.models.exported import read_exported
from dbd_dist.models.heads import Classifier, seeded
from dbd_dist.runtime.checkpoint import load_state
from dbd_dist.runtime.run_folder import RunFolder

PERTURB = LabelConsistent(eps=12, step=4, steps=3, rate=0.05, seed=2)
OPTIMISE = Adaptive(steps=6, batch=8, lr=0.3, alpha=0.3)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Dataset:
    """300 training images of digits, nothing poisoned."""
    source = Digits(train_per_class=30, test_per_class=2)
    return prepare(PrepareConfig(source=source, datasets=tmp_path_factory.mktemp("clean"), workers=1), progress=False)


@pytest.fixture(scope="module")
def images(clean) -> tuple[np.ndarray, np.ndarray]:
    """Its training images, uint8 (300, 16, 16, 3), and labels."""
    pixels, labels, _ = read_beton(clean.train)
    return pixels, labels


@pytest.fixture(scope="module")
def data(clean) -> TrainingSet:
    return TrainingSet.read(clean)


@pytest.fixture(scope="module")
def run(clean, tmp_path_factory) -> Path:
    """A run folder with the exports of networks that learnt nothing."""
    config, folder = TrainConfig(model=tiny.MODEL), RunFolder(tmp_path_factory.mktemp("run"))
    classifier = seeded(lambda: Classifier(tiny.MODEL, 10), seeds.generator(1, "classifier"))
    backbone = seeded(lambda: tiny.MODEL.build_backbone(), seeds.generator(1, "backbone"))
    folder.write_model(classifier.state_dict(), config, clean, config.normalise)
    folder.write_backbone(backbone.state_dict(), config, clean, config.normalise)
    return folder.path


@pytest.fixture
def job(clean, run, tmp_path):
    """Makes a job in a work folder of its own."""

    def make(craft: Craft, name: str = "work") -> Job:
        weights = run / ("model" if craft.network == "surrogate" else "backbone")
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        return Job(craft=craft, data=clean.folder, weights=weights.with_suffix(".safetensors"), work=work)

    return make


def collect(job: Job) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return job.craft.collect(TrainingSet.read(open_dataset(job.data)), job.work)


def perturbed(job: Job) -> np.ndarray:
    return collect(job)[0]["images"]


# -- PGD


def slow_pgd(weight, bias, image, label, start, *, norm, eps, step, steps) -> np.ndarray:
    """One image, flat, against a linear classifier of grey levels, in float64: the gradient by hand, value by value."""
    original = image.astype(np.float64)

    def back(x):
        delta = x - original
        if norm == "linf":
            delta = np.array([min(max(d, -eps), eps) for d in delta])
        elif np.sqrt((delta**2).sum()) > eps:
            delta = delta * (eps / np.sqrt((delta**2).sum()))
        return np.array([min(max(v, 0.0), 255.0) for v in original + delta])

    x = back(original + start)
    for _ in range(steps):
        logits = weight @ x + bias
        p = np.exp(logits - logits.max())
        p /= p.sum()
        p[label] -= 1  # d loss / d logits
        gradient = weight.T @ p
        x = back(x + step * (np.sign(gradient) if norm == "linf" else gradient / np.sqrt((gradient**2).sum())))
    return x


@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", 8.0, 1.5), ("linf", 40.0, 7.0), ("l2", 60.0, 11.0)])
def test_pgd_equals_a_plain_loop(norm, eps, step):
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 3 * 5 * 5)) / 50, rng.normal(size=4)
    pixels = torch.from_numpy(rng.integers(0, 256, (6, 3, 5, 5), dtype=np.uint8))
    labels = torch.tensor([0, 1, 2, 3, 3, 0])
    starts = pgd.random_starts(list(range(6)), 5, norm=norm, eps=eps, seed=3).double()
    linear = lambda x: x.flatten(1) @ torch.from_numpy(weight).T + torch.from_numpy(bias)  # noqa: E731
    ours, failed = pgd.perturb(linear, pixels, labels, starts, norm=norm, eps=eps, step=step, steps=9)
    assert failed == 0
    for i in range(6):
        flat = pixels[i].flatten().numpy()
        expected = slow_pgd(weight, bias, flat, int(labels[i]), starts[i].flatten().numpy(), norm=norm, eps=eps,
                            step=step, steps=9)  # fmt: skip
        found = ours[i].flatten().numpy()
        if norm == "linf":
            np.testing.assert_array_equal(found, np.round(expected).astype(np.uint8))
        else:  # where rounding left the ball, some values are shortened
            assert (np.abs(found - expected) <= 1).all()
            assert np.mean(found == np.round(expected)) > 0.6


@pytest.mark.parametrize(
    ("norm", "eps"),
    [("linf", 1.0), ("linf", 7.6), ("linf", 8.0), ("linf", 255.0), ("l2", 0.5), ("l2", 40.7), ("l2", 9e3)],
)
def test_the_result_is_in_the_ball_after_rounding(norm, eps):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (12, 3, 8, 8), generator=generator, dtype=torch.uint8)
    pixels[:4] = torch.tensor([0, 255, 1, 254], dtype=torch.uint8)[:, None, None, None]
    model = seeded(lambda: Classifier(tiny.MODEL, 4), generator).eval()
    labels = torch.arange(12) % 4
    starts = pgd.random_starts(list(range(12)), 8, norm=norm, eps=eps, seed=0)
    found, _ = pgd.perturb(
        lambda x: model(x / 255), pixels, labels, starts, norm=norm, eps=eps, step=eps / 3, steps=4
    )  # fmt: skip
    assert found.dtype == torch.uint8
    delta = found.long() - pixels.long()
    if norm == "linf":
        assert delta.abs().max() <= eps
        assert delta.abs().max() == min(int(eps), 255)  # and it is used
    else:
        squares = delta.square().flatten(1).sum(1)
        assert (squares <= eps**2).all()
        if 30 < eps < 100:
            assert (squares[4:] > 0.9 * eps**2).all()  # the first have nowhere to go from 0 and 255


def test_shortening_takes_no_more_than_it_needs():
    rng = np.random.default_rng(5)
    for _ in range(30):
        delta = torch.from_numpy(rng.normal(size=(1, 40)) * 2)
        eps = float(delta.norm())
        found = pgd._shorten(delta, delta.round(), eps)
        assert float(found.norm()) <= eps
        fewer = (delta.round() - found).abs()
        assert set(fewer.unique().tolist()) <= {0.0, 1.0}
        for i in torch.nonzero(fewer[0]).flatten():  # the one that was rounded up least, given back, is too much
            gained = (delta.round().abs() - delta.abs())[0]
            if gained[i] == gained[fewer[0] > 0].min():
                longer = found.clone()
                longer[0, i] = delta.round()[0, i]
                assert float(longer.norm()) > eps


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_depend_on_seed_and_index_alone(norm):
    def draw(index, seed=0):
        return pgd.random_starts(index, 6, norm=norm, eps=5.0, seed=seed)

    torch.testing.assert_close(draw([4, 9, 1])[[1]], draw([9]), rtol=0, atol=0)
    assert not torch.equal(draw([4]), draw([9]))
    assert not torch.equal(draw([4]), draw([4], seed=1))
    sizes = draw(list(range(300)))
    assert (sizes.abs().amax() if norm == "linf" else sizes.flatten(1).norm(dim=1).max()) <= 5.0001
    assert abs(float(sizes.mean())) < 0.1


def test_inputs_are_those_of_training(run, images):
    exported = read_exported(run / "model.safetensors")
    pixels = torch.from_numpy(images[0][:5]).permute(0, 3, 1, 2)
    expected = augment.normalise(TrainConfig().normalise, pixels)
    torch.testing.assert_close(exported.inputs(pixels.float()), expected)


# -- label-consistent


def test_perturbed_are_the_images_that_will_be_poisoned(job, alone, images):
    made = job(PERTURB)
    tiny.craft(alone, made.to_dict())
    pixels, labels = images
    arrays, evidence = collect(made)
    index = arrays["index"]
    drawn = choose_poisoned(labels, rate=0.05, target=3, num_classes=10, seed=2, eligible=labels == 3)
    assert index.tolist() == np.flatnonzero(drawn).tolist()
    assert len(index) == 15
    delta = arrays["images"].astype(int) - pixels[index].astype(int)
    assert np.abs(delta).max() == 12
    assert evidence["mean_linf"] == np.abs(delta).max(axis=(1, 2, 3)).mean()
    assert evidence["mean_l2"] == pytest.approx(np.sqrt((delta**2).sum(axis=(1, 2, 3))).mean())

    exported = read_exported(made.weights)
    model = exported.build(torch.device("cpu"))
    losses, right = [], []
    for batch in (pixels[index], arrays["images"]):
        logits = model(exported.inputs(torch.from_numpy(batch).permute(0, 3, 1, 2).float()))
        losses.append(torch.nn.functional.cross_entropy(logits, torch.full((15,), 3), reduction="none"))
        right.append(float((logits.argmax(1) == 3).float().mean()))
    assert (losses[1] > losses[0]).all()
    assert [evidence["surrogate_accuracy_before"], evidence["surrogate_accuracy_after"]] == pytest.approx(right)


@pytest.mark.slow
def test_neither_batches_nor_ranks_matter_to_perturbed_images(job, alone, two_ranks):
    found = []
    for batch in (15, 4, 1):
        made = job(replace(PERTURB, batch=batch), f"work{batch}")
        tiny.craft(alone, made.to_dict())
        found.append(perturbed(made))
    made = job(replace(PERTURB, batch=4), "ranks")
    two_ranks(tiny.craft, made.to_dict())
    found.append(perturbed(made))
    np.testing.assert_array_equal(found[3], found[1])
    for other in found[1:]:  # kernels differ by batch size in the last bit, which may turn the sign of a gradient
        assert np.mean(other == found[0]) > 0.999
    differently = job(replace(PERTURB, steps=2), "control")
    tiny.craft(alone, differently.to_dict())
    assert np.mean(perturbed(differently) == found[0]) < 0.9


class Crash(Exception):
    """Stands for a kill: nothing of ours may catch it."""


def test_a_crash_keeps_finished_batches(job, alone, monkeypatch):
    config = replace(PERTURB, batch=4)
    whole, cut = job(config, "whole"), job(config, "cut")
    tiny.craft(alone, whole.to_dict())
    keep, kept = per_image.save_state, []

    def crash(part, path):
        if len(kept) == 2:
            raise Crash
        kept.append(path)
        keep(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(per_image, "save_state", crash)
        with pytest.raises(Crash):
            tiny.craft(alone, cut.to_dict())
    again = []
    monkeypatch.setattr(per_image, "save_state", lambda part, path: (again.append(path), keep(part, path)))
    tiny.craft(alone, cut.to_dict())
    assert len(kept) == len(again) == 2
    assert not set(kept) & set(again)
    np.testing.assert_array_equal(perturbed(cut), perturbed(whole))


def test_label_consistent_stamps_four_corners():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 12, 12, 3), dtype=np.uint8)
    patch = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    made = stamp_corners(images, patch)
    for y in range(12):
        for x in range(12):
            row, col = (y if y < 6 else y - 8), (x if x < 6 else 11 - x)
            wanted = patch[row, col] if 0 <= row < 4 and col < 4 else images[:, y, x]
            assert (made[:, y, x] == wanted).all()


def test_label_consistent_corners_are_those_of_the_paper(tmp_path):
    """32 px: three white and black pixels a row, as drawn; the inner upper pixel of each corner is black."""
    grey = np.full((1, 32, 32, 3), 100, dtype=np.uint8)
    made = LabelConsistentAttack(artefact=tmp_path).stamp(32)(grey)[0]
    w, b = 255, 0
    left, right = [[w, b, b], [b, w, b], [w, b, w]], [[b, b, w], [b, w, b], [w, b, w]]
    for rows in (slice(0, 3), slice(29, 32)):
        assert made[rows, :3, 0].tolist() == left
        assert made[rows, 29:, 0].tolist() == right
    for pixel in ((0, 2), (0, 29), (29, 2), (29, 29)):
        assert made[pixel].tolist() == [0, 0, 0]
    assert (made == 100).all(axis=2).sum() == 32 * 32 - 4 * 9
    large = LabelConsistentAttack(artefact=tmp_path).stamp(224)(np.full((1, 224, 224, 3), 100, dtype=np.uint8))[0]
    assert (large[:21, :21, 0] == np.kron(left, np.ones((7, 7), dtype=int))).all()


def test_label_consistent_takes_other_patterns(tmp_path):
    images = np.full((1, 16, 16, 3), 100, dtype=np.uint8)
    board = LabelConsistentAttack(artefact=tmp_path, pattern="checkerboard").stamp(16)(images)[0]
    assert board[:3, :3, 0].tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    Image.new("RGB", (4, 4), (10, 200, 30)).save(tmp_path / "logo.png")
    own = LabelConsistentAttack(artefact=tmp_path, pattern=tmp_path / "logo.png").stamp(16)(images)[0]
    assert (own == [10, 200, 30]).all(axis=2).sum() == 4 * 16


def test_pgd_starts_at_the_image_unless_told_otherwise():
    """Two classes, logits (0, sum of pixels): the loss of label 1 rises as pixels fall, by 1.5 a step."""
    images = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    linear = lambda x: torch.stack([torch.zeros(len(x)), x.flatten(1).sum(dim=1) / 1e4], dim=1)  # noqa: E731
    index = torch.arange(2)
    zero, _ = LabelConsistent(target=1, steps=2).perturb(linear, images, index, lambda *_: None)
    assert (zero == 97).all()
    drawn, _ = LabelConsistent(target=1, steps=2, start="random").perturb(linear, images, index, lambda *_: None)
    assert len(torch.unique(drawn)) > 5


@pytest.mark.parametrize("side", [0, 9])
def test_patches_that_do_not_fit(side, tmp_path):
    with pytest.raises(UserError) as error:
        LabelConsistentAttack(artefact=tmp_path, patch_px=side).stamp(16)
    assert error.value.where == "patch_px"


# -- adaptive


def slow_distances(features: np.ndarray, centres: np.ndarray, distance: str) -> tuple[float, float]:
    def apart(x, y):
        if distance == "cosine":
            return 1 - (x @ y) / np.sqrt((x @ x) * (y @ y))
        return np.sqrt(((x - y) ** 2).sum())

    centre = sum(features) / len(features)
    return (
        sum(apart(f, centre) for f in features) / len(features),
        sum(apart(c, centre) for c in centres) / len(centres),
    )


def slow_stamp(images: np.ndarray, pattern: np.ndarray, mask: np.ndarray) -> np.ndarray:
    m = mask[None, :, :, None] / 255
    return np.floor((1 - m) * images.astype(np.float64) + m * pattern + 0.5 + 1e-9).astype(np.uint8)


@pytest.mark.parametrize(
    "config",
    [
        OPTIMISE,
        replace(OPTIMISE, distance="cosine", alpha=None, patch_px=5, corner="top-left"),
        replace(OPTIMISE, normalise_features=False, seed=1),
        Adaptive(steps=6, batch=8, lr=0.3, optimise="pattern-and-mask", mask_budget=0.2),
    ],
    ids=["l2", "cosine-patch", "raw", "mask"],
)
def test_the_evidence_is_what_a_slow_version_finds(config, job, alone, images):
    made = job(config)
    tiny.craft(alone, made.to_dict())
    arrays, evidence = collect(made)
    assert evidence["after"]["objective"] < evidence["before"]["objective"]

    exported = read_exported(made.weights)
    backbone = exported.build(torch.device("cpu")).double()

    def features(batch: np.ndarray) -> np.ndarray:
        grey = torch.from_numpy(batch).permute(0, 3, 1, 2).double()
        found = backbone(exported.inputs(grey)).numpy()
        return found / np.sqrt((found**2).sum(1, keepdims=True)) if config.normalise_features else found

    pixels, labels = images
    benign = features(pixels)
    centres = np.stack([benign[labels == k].mean(axis=0) for k in range(10)])
    others = pixels[labels != 3]
    assert evidence["images"] == len(others) == 270
    start = Trigger(config, 16).quantised()
    before = (start[0].permute(1, 2, 0).numpy(), start[1].numpy())
    for when, (pattern, mask) in (("before", before), ("after", (arrays["pattern"], arrays["mask"]))):
        own, other = slow_distances(features(slow_stamp(others, pattern, mask)), centres, config.distance)
        assert evidence[when]["distance_to_own_centre"] == pytest.approx(own, rel=1e-4, abs=1e-6)
        assert evidence[when]["distance_to_benign_centres"] == pytest.approx(other, rel=1e-4, abs=1e-6)
        assert evidence[when]["objective"] == pytest.approx(own - other, rel=1e-3, abs=2e-6)
    assert evidence["mask_mean"] == pytest.approx(arrays["mask"].mean() / 255)
    if config.optimise == "pattern-and-mask":
        assert arrays["mask"].mean() / 255 <= 0.2
        assert len(np.unique(arrays["mask"])) > 5
    else:
        np.testing.assert_array_equal(arrays["mask"], np.round(fixed_mask(config, 16).numpy() * 255))


def test_fixed_masks():
    whole = fixed_mask(Adaptive(), 8)
    assert torch.equal(whole, torch.full((8, 8), 0.1))
    square = fixed_mask(Adaptive(patch_px=3, corner="bottom-left"), 8)
    assert square.sum() == 9
    assert (square[5:, :3] == 1).all()


def test_stamping_in_whole_grey_levels():
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (3, 3, 6, 6), dtype=np.uint8)
    pattern, mask = rng.integers(0, 256, (3, 6, 6), dtype=np.uint8), rng.integers(0, 256, (6, 6), dtype=np.uint8)
    found = stamp_quantised(*(torch.from_numpy(x) for x in (batch, pattern, mask)))
    expected = slow_stamp(batch.transpose(0, 2, 3, 1), pattern.transpose(1, 2, 0), mask)
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy(), expected)
    smooth = stamp(torch.from_numpy(batch).double(), torch.from_numpy(pattern) / 255, torch.from_numpy(mask) / 255)
    assert (smooth - found).abs().max() <= 0.5001


@pytest.mark.slow
def test_two_ranks_optimise_the_same_trigger(job, alone, two_ranks):
    one, both = job(OPTIMISE, "one"), job(OPTIMISE, "both")
    tiny.craft(alone, one.to_dict())
    two_ranks(tiny.craft, both.to_dict())
    (ours, evidence), (theirs, other) = collect(one), collect(both)
    assert np.abs(ours["pattern"].astype(int) - theirs["pattern"].astype(int)).max() <= 1
    assert other["after"] == pytest.approx(evidence["after"], rel=1e-3)
    assert other["before"] == pytest.approx(evidence["before"], rel=1e-4)
    control = job(replace(OPTIMISE, seed=4), "control")
    tiny.craft(alone, control.to_dict())
    assert np.abs(collect(control)[0]["pattern"].astype(int) - ours["pattern"]).max() > 50


def test_a_crash_goes_on_from_the_newest_checkpoint(job, alone, monkeypatch):
    monkeypatch.setattr(triggers, "CHECKPOINT_STEPS", 2)
    whole, cut = job(OPTIMISE, "whole"), job(OPTIMISE, "cut")
    tiny.craft(alone, whole.to_dict())

    class Progress:
        crash_at, seen = 5, []

        def __init__(self, path: Path):
            pass

        def tick(self, stage, epoch, epochs, step, steps):
            Progress.seen.append(step)
            if step == Progress.crash_at:
                raise Crash

        def note(self, metrics):
            pass

    monkeypatch.setattr("dbd_dist.craft.job.ProgressFile", Progress)
    with pytest.raises(Crash):
        tiny.craft(alone, cut.to_dict())
    Progress.crash_at = -1
    tiny.craft(alone, cut.to_dict())
    assert Progress.seen == [1, 2, 3, 4, 5, 5, 6]
    (ours, evidence), (theirs, other) = collect(whole), collect(cut)
    np.testing.assert_array_equal(ours["pattern"], theirs["pattern"])
    assert evidence == other


# -- the command


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.delenv("DBD_STORAGE", raising=False)
    return place


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def refused(place, capsys):
    """Runs a command that must fail as promised and leave nothing; gives its message."""

    def command(*argv: Any) -> str:
        before = content(place), set(place.rglob("*"))
        code = main(["craft", *map(str, argv)])
        message = capsys.readouterr().err.splitlines()[-1]
        assert code == 2
        assert message.startswith("error: ")
        assert (content(place), set(place.rglob("*"))) == before
        return message

    return command


def flags(attack: str, clean: Dataset, run: Path, *more: Any) -> list[str]:
    settings = {
        "label-consistent": ["--surrogate", run, "--steps", 2, "--rate", 0.02],
        "adaptive": ["--backbone", run, "--steps", 2, "--batch", 8],
    }[attack]
    shared = [attack, "--data", clean.folder, "--out", "made", "--launcher", "local", "--device", "cpu"]
    return [str(v) for v in (*shared, *settings, *more)]


@pytest.mark.parametrize("attack", ["label-consistent", "adaptive"])
def test_an_artefact_of_the_command(attack, clean, run, images, place, capsys, refused, monkeypatch):
    assert main(["craft", *flags(attack, clean, run)]) == 0
    assert "before" in capsys.readouterr().out
    assert {p.name for p in place.iterdir()} == {"made"}
    made = read_artefact(place / "made", attack)
    pixels, labels = images
    assert made.fingerprint == fingerprint(labels, pixels[:64])
    assert (made.target, made.image_px) == (3, 16)
    assert made.settings["seed"] == 0
    network = "surrogate" if attack == "label-consistent" else "backbone"
    assert len(made.settings[f"{network}_sha256"]) == 64
    assert (made.settings.get("rate") == 0.02) == (attack == "label-consistent")
    assert made.evidence["images"] == (6 if attack == "label-consistent" else 270)

    before = content(place)
    with monkeypatch.context() as patch:
        patch.setattr("dbd_dist.commands.craft.craft_local", None)  # again: nothing is done
        assert main(["craft", *flags(attack, clean, run)]) == 0
    assert content(place) == before
    other = flags(attack, clean, run, "--seed", 1)
    assert "another seed" in refused(*other)
    kinds = {"label-consistent": "adaptive", "adaptive": "label-consistent"}
    message = refused(*flags(kinds[attack], clean, run))
    assert f"an artefact for {attack}" in message
    assert "--overwrite" in message
    assert main(["craft", *other, "--overwrite"]) == 0
    assert read_artefact(place / "made", attack).settings["seed"] == 1
    assert {p.name for p in place.iterdir()} == {"made"}


def test_another_network_at_the_same_place_is_refused(clean, run, refused, place, tmp_path):
    assert main(["craft", *flags("adaptive", clean, run)]) == 0
    other = Path(shutil.copytree(run, tmp_path / "other"))
    folder, config = RunFolder(other), TrainConfig(model=tiny.MODEL)
    folder.write_backbone(tiny.MODEL.build_backbone().state_dict(), config, clean, config.normalise)
    assert "another backbone_sha256" in refused(*flags("adaptive", clean, other))
    assert main(["craft", *flags("adaptive", clean, other / "backbone.safetensors", "--overwrite")]) == 0


def test_a_folder_that_is_no_artefact_is_never_replaced(clean, run, refused, place):
    (place / "made").mkdir()
    (place / "made" / "thesis.txt").write_text("years of work")
    assert "no artefact" in refused(*flags("adaptive", clean, run, "--overwrite"))


def test_an_artefact_that_another_command_makes_is_refused(clean, run, refused, place):
    with lock.held(place / ".made.lock", "the artefact"):
        message = refused(*flags("adaptive", clean, run))
    assert "another process is at work on it" in message
    assert f"process {os.getpid()} on " in message
    assert "--out" in message


def test_no_room_for_an_artefact(clean, run, refused, monkeypatch):
    monkeypatch.setattr("dbd_dist.runtime.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    message = refused(*flags("label-consistent", clean, run))
    assert "the artefact needs up to" in message
    assert "1 KiB are free" in message


@pytest.mark.slow
def test_networks_are_trained_where_none_is_given(clean, place, monkeypatch):
    monkeypatch.setattr("dbd_dist.runtime.runner.set_threads", lambda *_: None)  # for the tests after this one too
    for attack, more in (("label-consistent", ["--steps", "1"]), ("adaptive", ["--steps", "1", "--batch", "4"])):
        argv = [
            "craft",
            attack,
            "--data",
            str(clean.folder),
            "--out",
            attack,
            "--preset",
            "smoke",
            "--launcher",
            "local",
        ]
        assert main([*argv, *more]) == 0
        with monkeypatch.context() as patch:  # again, made otherwise: the run stands
            patch.setattr("dbd_dist.commands.craft.launch", None)
            assert main([*argv, *more, "--steps", "2", "--overwrite"]) == 0
    names = {str(p.relative_to(place / "runs")) for p in (place / "runs").rglob("*.safetensors")}
    assert names == {"label-consistent/surrogate/model.safetensors", "adaptive/backbone/backbone.safetensors"}
    stage = next((place / "runs" / "stages").glob("simclr-*")) / "state.pt"
    trained = load_state(stage, needs=("backbone",))["backbone"]
    exported = read_exported(place / "runs" / "adaptive" / "backbone" / "backbone.safetensors")
    found = exported.build(torch.device("cpu")).state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in found)


@pytest.mark.parametrize(
    ("attack", "more", "says"),
    [
        ("label-consistent", ["--target", 10], ["target 10 is not a class", "0 to 9"]),
        ("label-consistent", ["--target", -1], ["craft.target", ">= 0"]),
        ("label-consistent", ["--rate", 0.2], ["asks for 60 of 300", "only 30", "at most 0.1"]),
        ("label-consistent", ["--rate", 0], ["rate", "strictly between 0 and 1"]),
        ("label-consistent", ["--eps", 0], ["craft.eps", "in (0, 255]"]),
        ("label-consistent", ["--eps", 0.5], ["craft.eps", "1 to 255"]),
        ("label-consistent", ["--eps", 256], ["craft.eps", "in (0, 255]"]),
        ("label-consistent", ["--eps", "nan", "--norm", "l2"], ["craft.eps", "> 0"]),
        ("label-consistent", ["--step", 0], ["craft.step", "> 0"]),
        ("label-consistent", ["--steps", 0], ["craft.steps", ">= 1"]),
        ("label-consistent", ["--batch", 0], ["craft.batch", ">= 1"]),
        ("adaptive", ["--target", 10], ["target 10 is not a class", "0 to 9"]),
        ("adaptive", ["--alpha", 0], ["craft.alpha", "in (0, 1]"]),
        ("adaptive", ["--alpha", 1.5], ["craft.alpha", "in (0, 1]"]),
        ("adaptive", ["--patch-px", 17], ["craft.patch_px", "1 to 16"]),
        ("adaptive", ["--mask-budget", 0], ["craft.mask_budget", "in (0, 1]"]),
        ("adaptive", ["--optimise", "pattern-and-mask", "--alpha", 0.1], ["craft.alpha", "mask_budget"]),
        ("adaptive", ["--lr", 0], ["craft.lr", "> 0"]),
        ("adaptive", ["--steps", 0], ["craft.steps", ">= 1"]),
        ("adaptive", ["--batch", 1], ["craft.batch", ">= 2"]),
        ("adaptive", ["--workers", 0], ["--workers", ">= 1"]),
        ("adaptive", ["--alpha", 1e-9], ["craft.alpha", "changes no pixel"]),
        ("adaptive", ["--out", ".."], ["--out", "a new folder's path"]),
        ("adaptive", ["--out", "x" * 250], ["--out", "too long", "at most 200 bytes"]),
        ("adaptive", ["--out", "x" * 300 + "/made"], ["File name too long", "another --out"]),
        ("adaptive", ["--out", "/dev/null"], ["is a file", "another --out"]),
    ],
)
def test_settings_out_of_range(attack, more, says, refused, clean, run):
    message = refused(*flags(attack, clean, run, *more))
    assert all(part in message for part in says), message


def test_a_batch_that_ranks_cannot_share():
    with pytest.raises(UserError, match=r"craft\.batch.*a multiple of 3"):
        OPTIMISE.check_workers(3)


@pytest.mark.parametrize("attack", ["label-consistent", "adaptive"])
def test_data_that_is_poisoned_or_that_nobody_vouches_for(attack, refused, clean, digits, run, tmp_path):
    poisoned = refused(*flags(attack, open_dataset(digits), run))
    assert "poisoned already (badnets)" in poisoned
    assert "dbd prepare" in poisoned
    source = Digits(train_per_class=3, test_per_class=2)
    blind = prepare(PrepareConfig(source=source, untrusted=True, out=tmp_path / "blind", workers=1), progress=False)
    assert "nobody vouches" in refused(*flags(attack, blind, run))
    assert "not a dataset folder" in refused(*flags(attack, replace(clean, folder=tmp_path / "none"), run))


def damaged(run: Path, folder: Path, **fields: Any) -> Path:
    """A copy of a run folder with other descriptions."""
    copy = Path(shutil.copytree(run, folder))
    for name in ("model.json", "backbone.json"):
        content = json.loads((copy / name).read_text()) | fields
        content.pop("checksum")
        (copy / name).write_text(json.dumps(content | {"checksum": sha256_json(content)}))
    return copy


@pytest.mark.parametrize("attack", ["label-consistent", "adaptive"])
def test_networks_that_do_not_fit(attack, refused, clean, run, tmp_path):
    name = "model" if attack == "label-consistent" else "backbone"
    message = refused(*flags(attack, clean, tmp_path / "nothing"))
    assert str(tmp_path / "nothing" / f"{name}.json") in message
    assert "images of 32 px, the data set has 16 px" in refused(
        *flags(attack, clean, damaged(run, tmp_path / "px", image_px=32))
    )
    names = [str(i) for i in range(9)]
    message = refused(*flags(attack, clean, damaged(run, tmp_path / "classes", class_names=names)))
    assert ("a classifier of the data set's 10 classes" if attack == "label-consistent" else "a classifier") in message
    assert "not the description" in refused(*flags(attack, clean, damaged(run, tmp_path / "mean", mean=[1])))
    network = json.loads((run / "model.json").read_text())["network"]
    wider = damaged(run, tmp_path / "wider", network=network | {"widths": [8, 24]})
    assert "not the weights of this network" in refused(*flags(attack, clean, wider))
    (wider / f"{name}.safetensors").write_bytes(b"nothing")
    assert "7 bytes, the description says" in refused(*flags(attack, clean, wider))


def test_more_workers_than_the_machine_has(refused, clean, run, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    message = refused(
        *flags("adaptive", clean, run, "--launcher", "ray", "--workers", topology.this_machine().cpus + 1)
    )
    assert "--workers" in message


def test_a_preset_that_is_not_there(refused, clean):
    message = refused("adaptive", "--data", clean.folder, "--out", "made", "--preset", "dem", "--launcher", "local")
    assert "there is no preset 'dem'" in message
    assert "demo" in message


@pytest.mark.parametrize("attack", ["label-consistent", "adaptive"])
def test_a_loss_that_is_not_finite_names_the_step(attack, refused, clean, run, tmp_path):
    copy, config = Path(shutil.copytree(run, tmp_path / "copy")), TrainConfig(model=tiny.MODEL)
    classifier = Classifier(tiny.MODEL, 10)
    folder = RunFolder(copy)
    classifier.backbone.bn1.weight.data[0] = torch.nan
    folder.write_model(classifier.state_dict(), config, clean, config.normalise)
    folder.write_backbone(classifier.backbone.state_dict(), config, clean, config.normalise)
    assert "bn1.weight are not finite" in refused(*flags(attack, clean, copy))
    classifier.backbone.bn1.weight.data[:] = 3e38  # finite, and what comes of it is not
    folder.write_model(classifier.state_dict(), config, clean, config.normalise)
    folder.write_backbone(classifier.backbone.state_dict(), config, clean, config.normalise)
    message = refused(*flags(attack, clean, copy))
    assert f"{attack}, step 1" in message
    assert "smaller" in message


@pytest.mark.slow
def test_two_ranks_of_torchrun_train_and_craft(clean, place):
    argv = ["label-consistent", "--data", str(clean.folder), "--out", "made", "--preset", "smoke", "--batch", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "dbd_dist.cli", "craft", *argv, "--launcher", "local", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in place.iterdir()} == {"made", "runs"}
    assert read_artefact(place / "made", "label-consistent").evidence["images"] == 8


@pytest.mark.slow
@pytest.mark.ray
def test_two_ray_workers_make_what_one_process_makes(clean, run, place, ray_here):
    argv = flags("label-consistent", clean, run, "--batch", 2)
    assert main(["craft", *argv, "--out", "by-ray", "--launcher", "ray", "--workers", "2"]) == 0
    assert main(["craft", *argv]) == 0
    one, ray = (read_artefact(place / name, "label-consistent") for name in ("made", "by-ray"))
    assert ray.settings == one.settings
    difference = np.abs(ray.arrays["images"].astype(int) - one.arrays["images"].astype(int))
    assert np.mean(difference > 1) < 0.01
    assert {p.name for p in place.iterdir()} == {"made", "by-ray"}
