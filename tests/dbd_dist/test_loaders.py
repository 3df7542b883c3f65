"""Training images: the same batches streamed, resident, and without FFCV, whatever the files hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from data_prep.attacks import BadNets, NoAttack
from data_prep.beton import ffcv as beton
from data_prep.beton import plain as plain_beton
from data_prep.beton.ffcv import read_beton
from data_prep.dataset.manifest import Dataset, open_dataset
from data_prep.errors import UserError
from data_prep.pipeline import PrepareConfig, prepare
from data_prep.sources import Digits
from dbd_dist.craft.craft import TrainingSet
from dbd_dist.craft.job import check_data
from dbd_dist.craft.label_consistent import LabelConsistent
from dbd_dist.data.loaders import ResidentImages, StreamedImages, open_images
from dbd_dist.data.sampling import epoch_batches
from dbd_dist.stages import simclr

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """As `digits`, its images stored as JPEG."""
    config = PrepareConfig(
        source=Digits(train_per_class=24, test_per_class=5), attack=BadNets(), rate=0.1, encoding="jpeg",
        datasets=tmp_path_factory.mktemp("jpegs"), workers=1,
    )  # fmt: skip
    return prepare(config, progress=False)


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_streamed_resident_and_plain_give_the_same_batches(encoding, digits, jpegs, monkeypatch):
    dataset = open_dataset(digits) if encoding == "raw" else jpegs
    pixels, labels, _ = read_beton(dataset.train)
    positions = epoch_batches(240, 50, torch.Generator().manual_seed(3))
    expected = [torch.from_numpy(pixels[batch.numpy()]).permute(0, 3, 1, 2) for batch in positions]
    assert [len(batch) for batch in expected] == [50] * 4

    def check(images) -> None:
        np.testing.assert_array_equal(images.labels, labels)
        for _ in range(2):  # every epoch anew
            for found, wanted in zip(images.batches(positions), expected, strict=True):
                assert torch.equal(found, wanted)

    for threads in (1, 3):
        check(open_images(dataset, CPU, resident_gib=0.0, threads=threads))
        check(open_images(dataset, CPU, resident_gib=1.0, threads=threads))
    monkeypatch.setattr(beton, "ffcv_installed", lambda: False)
    monkeypatch.setattr(beton, "_ffcv", lambda: pytest.fail("FFCV was asked for"))
    check(open_images(dataset, CPU, resident_gib=0.0, threads=2))
    check(open_images(dataset, CPU, resident_gib=1.0, threads=2))


@pytest.mark.parametrize(("kind", "epochs_decoded"), [(StreamedImages, 2), (ResidentImages, 1)])
def test_an_image_is_decoded_once_for_both_views(kind, epochs_decoded, jpegs, alone, monkeypatch):
    decoded: list[int] = []
    decode = plain_beton.decode_jpeg
    monkeypatch.setattr(beton, "ffcv_installed", lambda: False)
    monkeypatch.setattr(plain_beton, "decode_jpeg", lambda data, **size: (decoded.append(1), decode(data, **size))[1])
    config = replace(tiny.SIMCLR, epochs=2)
    assert 240 % config.batch == 0
    context = tiny.make_context(alone, kind.open(jpegs, CPU, 1) if kind is StreamedImages else kind.read(jpegs, CPU, 1))
    simclr.pretrain(config, tiny.make_contrastive(context), context, None)
    assert len(decoded) == 240 * epochs_decoded


def test_attacks_are_not_crafted_on_jpegs(tmp_path: Path):
    """`prepare` would apply them to other pixels."""
    config = PrepareConfig(
        source=Digits(train_per_class=3, test_per_class=1), attack=NoAttack(), encoding="jpeg", datasets=tmp_path
    )
    dataset = prepare(config, progress=False)
    with pytest.raises(UserError, match="as jpeg: not the pixels") as error:
        check_data(LabelConsistent(), TrainingSet.read(dataset))
    assert error.value.where == dataset.folder
