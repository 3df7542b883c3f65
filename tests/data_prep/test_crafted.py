"""Artefacts, and the attacks that apply them, on artefacts made by hand for two attacks that nobody registered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from data_prep.artefacts import ARRAYS_FILE, Artefact, fingerprint, read_artefact, write_artefact
from data_prep.attacks import OptimisedPattern, PerturbedImages
from data_prep.attacks.crafted import mix
from data_prep.beton.ffcv import read_beton
from data_prep.dataset.truth import read_truth
from data_prep.errors import UserError
from data_prep.io.hashes import sha256_json
from data_prep.pipeline import PrepareConfig, prepare
from data_prep.plan import choose_poisoned
from data_prep.sources import Digits


@dataclass(frozen=True, kw_only=True)
class Marked(PerturbedImages):
    """Perturbed images with a black line."""

    name: ClassVar[str] = "marked"

    row: int = 3

    def stamp(self, image_px: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda images: black_line(images, self.row)


@dataclass(frozen=True, kw_only=True)
class Mixed(OptimisedPattern):
    """A pattern and its mask."""

    name: ClassVar[str] = "mixed"


def black_line(images: np.ndarray, row: int = 3) -> np.ndarray:
    stamped = images.copy()
    stamped[:, row] = 0
    return stamped


SOURCE = Digits(train_per_class=24, test_per_class=5)
RATE = 0.05


@pytest.fixture(scope="module")
def clean() -> tuple[np.ndarray, np.ndarray]:
    """Training images uint8 (240, 16, 16, 3) and labels (240,)."""
    split = SOURCE.open().train
    return np.stack([split.read(i) for i in range(len(split))]), split.labels


def write(folder: Path, kind: str, clean: Any, **changes: Any) -> Artefact:
    images, labels = clean
    if kind == "mixed":
        rng = np.random.default_rng(1)
        arrays = {"pattern": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
                  "mask": rng.integers(0, 256, (16, 16), dtype=np.uint8)}  # fmt: skip
    else:
        chosen = choose_poisoned(labels, rate=RATE, target=3, num_classes=10, seed=0, eligible=labels == 3)
        index = np.flatnonzero(chosen)
        arrays = {"index": index, "images": images[index] // 2}
    fields: dict[str, Any] = {
        "target": 3, "fingerprint": fingerprint(labels, images[:64]), "settings": {"rate": RATE, "seed": 0},
        "evidence": {"before": 1.0}, "versions": {"torch": "0"},
    }  # fmt: skip
    arrays = changes.pop("arrays", arrays)
    px = arrays.get("pattern", images).shape[-2]
    return write_artefact(folder, kind, arrays, **({"image_px": px} | fields | changes))


def config(tmp_path: Path, attack: Any, **fields: Any) -> PrepareConfig:
    return PrepareConfig(
        **{"source": SOURCE, "attack": attack, "rate": RATE, "datasets": tmp_path, "workers": 1} | fields
    )


def test_a_pattern_is_mixed_with_a_share_at_each_pixel(rng):
    images = rng.integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    pattern = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    mask = rng.integers(0, 256, (6, 6), dtype=np.uint8)
    mask[0, :2] = 0, 255
    made = mix(images, pattern, mask)
    for i in range(2):
        for y in range(6):
            for x in range(6):
                for c in range(3):
                    m = int(mask[y, x]) / 255
                    exact = (1 - m) * int(images[i, y, x, c]) + m * int(pattern[y, x, c])
                    assert abs(int(made[i, y, x, c]) - exact) <= 0.5 + 1e-9
    assert (made[:, 0, 0] == images[:, 0, 0]).all()
    assert (made[:, 0, 1] == pattern[0, 1]).all()


def test_artefact_is_what_was_written(tmp_path, clean):
    made = write(tmp_path / "a", "marked", clean)
    read = read_artefact(tmp_path / "a", "marked")
    assert (read.arrays["index"] == made.arrays["index"]).all()
    assert (read.arrays["images"] == clean[0][read.arrays["index"]] // 2).all()
    assert isinstance(read.arrays["images"], np.memmap)  # not in memory
    assert (read.image_px, read.target, read.settings["rate"]) == (16, 3, RATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_prepare_applies_perturbed_images_with_the_trigger(tmp_path, clean):
    artefact = write(tmp_path / "a", "marked", clean)
    dataset = prepare(config(tmp_path / "d", Marked(artefact=tmp_path / "a")), progress=False)
    images, labels, _ = read_beton(dataset.train)
    poisoned = read_truth(dataset.folder)["train"].poisoned
    assert np.flatnonzero(poisoned).tolist() == artefact.arrays["index"].tolist()
    assert (labels == clean[1]).all()
    assert (images[~poisoned] == clean[0][~poisoned]).all()
    assert (images[poisoned] == black_line(clean[0][poisoned] // 2)).all()
    tested, _, _ = read_beton(dataset.test)
    triggered, _, _ = read_beton(dataset.folder / "test_triggered.beton")
    assert (triggered == black_line(tested)).all()


def test_prepare_applies_an_optimised_pattern(tmp_path, clean):
    artefact = write(tmp_path / "a", "mixed", clean)
    dataset = prepare(config(tmp_path / "d", Mixed(artefact=tmp_path / "a")), progress=False)
    images, labels, _ = read_beton(dataset.train)
    poisoned = read_truth(dataset.folder)["train"].poisoned
    assert poisoned.sum() == 12
    assert (labels[poisoned] == 3).all()
    wanted = mix(clean[0][poisoned], artefact.arrays["pattern"], artefact.arrays["mask"])
    assert (images[poisoned] == wanted).all()


def refused(tmp_path: Path, wrong: PrepareConfig, says: str) -> None:
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=says):
        prepare(wrong, progress=False)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name != "d") == before


def test_artefacts_that_are_for_something_else(tmp_path, clean):
    path = tmp_path / "a"
    write(path, "marked", clean)
    attack = Marked(artefact=path)
    refused(tmp_path, config(tmp_path / "d", attack, source=replace(SOURCE, train_per_class=30)), "another data set")
    refused(tmp_path, config(tmp_path / "d", attack, target=4), "made for target 3, not 4")
    refused(tmp_path, config(tmp_path / "d", attack, seed=1), "have no perturbation.*rate 0.05, seed 0")
    refused(tmp_path, config(tmp_path / "d", attack, rate=0.09), "have no perturbation")
    refused(
        tmp_path,
        config(tmp_path / "d", Mixed(artefact=path)),
        "an artefact for marked",
    )
    refused(tmp_path, config(tmp_path / "d", Marked(artefact=tmp_path / "none")), "not an artefact")
    other = (np.zeros((240, 20, 20, 3), dtype=np.uint8), clean[1])
    write(path, "marked", other)
    refused(tmp_path, config(tmp_path / "d", attack), "made for images of 20 px, these have 16 px")


def edit(path: Path, *, seal: bool, **changes: Any) -> None:
    content = json.loads((path / "artefact.json").read_text()) | changes
    if seal:
        del content["checksum"]
        content["checksum"] = sha256_json(content)
    (path / "artefact.json").write_text(json.dumps(content))


def test_damaged_artefacts(tmp_path, clean):
    path = tmp_path / "a"

    def damaged(says: str) -> None:
        with pytest.raises(UserError, match=says):
            read_artefact(path, "marked")

    write(path, "marked", clean)
    raw = bytearray((path / ARRAYS_FILE).read_bytes())
    raw[len(raw) // 2] ^= 1
    (path / ARRAYS_FILE).write_bytes(bytes(raw))
    damaged("sha256")
    (path / ARRAYS_FILE).unlink()
    damaged("cannot be read")
    write(path, "marked", clean)
    edit(path, seal=False, target=4)
    damaged("edited")
    edit(path, seal=True, format_version=9)
    damaged("format version 9")
    edit(path, seal=True, more=1)
    damaged("not the description")
    for text in ("{", "[" * 100_000):
        (path / "artefact.json").write_text(text)
        damaged("not the description")


@pytest.mark.parametrize(
    ("field", "value"), [("fingerprint", None), ("target", "3"), ("settings", []), ("image_px", True), ("sha256", 0)]
)
def test_descriptions_of_the_wrong_type(field, value, tmp_path, clean):
    write(tmp_path / "a", "mixed", clean)
    edit(tmp_path / "a", seal=True, **{field: value})
    refused(tmp_path, config(tmp_path / "d", Mixed(artefact=tmp_path / "a")), f"field {field} is ")


def test_an_artefact_that_changes_nothing(tmp_path, clean):
    arrays = {"pattern": np.zeros((16, 16, 3), dtype=np.uint8), "mask": np.zeros((16, 16), dtype=np.uint8)}
    write(tmp_path / "a", "mixed", clean, arrays=arrays)
    refused(tmp_path, config(tmp_path / "d", Mixed(artefact=tmp_path / "a")), "changes no pixel")


def test_all_to_all_takes_an_artefact_for_any_target(tmp_path, clean):
    write(tmp_path / "a", "mixed", clean)
    attack = Mixed(artefact=tmp_path / "a", mapping="all-to-all")
    assert prepare(config(tmp_path / "d", attack), progress=False).manifest.target is None


@pytest.mark.parametrize("what", ["order", "length", "dtype", "pickle", "grey"])
def test_arrays_that_are_not_right(what, tmp_path, clean):
    path = tmp_path / "a"
    write(path, "marked", clean)
    index, images = np.arange(4), np.zeros((4, 16, 16, 3), dtype=np.uint8)
    arrays: dict[str, np.ndarray] = {"index": index, "images": images}
    arrays |= {
        "order": {"index": index[::-1].copy()}, "length": {"images": images[:3]}, "dtype": {"images": images * 1.0},
        "grey": {"images": images[..., :1]}, "pickle": {"index": np.array([{}, 1, 2, 3], dtype=object)},
    }[what]  # fmt: skip
    np.savez(path / ARRAYS_FILE, **arrays)  # type: ignore[arg-type]
    from data_prep.io.hashes import sha256_file

    edit(path, seal=True, sha256=sha256_file(path / ARRAYS_FILE))
    with pytest.raises(UserError) as error:
        read_artefact(path, "marked")
    assert "dbd craft" in str(error.value)
