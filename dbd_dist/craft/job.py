"""One artefact in the making: what is asked for, the hidden folder that its parts gather in, and how they become the
artefact."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.artefacts import DESCRIPTION_FILE, FINGERPRINT_IMAGES, Artefact, fingerprint, read_artefact
from data_prep.artefacts import write_artefact as write
from data_prep.beton.ffcv import BetonStream
from data_prep.dataset.manifest import Dataset, open_dataset
from data_prep.errors import UserError
from data_prep.plan import check_target
from dbd_dist.craft import adaptive, label_consistent
from dbd_dist.craft.config import CONFIGS, AdaptiveConfig, CraftConfig, LabelConsistentConfig
from dbd_dist.distributed.world import World
from dbd_dist.fields import digest, from_dict, to_dict
from dbd_dist.models.exported import Exported, read_exported
from dbd_dist.runtime.progress import ProgressFile
from dbd_dist.runtime.run_folder import versions

REVISION = 1
"""Counted up whenever a change of the code changes what is made: parts made before are not used then."""
NO_EFFECT = {"label-consistent": ("batch",), "adaptive": ()}
"""Settings that change no artefact."""

_REPLACE = "give --overwrite to replace it, or another --out"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every process that works on an artefact needs to know."""

    config: CraftConfig
    data: Path
    weights: Path
    """Of the surrogate or backbone, its description beside them."""
    work: Path
    """Folder of finished parts, hidden beside the artefact; on storage that all nodes share."""

    @property
    def progress(self) -> Path:
        return self.work / "progress.json"

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.config.kind,
            "config": to_dict(self.config),
            **{name: str(getattr(self, name)) for name in ("data", "weights", "work")},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        config: CraftConfig = from_dict(CONFIGS[values["kind"]], values["config"])
        return cls(config=config, **{name: Path(values[name]) for name in ("data", "weights", "work")})

    def check(self, workers: int) -> None:
        """What depends on the number of workers.

        Raises:
            UserError
        """
        if isinstance(self.config, AdaptiveConfig):
            adaptive.check(self.config, open_dataset(self.data).manifest.image_px, workers)


@dataclass(frozen=True)
class TrainingSet:
    """What the settings are checked against, and what the artefact is recognised by."""

    labels: np.ndarray
    """int64 (n,)."""
    fingerprint: str

    @classmethod
    def read(cls, dataset: Dataset) -> TrainingSet:
        count = dataset.manifest.counts["train"]
        with BetonStream(dataset.train, expect_count=count, expect_px=dataset.manifest.image_px) as stream:
            first = np.arange(min(count, FINGERPRINT_IMAGES))
            images, _, _ = next(stream.batches(first, len(first)))
            return cls(stream.labels, fingerprint(stream.labels, images.copy()))


def check_data(config: CraftConfig, dataset: Dataset, labels: np.ndarray) -> None:
    """What can be refused once the data set is known.

    Raises:
        UserError: not a clean data set; the settings do not fit it.
    """
    manifest = dataset.manifest
    if manifest.attack["kind"] != "clean":
        raise UserError(
            f"the data set is poisoned already ({manifest.attack['kind']})",
            where=dataset.folder,
            expected="a clean one",
            hint="make one with `dbd prepare SOURCE clean`",
        )
    if manifest.encoding["kind"] != "raw":  # `prepare` applies what is crafted to the source's own pixels
        raise UserError(
            f"the data set holds its images as {manifest.encoding['kind']}: not the pixels that will be poisoned",
            where=dataset.folder,
            expected="a raw one",
            hint="make one with `dbd prepare SOURCE clean`; --encoding comes with the attack",
        )
    check_target(config.target, manifest.class_names)
    if isinstance(config, LabelConsistentConfig):
        label_consistent.chosen(config, labels, manifest.num_classes)
    else:
        adaptive.check(config, manifest.image_px, workers=1)
        if (labels == config.target).all():
            raise UserError("there are no images outside the target class", where=dataset.folder)


