"""Prepare a data set: source and attack in, dataset folder out. Open, plan, write, install."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import preview
from data_prep.artefacts import FINGERPRINT_IMAGES, fingerprint
from data_prep.attacks import Crafted
from data_prep.beton import file_bytes
from data_prep.config import PrepareConfig
from data_prep.dataset import samples, truth
from data_prep.dataset.manifest import FILE as MANIFEST
from data_prep.dataset.manifest import Dataset, Manifest, open_dataset, read_manifest, record_files, write_manifest
from data_prep.dataset.samples import SplitSamples
from data_prep.dataset.truth import SplitTruth
from data_prep.encode import EncodedSplit, encode_split, psnr_db, readable
from data_prep.errors import UserError, printable
from data_prep.io import lock
from data_prep.io.atomic import remove_stale, replacing_folder
from data_prep.io.hashes import data_hash, sha256_json
from data_prep.plan import PoisonPlan, check_target, draw_plan
from data_prep.sources import OpenSource, Split
from data_prep.sources.classes import check_classes, holdout
from data_prep.sources.source import probe_px
from data_prep.stealth import compare, sample_size, summarise

_PREVIEW_IMAGES = 6
_ROW_BYTES = 128  # of samples.parquet and truth.parquet together; most of it the name of the image's file


def prepare(config: PrepareConfig, progress: bool = True) -> Dataset:
    """Make the data set, or return it where it is there already, made the same way and undamaged.

    It is written into a hidden folder beside its own and renamed when whole; whatever goes wrong, Ctrl-C
    included, nothing half-written stays. Poisoned training images carry the trigger and the attack's label;
    `test_triggered` holds every test image with the trigger and its true label. Equal configs on equal images
    give equal content hashes, whatever the number of workers.

    Args:
        config: what to make.
        progress: show it on stderr.

    Raises:
        UserError: anything in the config, the images or the target folder that does not work out.
    """
    try:
        config = config.with_target(config.source.open().class_names) if isinstance(config.target, str) else config
        made = config.describe()
        existing = _existing(config, made)
        if existing is None:
            source = config.source.open()
            if progress:
                for note in source.notes:
                    print(f"note: {printable(note)}", file=sys.stderr, flush=True)
            px = probe_px(source, skip_bad=config.source.on_bad_image == "skip")
            _check_attack(config, source, px)
            _set_aside(config, source)
            target = config.folder.absolute()
            with lock.held(target.with_name(f".{target.name}.lock"), str(target), flag="--out", wait=True) as is_held:
                if is_held:
                    remove_stale(target.parent, target.name)  # whose lock is ours: to remove_dead it looks alive
                    lock.remove_dead(target.parent)
                existing = _existing(config, made)  # whoever was faster made the same
                if existing is None:
                    return _make(config, source, px, made, progress)
        if progress:
            print(f"{existing.folder} is there already, made the same way", file=sys.stderr, flush=True)
        return existing
    except OSError as error:
        raise UserError(
            f"cannot be read or written ({error.strerror or error})", where=error.filename or config.folder
        ) from error


def _make(config: PrepareConfig, source: OpenSource, px: int, made: dict[str, Any], progress: bool) -> Dataset:
    """Write the folder whole, or not at all."""
    with replacing_folder(config.folder, overwrite=config.overwrite) as folder:
        _check_space(folder, source, px, config)
        source, skipped = _readable(config, source, px, progress)
        source, clean = _set_aside(config, source)
        plan = _plan(config, source, px)
        manifest = _write(config, source, clean, plan, px, folder, made, skipped, progress)
    return Dataset(config.folder, manifest)


def _existing(config: PrepareConfig, made: dict[str, Any]) -> Dataset | None:
    """The data set that is there already; None where there is nothing, or something to be replaced."""
    folder = config.folder
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not folder.is_dir():
        raise UserError("is a file", where=folder, hint="choose another folder with --out")
    if not os.path.lexists(folder / MANIFEST):  # never delete what is no data set
        raise UserError("is not empty and not a data set", where=folder, hint="choose another folder with --out")
    try:
        manifest = read_manifest(folder)
        differing = [name for name, value in made.items() if sha256_json(getattr(manifest, name)) != sha256_json(value)]
        if differing:
            name = differing[-1]
            difference = _difference(name, getattr(manifest, name), made[name])
            raise UserError(f"another data set is there: its {difference}", where=folder)
        if config.untrusted == (truth.FILE in manifest.files):
            raise UserError("another data set is there: only one of the two is untrusted", where=folder)
        return open_dataset(folder)
    except UserError as error:
        if not config.overwrite:
            raise UserError(
                error.what,
                where=error.where,
                hint="replace it with --overwrite, or choose another folder with --out",
            ) from error
    return None


def _difference(name: str, there: object, here: object) -> str:
    """What distinguishes two data sets, by the flags that were given for them."""
    if isinstance(there, dict) and isinstance(here, dict):
        told = next((key for key in ("kind", "name") if key in here and there.get(key) != here[key]), None)
        if told is None:
            keys = [key for key in (*there, *here) if sha256_json(there.get(key)) != sha256_json(here.get(key))]
            more = f" ({len(set(keys))} settings differ)" if len(set(keys)) > 1 else ""
            # of an encoding's settings, quality is --jpeg-quality; those of sources and attacks are flags as they are
            flag = f"--{'jpeg-' if name == 'encoding' else ''}{keys[0].replace('_', '-')}"
            return f"{flag} {_given(there.get(keys[0]), here.get(keys[0]))}{more}"
        there, here = there.get(told), here[told]
    words = name if name in ("name", "source", "attack") else f"--{name.replace('_', '-')}"
    return f"{words} {_given(there, here)}"


def _given(there: object, here: object) -> str:
    def words(value: object) -> str:
        text = str(value)
        return text if len(text) <= 80 else text[:77] + "..."

    if there is None:
        return f"is not given, here it is {words(here)}"
    return f"is {words(there)}, not {words(here)}" if here is not None else f"is {words(there)}, here it is not given"


# -------------------------------------------------------------------------------- open


def _check_attack(config: PrepareConfig, source: OpenSource, px: int) -> None:
    """A target or trigger that does not fit the images fails here, before any work."""
    if config.has_attack:
        check_target(config.poison_target, source.class_names)
        attack = config.poison
        for trigger in (attack.train_trigger, attack.cover_trigger, attack.test_trigger):
            trigger(px)


def _check_space(folder: Path, source: OpenSource, px: int, config: PrepareConfig) -> None:
    needed = space_bytes(len(source.train), len(source.test), px, config.has_attack)
    free = shutil.disk_usage(folder).free
    if config.quality is not None:
        needed //= 2  # photographs take a third of their pixels at most as JPEG, and noise more
    if needed > free:
        raise UserError(
            f"the data set needs at least {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            where=folder.parent,
            hint="make room, or keep fewer images with train_per_class",
        )


def space_bytes(train: int, test: int, px: int, has_attack: bool) -> int:
    """What a dataset folder takes at most: its .beton files, `_ROW_BYTES` an image for both tables, and the preview."""
    splits = [train, test, *([test] if has_attack else [])]
    preview_bytes = _PREVIEW_IMAGES * 3 * max(px, 192) ** 2 * 3  # small images are enlarged to at most 192 px
    return sum(file_bytes(count, px) + count * _ROW_BYTES for count in splits if count) + preview_bytes


def _readable(config: PrepareConfig, source: OpenSource, px: int, progress: bool) -> tuple[OpenSource, list[str]]:
    """The source without images that cannot be decoded, where they are to be left out, and what was left out."""
    if config.source.on_bad_image == "fail":
        return source, []
    (train, first), (test, second) = (
        readable(split, px, threads=config.threads, title=f"check {name}", progress=progress)
        for name, split in (("train", source.train), ("test", source.test))
    )
    notes = check_classes(source.class_names, train.labels, test.labels, where=None)
    notes = (*source.notes, *(note for note in notes if note not in source.notes))
    return OpenSource(source.class_names, train, test, notes, source.skipped), [*source.skipped, *first, *second]


def _set_aside(config: PrepareConfig, source: OpenSource) -> tuple[OpenSource, Split | None]:
    """The source without the training images that are set aside clean, and these; None where none are."""
    if config.holdout_clean is None:
        return source, None
    rng = np.random.default_rng([config.source.subset_seed, 2])
    drawn = holdout(source.train.labels, config.holdout_clean, source.class_names, rng, where="holdout_clean")
    return replace(source, train=source.train.take(~drawn)), source.train.take(drawn)


# -------------------------------------------------------------------------------- plan


def _plan(config: PrepareConfig, source: OpenSource, px: int) -> PoisonPlan:
    """Draw who is poisoned, and check a crafted attack against the images that it is for."""
    train, attack, target = source.train, config.poison, config.poison_target
    plan = draw_plan(
        train.labels,
        attack,
        rate=config.poison_rate,
        target=target,
        num_classes=len(source.class_names),
        seed=config.seed,
        selection=config.decided.selection,
    )
    if isinstance(attack, Crafted):
        first = np.stack([train.read(i) for i in range(min(len(train), FINGERPRINT_IMAGES))])
        seen = fingerprint(train.labels, first)
        attack.check(image_px=px, fingerprint=seen, target=target, poisoned=plan.poisoned)
    return plan


# -------------------------------------------------------------------------------- write


def _write(
    config: PrepareConfig,
    source: OpenSource,
    clean: Split | None,
    plan: PoisonPlan,
    px: int,
    folder: Path,
    made: dict[str, Any],
    skipped: list[str],
    progress: bool,
) -> Manifest:
    """Write every file of the folder."""
    train, test = source.train, source.test
    common: dict[str, Any] = {"px": px, "quality": config.quality, "threads": config.threads, "progress": progress}
    encoded = encode_split(
        train,
        {folder / "train.beton": plan.train_trigger(px)},
        plan.labels,
        watch=np.flatnonzero(plan.poisoned)[: sample_size(px)],
        look=lambda clean, triggered, stored: compare(clean, triggered[0]),
        title="train",
        **common,
    )
    compared = [row for rows in encoded.seen for row in rows]
    if config.has_attack and not any(largest for *_, largest in compared):
        raise UserError(
            f"the trigger changes no pixel of {len(compared)} poisoned images",
            where=config.attack.name,
            hint="make it stronger, or put it elsewhere",
        )
    tested = _write_test(test, plan, px, folder, common)
    hashes, conversions = encoded.content_hash | tested.content_hash, encoded.conversions + tested.conversions
    if clean is not None:
        aside = _write_clean(clean, folder, common)
        hashes, conversions = hashes | aside.content_hash, conversions + aside.conversions
    _write_tables(source, clean, plan, folder, untrusted=config.untrusted)
    hashes = {name.removesuffix(".beton"): value for name, value in hashes.items()}
    sizes = {"train": len(train), "holdout": 0 if clean is None else len(clean)}
    manifest = Manifest(
        **made,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        image_px=px,
        counts={split: sizes.get(split, len(test)) for split in hashes},
        poisoned=int(plan.poisoned.sum()),
        covers=int(plan.cover.sum()),
        label_map=plan.label_map,
        encoding_psnr_db=psnr_db(encoded.squared_error, len(train) * px * px * 3),
        stealth=summarise(compared) if config.has_attack else None,
        content_hash=hashes,
        data_hash=data_hash(hashes),
        files=record_files(folder),
        versions={package: metadata.version(package) for package in ("numpy", "pillow", "pyarrow")},
        skipped=tuple(skipped),
        conversions=dict(conversions),
        notes=source.notes,
    )
    write_manifest(folder, manifest)
    return manifest


def _write_test(test: Split, plan: PoisonPlan, px: int, folder: Path, common: dict[str, Any]) -> EncodedSplit[Any]:
    """Write test.beton, and with an attack test_triggered.beton and preview.png, decoding once."""
    files, trigger = {folder / "test.beton": None}, plan.test_trigger(px)
    if trigger is not None:
        files |= {folder / "test_triggered.beton": trigger}
    classes, first = np.unique(test.labels, return_index=True)  # not every class has test images
    to = np.array(plan.label_map or np.arange(classes.max() + 1), dtype=np.int64)  # no attack moves nothing
    moved = to[classes] != classes  # what shows the attack
    encoded = encode_split(
        test,
        files,
        test.labels,
        watch=np.sort(first[moved] if moved.any() else first)[:_PREVIEW_IMAGES],
        look=lambda clean, triggered, stored: stored,
        title="test",
        **common,
    )
    if trigger is not None:
        before, after = (np.concatenate(images) for images in zip(*encoded.seen))
        preview.write_preview(folder / "preview.png", before, after)
    return encoded


def _write_clean(clean: Split, folder: Path, common: dict[str, Any]) -> EncodedSplit[Any]:
    """Write holdout.beton."""
    nothing = np.zeros(0, dtype=np.int64)
    files = {folder / "holdout.beton": None}
    return encode_split(clean, files, clean.labels, watch=nothing, look=lambda *_: None, title="holdout", **common)


def _write_tables(source: OpenSource, clean: Split | None, plan: PoisonPlan, folder: Path, *, untrusted: bool) -> None:
    """Write samples.parquet, and truth.parquet unless nobody knows it."""
    train, test = source.train, source.test

    def origins(split: Split) -> list[str]:
        return [split.origin(i) for i in range(len(split))]

    rows = {"train": SplitSamples(plan.labels, origins(train)), "test": SplitSamples(test.labels, origins(test))}
    if clean is not None:
        rows["holdout"] = SplitSamples(clean.labels, origins(clean))
    samples.write_samples(folder, rows)
    if untrusted:
        return
    none = np.zeros(len(test), dtype=bool)
    known = {"train": SplitTruth(train.labels, plan.poisoned, plan.cover), "test": SplitTruth(test.labels, none, none)}
    if plan.attack.poisons:
        known["test_triggered"] = SplitTruth(test.labels, ~none, none)
    if clean is not None:
        none = np.zeros(len(clean), dtype=bool)
        known["holdout"] = SplitTruth(clean.labels, none, none)
    truth.write_truth(folder, known)
