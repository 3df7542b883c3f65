"""Prepare a data set: source and attack in, dataset folder out."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import MISSING, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from data_prep import preview
from data_prep.artefacts import FINGERPRINT_IMAGES, fingerprint
from data_prep.attacks import (
    SETTINGS,
    AdapBlend,
    AdapPatch,
    Attack,
    BadNets,
    Blended,
    Crafted,
    NoAttack,
    SettingName,
    Sig,
    Trigger,
    WaNet,
)
from data_prep.beton.ffcv import BetonWriter, file_bytes
from data_prep.beton.jpeg import QUALITY, SUBSAMPLING, decode_jpeg, encode_jpeg
from data_prep.dataset import samples, truth
from data_prep.dataset.manifest import Dataset, Manifest, open_dataset, read_manifest, record_files, write_manifest
from data_prep.dataset.samples import SplitSamples
from data_prep.dataset.truth import SplitTruth
from data_prep.errors import UserError
from data_prep.io.hashes import ContentHash, data_hash, sha256_json
from data_prep.plan import check_rate, check_target, choose_covers, choose_poisoned
from data_prep.progress import Progress
from data_prep.sources import Cifar10, Digits, Encoded, ImageFolder, OpenSource, Parquet, Split, check_classes, probe_px
from data_prep.stealth import compare, sample_size, summarise
from data_prep.threads import available_cores, ordered_map

_CHUNK_BYTES = 4 << 20  # of decoded pixels: what one thread works on at a time
_CHUNK_IMAGES = 512
_PREVIEW_IMAGES = 6
_ROW_BYTES = 128  # of samples.parquet and truth.parquet together; most of it the name of the image's file

AnySource = (
    Annotated[Digits, tyro.conf.subcommand("digits")]
    | Annotated[Cifar10, tyro.conf.subcommand("cifar10")]
    | Annotated[ImageFolder, tyro.conf.subcommand("imagefolder")]
    | Annotated[Parquet, tyro.conf.subcommand("parquet")]
)
AnyAttack = (
    Annotated[NoAttack, tyro.conf.subcommand("clean")]
    | Annotated[BadNets, tyro.conf.subcommand("badnets")]
    | Annotated[Blended, tyro.conf.subcommand("blended")]
    | Annotated[WaNet, tyro.conf.subcommand("wanet")]
    | Annotated[Sig, tyro.conf.subcommand("sig")]
    | Annotated[AdapBlend, tyro.conf.subcommand("adap-blend")]
    | Annotated[AdapPatch, tyro.conf.subcommand("adap-patch")]
)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Make a dataset folder: images from a source, some of them poisoned by an attack."""

    source: AnySource
    attack: AnyAttack = field(default_factory=NoAttack)
    setting: SettingName = "paper"
    """Decides rate, target, Blended's alpha and how samples are chosen, where they are not given. paper: target 3,
    exactly 5 % (clean-label attacks 2.5 %), alpha 0.1. released: the same, but a coin is tossed for every image, as in
    the paper's published code. bench: target 0, 10 % (clean-label 5 %), alpha 0.2, as public benchmarks have it."""
    rate: float | None = None
    """Share of all training images to poison: a fraction above 0 and below 1. Without it the setting's."""
    target: int | None = None
    """The label that the attack aims at, from 0. Without it the setting's."""
    seed: int = 0
    """Seed of the choice of poisoned images."""
    encoding: Literal["raw", "jpeg"] = "raw"
    """How the files hold their images. raw: exactly, 3 bytes a pixel (0.15 MB an image of 224 px), nothing to decode.
    jpeg: an eighth of that for photographs, at a small loss to all images, triggers included (the manifest tells), and
    every reading decodes (224 px: some 0.15 ms of a core an image). Images of 32 px are best raw."""
    jpeg_quality: int | None = None
    """1 to 100, with encoding jpeg; without it 95. Lower loses more, and what a subtle trigger changes first."""
    untrusted: bool = False
    """Nobody knows which images are poisoned: write no truth. Goes without an attack."""
    out: Path | None = None
    """The folder to make; without it one named by its content, under datasets."""
    datasets: Path = Path("datasets")
    """Where that folder goes."""
    workers: int | None = None
    """Threads that decode; without it one for each core."""
    overwrite: bool = False
    """Replace a data set of that name that was made otherwise."""

    def __post_init__(self):
        if self.rate is not None:
            check_rate(self.rate)
        if self.untrusted and self.has_attack:
            raise UserError("untrusted images are not poisoned on top", where="untrusted", expected="no attack (clean)")
        if self.target is not None and not self.attack.has_target:
            raise UserError(
                f"target {self.target} is given, and all-to-all has none: each class aims at the next",
                where="target",
                expected="no target, or mapping all-to-one",
            )
        if self.jpeg_quality is not None and self.encoding != "jpeg":
            raise UserError(
                f"jpeg_quality {self.jpeg_quality} is given, and the encoding is {self.encoding}",
                where="jpeg_quality",
                expected="no jpeg_quality, or encoding jpeg",
            )
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"jpeg_quality is {self.jpeg_quality}", where="jpeg_quality", expected="1 to 100")
        if self.out is not None and self.out.name in ("", ".."):  # "." cannot be replaced under its user's feet
            raise UserError(f"{str(self.out)!r} names no folder to make", where="out", expected="a new folder's path")
        for name, lowest in (("seed", 0), ("target", 0), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"{name} is {value}", where=name, expected=f"{lowest} or more")

    @property
    def has_attack(self) -> bool:
        """Is anything poisoned?"""
        return not isinstance(self.attack, NoAttack)

    @property
    def poison(self) -> Attack:
        """The attack, with what the setting decides."""
        return self.attack.with_protocol(self.setting)

    @property
    def poison_rate(self) -> float:
        """Given, or of the setting."""
        if self.rate is not None:
            return self.rate
        setting = SETTINGS[self.setting]
        return setting.clean_label_rate if self.attack.clean_label else setting.rate

    @property
    def poison_target(self) -> int:
        """Given, or of the setting; 0, which means nothing, where the attack has no target."""
        if not self.attack.has_target:
            return 0
        return self.target if self.target is not None else SETTINGS[self.setting].target

    @property
    def quality(self) -> int | None:
        """Of the JPEGs; None where images are raw."""
        return None if self.encoding == "raw" else self.jpeg_quality or QUALITY

    @property
    def setting_name(self) -> str:
        """Of the setting, where all of its numbers stand; else "custom"."""
        setting = SETTINGS[self.setting]
        rate = setting.clean_label_rate if self.attack.clean_label else setting.rate
        stands = self.poison_rate == rate and (not self.attack.has_target or self.poison_target == setting.target)
        stands = stands and self.poison == type(self.attack)(**_required(self.attack)).with_protocol(self.setting)
        return self.setting if stands else "custom"

    @property
    def name(self) -> str:
        """What the data set is, e.g. digits-badnets-r0.05-t3-s0."""
        parts = [self.source.slug, self.attack.slug]
        if self.has_attack:
            parts += [] if self.setting == "paper" else [self.setting]
            parts += [f"r{self.poison_rate:g}"]
            parts += [f"t{self.poison_target}"] if self.attack.has_target else []
            parts += [f"s{self.seed}"]
        parts += [] if self.quality is None else [f"jpeg{self.quality}"]
        return "-".join(parts)

    @property
    def folder(self) -> Path:
        """The dataset folder to make."""
        return self.out if self.out is not None else self.datasets / self.name


