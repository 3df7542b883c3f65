"""One artefact in the making: what is asked for, the hidden folder that its parts gather in, and how they become the
artefact."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.artefacts import DESCRIPTION_FILE, Artefact, read_artefact, write_artefact
from data_prep.dataset.manifest import Dataset, open_dataset
from data_prep.errors import UserError
from dbd_dist.craft import CRAFTS
from dbd_dist.craft.craft import Craft, TrainingSet, Work
from dbd_dist.distributed.world import World
from dbd_dist.fields import digest, from_dict, to_dict
from dbd_dist.models.exported import Exported, read_exported
from dbd_dist.runtime.machine import versions
from dbd_dist.runtime.progress import ProgressFile

REVISION = 1
"""Counted up whenever a change of the code changes what is made: parts made before are not used then."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every process that works on an artefact needs to know."""

    craft: Craft
    data: Path
    weights: Path
    """Of the surrogate or backbone, its description beside them."""
    work: Path
    """Folder of finished parts, hidden beside the artefact; on storage that all nodes share."""

    @property
    def progress(self) -> Path:
        return self.work / "progress.json"

    def to_dict(self) -> dict[str, Any]:
        paths = {name: str(getattr(self, name)) for name in ("data", "weights", "work")}
        return {"name": self.craft.name, "craft": to_dict(self.craft), **paths}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        craft = from_dict(CRAFTS.find(values["name"], where="the attack to craft"), values["craft"], where="craft")
        return cls(craft=craft, **{name: Path(values[name]) for name in ("data", "weights", "work")})


def check_data(craft: Craft, data: TrainingSet) -> None:
    """What can be refused once the data set is known.

    Raises:
        UserError: not a clean data set; the settings do not fit it.
    """
    manifest, folder, hint = data.dataset.manifest, data.dataset.folder, "make one with `dbd prepare SOURCE clean`"
    if manifest.attack["kind"] != "clean":
        what = f"the data set is poisoned already ({manifest.attack['kind']})"
        raise UserError(what, where=folder, expected="a clean one", hint=hint)
    if manifest.encoding["kind"] != "raw":  # `prepare` applies what is crafted to the source's own pixels
        what = f"the data set holds its images as {manifest.encoding['kind']}: not the pixels that will be poisoned"
        raise UserError(what, where=folder, expected="a raw one", hint=f"{hint}; --encoding comes with the attack")
    craft.check(data)


def check_network(craft: Craft, exported: Exported, dataset: Dataset) -> None:
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
    if craft.network == "backbone" and exported.class_names is not None:
        raise UserError("a classifier", where=exported.weights, expected="a self-supervised backbone")
    if craft.network == "surrogate" and exported.class_names != manifest.class_names:
        theirs = None if exported.class_names is None else ", ".join(exported.class_names[:10])
        raise UserError(
            "a backbone without classes" if theirs is None else f"the surrogate's classes are {theirs}",
            where=exported.weights,
            expected=f"a classifier of the data set's {manifest.num_classes} classes",
        )


def run(job: Job, world: World) -> None:
    """Make what is missing in the work folder; every rank calls it.

    Raises:
        UserError: see `Craft.make`.
    """
    progress = ProgressFile(job.progress)
    work = Work(
        data=TrainingSet.read(open_dataset(job.data)),
        exported=read_exported(job.weights),
        world=world,
        folder=job.work,
        tick=progress.tick if world.is_main else lambda *_: None,
        note=progress.note,
    )
    job.craft.make(work)


def settings(craft: Craft, dataset: Dataset | None = None, exported: Exported | None = None) -> dict[str, Any]:
    """What an artefact is recognised by, beside its kind, target and fingerprint; the flags alone where the others are
    not known yet."""
    values = {name: value for name, value in to_dict(craft).items() if name not in craft.no_effect}
    if dataset is not None and exported is not None:
        values["data_hash"] = dataset.manifest.data_hash
        values[f"{craft.network}_sha256"] = exported.sha256
        values[f"{craft.network}_network"] = to_dict(exported.network)
    return values


def work_folder(out: Path, made_with: Mapping[str, Any], craft: Craft) -> Path:
    """Where the parts of an artefact gather: another place for every other artefact at `out`."""
    batch = craft.batch  # decides how parts are cut, where it does not decide what is in them
    return out.with_name(f".{out.name}.craft-{digest([REVISION, craft.name, dict(made_with), batch])}")


def finished(
    out: Path, craft: Craft, made_with: Mapping[str, Any], data: TrainingSet, *, overwrite: bool
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
    hint = "give --overwrite to replace it, or another --out"
    try:
        artefact = read_artefact(out, craft.name, craft.attack.layout)
        differing = [f"with another {n}" for n, value in made_with.items() if artefact.settings.get(n) != value]
        if not differing and artefact.fingerprint == data.fingerprint:
            return artefact
        what = f"this artefact was made {(*differing, 'for another data set')[0]}"
        raise UserError(what, where=out, expected="the one that is asked for")
    except UserError as error:
        if overwrite:
            return None
        raise UserError(error.what, where=error.where, expected=error.expected, hint=hint) from error


def finish(job: Job, out: Path, made_with: Mapping[str, Any], data: TrainingSet) -> Artefact:
    """Write the artefact from the parts, and remove their folder and those of other artefacts that were to be here."""
    arrays, evidence = job.craft.collect(data, job.work)
    artefact = write_artefact(
        out,
        job.craft.name,
        arrays,
        image_px=data.image_px,
        target=job.craft.target,
        fingerprint=data.fingerprint,
        settings=made_with,
        evidence=evidence,
        versions=versions(),
        layout=job.craft.attack.layout,
    )
    for work in out.parent.glob(f".{glob.escape(out.name)}.craft-*"):
        shutil.rmtree(work, ignore_errors=True)
    return artefact