def check_network(config: CraftConfig, exported: Exported, dataset: Dataset) -> None:
    """Refuse a surrogate or backbone that is for other images.

    Raises:
        UserError: other classes, another image size, or a backbone where a classifier is needed and the reverse.
    """
    manifest = dataset.manifest
    if exported.image_px != manifest.image_px:
        raise UserError(
            f"the network is for images of {exported.image_px} px, the data set has {manifest.image_px} px",
            where=exported.weights,
        )
    if isinstance(config, AdaptiveConfig):
        if exported.class_names is not None:
            raise UserError("a classifier", where=exported.weights, expected="a self-supervised backbone")
    elif exported.class_names != manifest.class_names:
        theirs = None if exported.class_names is None else ", ".join(exported.class_names[:10])
        raise UserError(
            "a backbone without classes" if theirs is None else f"the surrogate's classes are {theirs}",
            where=exported.weights,
            expected=f"a classifier of the data set's {manifest.num_classes} classes",
        )


def run(job: Job, world: World) -> None:
    """Make what is missing in the work folder; every rank calls it.

    Raises:
        UserError: see `label_consistent.craft` and `adaptive.craft`.
    """
    dataset, exported = open_dataset(job.data), read_exported(job.weights)
    progress = ProgressFile(job.progress)
    tick = progress.tick if world.is_main else lambda *_: None
    if isinstance(job.config, LabelConsistentConfig):
        label_consistent.craft(job.config, exported, dataset, world, job.work, tick)
    else:
        adaptive.craft(job.config, exported, dataset, world, job.work, tick, progress.note)


def settings(config: CraftConfig, dataset: Dataset, exported: Exported) -> dict[str, Any]:
    """What an artefact is recognised by, beside its kind, target and fingerprint."""
    values = {name: value for name, value in to_dict(config).items() if name not in NO_EFFECT[config.kind]}
    network = "surrogate" if isinstance(config, LabelConsistentConfig) else "backbone"
    return {
        **values,
        "data_hash": dataset.manifest.data_hash,
        f"{network}_sha256": exported.sha256,
        f"{network}_network": to_dict(exported.network),
    }


def work_folder(out: Path, made_with: Mapping[str, Any], config: CraftConfig) -> Path:
    """Where the parts of an artefact gather: another place for every other artefact at `out`."""
    batch = config.batch  # decides how parts are cut, where it does not decide what is in them
    return out.with_name(f".{out.name}.craft-{digest([REVISION, config.kind, dict(made_with), batch])}")


def finished(
    out: Path, config: CraftConfig, made_with: Mapping[str, Any], training_fingerprint: str, *, overwrite: bool
) -> Artefact | None:
    """The artefact at `out`, where it is the one that is asked for; None where there is none, or it may be replaced.

    Args:
        made_with: all or some of `settings`.

    Raises:
        UserError: there is another one, or something that is no artefact.
    """
    if not out.exists() and not out.is_symlink():
        return None
    if not (out / DESCRIPTION_FILE).is_file():
        raise UserError("this is there already, and is no artefact", where=out, expected="a new folder's path")
    try:
        artefact = read_artefact(out, config.kind)
    except UserError as error:
        if overwrite:
            return None
        raise UserError(error.what, where=error.where, expected=error.expected, hint=_REPLACE) from error
    same = all(artefact.settings.get(name) == value for name, value in made_with.items())
    if same and artefact.fingerprint == training_fingerprint:
        return artefact
    if overwrite:
        return None
    differing = [name for name, value in made_with.items() if artefact.settings.get(name) != value]
    raise UserError(
        f"this artefact was made {'with another ' + differing[0] if differing else 'for another data set'}",
        where=out,
        expected="the one that is asked for",
        hint=_REPLACE,
    )


def finish(job: Job, out: Path, made_with: Mapping[str, Any], dataset: Dataset, training: TrainingSet) -> Artefact:
    """Write the artefact from the parts, and remove their folder and those of other artefacts that were to be here."""
    if isinstance(job.config, LabelConsistentConfig):
        index = label_consistent.chosen(job.config, training.labels, dataset.manifest.num_classes)
        arrays, evidence = label_consistent.collect(job.config, index, job.work)
    else:
        arrays, evidence = adaptive.collect(job.work)
    artefact = write(
        out,
        job.config.kind,
        arrays,
        target=job.config.target,
        fingerprint=training.fingerprint,
        settings=made_with,
        evidence=evidence,
        versions=versions(),
    )
    for work in out.parent.glob(f".{glob.escape(out.name)}.craft-*"):
        shutil.rmtree(work, ignore_errors=True)
    return artefact