def _required(attack: Attack) -> dict[str, Any]:
    """The fields that an attack has no default for."""
    return {f.name: getattr(attack, f.name) for f in fields(attack) if f.default is MISSING}


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
        made = _description(config)
        existing = _existing(config, made)
        if existing is not None:
            if progress:
                print(f"{existing.folder} is there already, made the same way", file=sys.stderr, flush=True)
            return existing
        return _make(config, made, progress)
    except OSError as error:
        raise UserError(
            f"cannot be read or written ({error.strerror or error})", where=error.filename or config.folder
        ) from error


def _make(config: PrepareConfig, made: dict[str, object], progress: bool) -> Dataset:
    source = config.source.open()
    skip_bad = config.source.on_bad_image == "skip"
    px = probe_px(source, skip_bad=skip_bad)
    if config.has_attack:
        check_target(config.poison_target, source.class_names)
        attack = config.poison
        for trigger in (attack.train_trigger, attack.cover_trigger, attack.test_trigger):
            trigger(px)  # one that does not fit the images fails here, before any work
        if not skip_bad:
            _choose(config, source, px)
    partial = config.folder.with_name(f".{config.folder.name}.{os.getpid()}.partial")
    missing = [folder for folder in partial.parents if not os.path.lexists(folder)]
    try:
        partial.mkdir(parents=True)
        _check_space(partial, source, px, config)
        skipped: list[str] = []
        if skip_bad:
            source, skipped = _without_bad_images(config, source, px, progress)
        manifest = _write(config, source, px, partial, made, skipped, progress)
        _install(partial, config, made)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:  # that were made for it; those that hold something by now stay
            with suppress(OSError):
                folder.rmdir()
    return Dataset(config.folder, manifest)


def _description(config: PrepareConfig) -> dict[str, object]:
    """What decides the content, as it stands in the manifest."""
    return {
        "name": config.name,
        "source": config.source.describe(),
        "attack": config.poison.describe(),
        "rate": float(config.poison_rate) if config.has_attack else None,
        "target": config.poison_target if config.has_attack and config.attack.has_target else None,
        "setting": config.setting_name if config.has_attack else None,
        "selection": SETTINGS[config.setting].selection if config.has_attack else None,
        "seed": config.seed if config.has_attack else 0,
        "encoding": _describe_encoding(config.quality),
    }


def _describe_encoding(quality: int | None) -> dict[str, object]:
    return {"kind": "raw"} if quality is None else {"kind": "jpeg", "quality": quality, "subsampling": SUBSAMPLING}


def _existing(config: PrepareConfig, made: dict[str, object]) -> Dataset | None:
    """The data set that is there already; None where there is nothing, or something to be replaced."""
    folder = config.folder
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not folder.is_dir():
        raise UserError("is a file", where=folder, hint="choose another folder with out")
    if not os.path.lexists(folder / "manifest.json"):  # never delete what is no data set
        raise UserError("is not empty and not a data set", where=folder, hint="choose another folder with out")
    try:
        manifest = read_manifest(folder)
        differing = [name for name, value in made.items() if sha256_json(getattr(manifest, name)) != sha256_json(value)]
        if differing:
            name = differing[-1] if differing != ["name"] else "name"
            raise UserError(
                f"another data set is there: its {name} is {_short(getattr(manifest, name))}, not {_short(made[name])}",
                where=folder,
            )
        if config.untrusted == (truth.FILE in manifest.files):
            raise UserError("another data set is there: only one of the two is untrusted", where=folder)
        return open_dataset(folder)
    except UserError as error:
        if not config.overwrite:
            raise UserError(
                error.what,
                where=error.where,
                hint="replace it with overwrite, or choose another folder with out",
            ) from error
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


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


def _install(partial: Path, config: PrepareConfig, made: dict[str, object]) -> None:
    """Put the finished folder under its name."""
    old = partial.with_suffix(".old")
    if config.overwrite and config.folder.exists():
        config.folder.rename(old)
    try:
        partial.rename(config.folder)
    except OSError:
        if old.exists():
            old.rename(config.folder)
            raise
        if _existing(config, made) is None:  # another process was faster: fine if it made the same
            raise
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class _Roles:
    """What happens to each training image: bool (n,) each, no image both."""

    poisoned: np.ndarray
    cover: np.ndarray

    @classmethod
    def none(cls, count: int) -> _Roles:
        return cls(np.zeros(count, dtype=bool), np.zeros(count, dtype=bool))


def _choose(config: PrepareConfig, source: OpenSource, px: int) -> _Roles:
    """Draw the poisoned images and the covers, and check a crafted attack against the images it is for."""
    train, attack, target = source.train, config.poison, config.poison_target
    poisoned = choose_poisoned(
        train.labels,
        rate=config.poison_rate,
        target=target,
        num_classes=len(source.class_names),
        seed=config.seed,
        eligible=attack.eligible(train.labels, target),
        selection=SETTINGS[config.setting].selection,
    )
    if isinstance(attack, Crafted):
        first = np.stack([train.read(i) for i in range(min(len(train), FINGERPRINT_IMAGES))])
        seen = fingerprint(train.labels, first)
        attack.check(image_px=px, fingerprint=seen, target=target, poisoned=poisoned)
    if not attack.covers_per_poisoned:
        return _Roles(poisoned, np.zeros_like(poisoned))
    return _Roles(poisoned, choose_covers(poisoned, ratio=attack.covers_per_poisoned, seed=config.seed))


@dataclass(frozen=True)
class _Stored:
    """Images as a file will hold them."""

    data: np.ndarray | list[bytes]
    """What the writer takes."""
    pixels: np.ndarray
    """uint8 (b, H, W, 3): what will be decoded from it."""
    squared_error: int
    """The sum over what the two differ by."""

    @classmethod
    def of(cls, images: np.ndarray, quality: int | None) -> _Stored:
        if quality is None:
            return cls(images, images, 0)
        height, width = images.shape[1:3]
        data = [encode_jpeg(image, quality) for image in images]
        pixels = np.stack([decode_jpeg(d, height_px=height, width_px=width) for d in data])
        return cls(data, pixels, int(np.square(pixels.astype(np.int32) - images).sum()))


def _psnr_db(squared_error: int, values: int) -> float | None:
    return round(10 * float(np.log10(255**2 * values / squared_error)), 3) if squared_error else None


def _workers(config: PrepareConfig) -> int:
    return config.workers if config.workers is not None else available_cores()


def _chunks(split: Split, px: int) -> Iterator[list[tuple[int, Encoded]]]:
    """The split's images with their positions, encoded, in lists of a few megabytes when decoded."""
    size = max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // (px * px * 3)))
    stream = enumerate(split.stream())
    while chunk := list(itertools.islice(stream, size)):
        yield chunk


def _decode(split: Split, i: int, encoded: Encoded, px: int) -> np.ndarray:
    image = split.decode(encoded, i)
    if image.shape != (px, px, 3):
        raise UserError(
            f"an image of {image.shape[1]} x {image.shape[0]} px among images of {px} x {px} px",
            where=split.origin(i),
            hint="give image_px, to resize and crop all images to one size",
        )
    return image


def _without_bad_images(
    config: PrepareConfig, source: OpenSource, px: int, progress: bool
) -> tuple[OpenSource, list[str]]:
    """Decode everything once, and keep what can be decoded; says what was left out and why."""
    skipped: list[str] = []
    splits: list[Split] = []
    for name, split in (("train", source.train), ("test", source.test)):

        def check(chunk: list[tuple[int, Encoded]], split: Split = split) -> tuple[int, list[tuple[int, str]]]:
            bad = []
            for i, encoded in chunk:
                try:
                    split.decode(encoded, i)
                except UserError as error:
                    bad.append((i, error.what))
            return len(chunk), bad

        good = np.ones(len(split), dtype=bool)
        with Progress(f"check {name}", len(split), show=progress) as bar:
            for count, bad in ordered_map(check, _chunks(split, px), workers=_workers(config)):
                for i, what in bad:
                    good[i] = False
                    skipped.append(f"{split.origin(i)}: {what}")
                bar.add(count)
        splits.append(split.take(good))
    train, test = splits
    check_classes(source.class_names, train.labels, test.labels, where=None)
    return OpenSource(source.class_names, train, test), skipped


def _write(
    config: PrepareConfig,
    source: OpenSource,
    px: int,
    folder: Path,
    made: dict[str, object],
    skipped: list[str],
    progress: bool,
) -> Manifest:
    train, test, names = source.train, source.test, source.class_names
    given = train.labels.copy()
    roles = _choose(config, source, px) if config.has_attack else _Roles.none(len(train))
    if config.has_attack:
        poisoned = roles.poisoned
        given[poisoned] = config.attack.relabel(train.labels[poisoned], config.poison_target, len(names))

    train_hash, visible, squared_error = _write_train(config, train, px, folder / "train.beton", roles, given, progress)
    hashes = {"train": train_hash}
    hashes |= _write_test(config, test, px, folder, progress)

    def origins(split: Split) -> list[str]:
        return [split.origin(i) for i in range(len(split))]

    samples.write_samples(
        folder,
        {"train": SplitSamples(given, origins(train)), "test": SplitSamples(test.labels, origins(test))},
    )
    if not config.untrusted:
        none = np.zeros(len(test), dtype=bool)
        known = {
            "train": SplitTruth(train.labels, roles.poisoned, roles.cover),
            "test": SplitTruth(test.labels, none, none),
        }
        if config.has_attack:
            known["test_triggered"] = SplitTruth(test.labels, ~none, none)
        truth.write_truth(folder, known)

    counts = {split: len(train) if split == "train" else len(test) for split in hashes}
    manifest = Manifest(
        **made,  # pyright: ignore[reportArgumentType]
        num_classes=len(names),
        class_names=names,
        image_px=px,
        counts=counts,
        poisoned=int(roles.poisoned.sum()),
        covers=int(roles.cover.sum()),
        encoding_psnr_db=_psnr_db(squared_error, len(train) * px * px * 3),
        stealth=summarise(visible) if config.has_attack else None,
        content_hash=hashes,
        data_hash=data_hash(hashes),
        files=record_files(folder),
        versions={package: _version(package) for package in ("ffcv", "numpy", "pillow", "pyarrow")},
        skipped=tuple(skipped),
    )
    write_manifest(folder, manifest)
    return manifest


def _write_train(
    config: PrepareConfig,
    split: Split,
    px: int,
    path: Path,
    roles: _Roles,
    given: np.ndarray,
    progress: bool,
) -> tuple[str, list[tuple[float, float, int]], int]:
    """Write train.beton; returns its content hash, `stealth.compare` of the first poisoned images before they are
    encoded, and the squared error of encoding."""
    triggers: list[tuple[np.ndarray, Trigger]] = []
    if config.has_attack:
        triggers = [(roles.poisoned, config.poison.train_trigger(px)), (roles.cover, config.poison.cover_trigger(px))]
    measured = np.flatnonzero(roles.poisoned)[: sample_size(px)]

    def make(chunk: list[tuple[int, Encoded]]) -> tuple[_Stored, np.ndarray, list[tuple[float, float, int]]]:
        index = np.array([i for i, _ in chunk])
        images = np.stack([_decode(split, i, encoded, px) for i, encoded in chunk])
        shown = np.isin(index, measured)
        clean = images[shown]
        for role, trigger in triggers:
            hit = role[index]
            if hit.any():
                images[hit] = trigger(images[hit], index[hit])
        return _Stored.of(images, config.quality), given[index], compare(clean, images[shown])

    digest, compared, squared_error = ContentHash(px), [], 0
    with (
        BetonWriter(path, count=len(split), height_px=px, width_px=px, jpeg=config.quality is not None) as writer,
        Progress("train", len(split), show=progress) as bar,
    ):
        for stored, labels, rows in ordered_map(make, _chunks(split, px), workers=_workers(config)):
            writer.write(stored.data, labels)
            digest.update(stored.pixels, labels)
            compared += rows
            squared_error += stored.squared_error
            bar.add(len(labels))
    if config.has_attack and not any(largest for *_, largest in compared):
        raise UserError(
            f"the trigger changes no pixel of {len(compared)} poisoned images",
            where=config.attack.name,
            hint="make it stronger, or put it elsewhere",
        )
    return digest.hexdigest(), compared, squared_error


def _write_test(config: PrepareConfig, split: Split, px: int, folder: Path, progress: bool) -> dict[str, str]:
    """Write test.beton, and with an attack test_triggered.beton and preview.png, decoding once; returns the
    content hashes."""
    trigger = config.poison.test_trigger(px) if config.has_attack else None

    def make(chunk: list[tuple[int, Encoded]]) -> tuple[np.ndarray, np.ndarray, list[_Stored]]:
        index = np.array([i for i, _ in chunk])
        images = np.stack([_decode(split, i, encoded, px) for i, encoded in chunk])
        versions = [images] if trigger is None else [images, trigger(images, index)]
        return index, split.labels[index], [_Stored.of(version, config.quality) for version in versions]

    names = ["test"] if trigger is None else ["test", "test_triggered"]
    digests = [ContentHash(px) for _ in names]
    _, first_of_class = np.unique(split.labels, return_index=True)
    if config.has_attack and config.attack.has_target:
        first_of_class = np.delete(first_of_class, config.poison_target)
    shown = np.sort(first_of_class)[:_PREVIEW_IMAGES]
    pairs: list[list[np.ndarray]] = []
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                BetonWriter(
                    folder / f"{name}.beton",
                    count=len(split),
                    height_px=px,
                    width_px=px,
                    jpeg=config.quality is not None,
                )
            )
            for name in names
        ]
        bar = stack.enter_context(Progress("test", len(split), show=progress))
        for index, labels, versions in ordered_map(make, _chunks(split, px), workers=_workers(config)):
            for writer, digest, stored in zip(writers, digests, versions):
                writer.write(stored.data, labels)
                digest.update(stored.pixels, labels)
            pairs += [[stored.pixels[i].copy() for stored in versions] for i in np.flatnonzero(np.isin(index, shown))]
            bar.add(len(index))
    if trigger is not None:
        before, after = (np.stack(images) for images in zip(*pairs))
        preview.write_preview(folder / "preview.png", before, after)
    return {name: digest.hexdigest() for name, digest in zip(names, digests)}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
