"""What is fuzzed: each target makes its material once, then runs one case a seed.

A case works, or is refused by UserError or UserError (through the command: exit code 2 and one message). Anything
else, and anything half-written, is a failure.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.check import Finding
from data_prep.artefacts import fingerprint, read_artefact, write_artefact
from data_prep.attacks import BadNets, NoAttack
from data_prep.beton import read_beton
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import open_dataset, record_files
from data_prep.dataset.samples import read_samples
from data_prep.dataset.truth import read_truth
from data_prep.dataset.verify import verify_dataset
from data_prep.errors import UserError
from data_prep.images import Geometry, decode_image
from data_prep.io import hashcache
from data_prep.io.hashes import sha256_file, sha256_json
from data_prep.pipeline import prepare
from data_prep.sources import Digits
from tests.fuzz.mutate import HOSTILE_TEXT, change_bytes, change_json, change_label, json_text

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a made-up name is not looked up

WORKED, REFUSED = "worked", "refused"
FEW = Digits(train_per_class=3, test_per_class=1)


class Broken(Exception):
    """The property does not hold."""


@dataclass(frozen=True)
class Target:
    """One kind of input."""

    run: Callable[[Material, random.Random], str]
    """(material, rng) -> WORKED or REFUSED; raises anything else."""
    weight: int = 1
    """Cases for every one of others."""


@dataclass
class Material:
    """Whole files to start from, below `root`, and a folder for each case."""

    root: Path

    @functools.cached_property
    def dataset(self) -> Path:
        config = PrepareConfig(
            source=Digits(train_per_class=7, test_per_class=1), attack=BadNets(), rate=0.1, out=self.root / "data",
            workers=1,
        )  # fmt: skip
        return prepare(config, progress=False).folder

    @functools.cached_property
    def jpeg(self) -> Path:
        config = PrepareConfig(
            source=Digits(train_per_class=7, test_per_class=1), attack=BadNets(), rate=0.1, out=self.root / "jpeg",
            encoding="jpeg", workers=1,
        )  # fmt: skip
        return prepare(config, progress=False).folder

    @functools.cached_property
    def clean(self) -> Path:
        config = PrepareConfig(
            source=Digits(train_per_class=7, test_per_class=1), attack=NoAttack(), out=self.root / "clean", workers=1
        )
        return prepare(config, progress=False).folder

    @functools.cached_property
    def fingerprint(self) -> str:
        train = FEW.open().train
        return fingerprint(train.labels, np.stack([train.read(i) for i in range(len(train))]))

    @functools.cached_property
    def artefact(self) -> Path:
        arrays = {"pattern": np.full((16, 16, 3), 9, np.uint8), "mask": np.full((16, 16), 26, np.uint8)}
        write_artefact(
            self.root / "artefact", "adaptive", arrays, image_px=16, target=3, fingerprint=self.fingerprint,
            settings={"lr": 0.1}, evidence={}, versions={},
        )  # fmt: skip
        return self.root / "artefact"

    @functools.cached_property
    def perturbed(self) -> Path:
        index = np.flatnonzero(FEW.open().train.labels == 3)
        arrays = {"index": index, "images": np.zeros((len(index), 16, 16, 3), np.uint8)}
        write_artefact(
            self.root / "perturbed", "label-consistent", arrays, image_px=16, target=3, fingerprint=self.fingerprint,
            settings={"rate": 0.1, "seed": 0}, evidence={}, versions={},
        )  # fmt: skip
        return self.root / "perturbed"

    @functools.cached_property
    def images(self) -> dict[str, bytes]:
        rng = np.random.default_rng(0)
        noise = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
        modes = {"RGB": noise, "L": noise.convert("L"), "P": noise.convert("P"), "RGBA": noise.convert("RGBA")}
        found = {}
        for name, (mode, fmt, options) in {
            "jpeg": ("RGB", "JPEG", {}), "progressive": ("RGB", "JPEG", {"progressive": True}),
            "cmyk": ("RGB", "JPEG", {"quality": 20}), "grey": ("L", "PNG", {}), "palette": ("P", "PNG", {}),
            "alpha": ("RGBA", "PNG", {}), "png": ("RGB", "PNG", {}), "webp": ("RGB", "WEBP", {}),
            "bmp": ("RGB", "BMP", {}),
        }.items():  # fmt: skip
            buffer = io.BytesIO()
            (modes[mode].convert("CMYK") if name == "cmyk" else modes[mode]).save(buffer, format=fmt, **options)
            found[name] = buffer.getvalue()
        return found

    @functools.cached_property
    def run(self) -> Path:
        """A finished run with every file that is read."""
        import torch

        from dbd_dist.config import ComputeConfig
        from dbd_dist.models.config import ModelConfig
        from dbd_dist.models.heads import Classifier
        from dbd_dist.presets import preset
        from dbd_dist.runtime.run_folder import RunFolder

        dataset = open_dataset(self.dataset)
        config = replace(
            preset("smoke").change(supervised={"batch": 10}).config("none"), data=dataset.folder.resolve(),
            model=ModelConfig(depths=(1,), widths=(4,), projection_dim=2),
            compute=ComputeConfig(device="cpu", workers=1),
        )  # fmt: skip
        folder, n = RunFolder(self.root / "run"), dataset.manifest.counts["train"]
        folder.claim(config, dataset)
        network = Classifier(config.model, 10)
        folder.write_model(network.state_dict(), config, dataset, config.normalise)
        folder.write_backbone(network.backbone.state_dict(), config, dataset, config.normalise)
        loss = torch.linspace(0, 5, n)
        kept = torch.arange(n) < n // 2
        folder.write_split({"loss": loss, "kept": kept, "first_loss": loss, "first_kept": kept})
        folder.write_features(torch.arange(n), torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), "ssl")
        rows = [
            {"stage": s, "epoch": e, "epochs": 3, "loss": 1.0 / e, "lr": 0.1, "images_per_s": 9.0, "time_s": 1.0}
            for s in ("simclr", "warmup", "mixmatch")
            for e in (1, 2, 3)
        ]
        rows[-1] |= {"clean_acc": 0.9, "asr": 0.1, "kept_poisoned": 1, "poisoned": 7}
        (folder.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder.write_result(
            {
                "method": "dbd", "dataset": dataset.manifest.name, "attack": "badnets", "seed": 0, "clean_acc": 0.9,
                "asr": 0.1, "robust_acc": 0.8, "per_class_acc": [0.9] * 10, "kept_poisoned": 1, "kept": n // 2,
                "poisoned": 7, "train_size": n, "seconds": {"simclr": 1.0, "warmup": 2.0}, "world_size": 1,
                "device": "cpu", "precision": "fp32", "commit": "abc", "versions": {"torch": "2"}, "preset": "custom",
                "data_hash": dataset.manifest.data_hash,
            }
        )  # fmt: skip
        return folder.path

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """An empty folder for one case."""
        place = self.root / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def refused(work: Callable[[], object]) -> str:
    """WORKED, or REFUSED where it raised what it may."""
    try:
        work()
    except UserError as error:
        text = str(error)
        if not text.isprintable():
            raise Broken(f"the message holds control characters: {text!r}") from error
        return REFUSED
    return WORKED


def reseal(path: Path, content: Any, rng: random.Random) -> None:
    """Write a description with a checksum that fits, where it can have one."""
    if isinstance(content, dict) and "checksum" in content and rng.random() < 0.9:
        content = {name: v for name, v in content.items() if name != "checksum"}
        with contextlib.suppress(ValueError, RecursionError):
            content["checksum"] = sha256_json(content)
    path.write_bytes(json_text(rng, content))


def describe_files(folder: Path) -> None:
    """Make the manifest fit whatever the files are."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["checksum"]
    content["files"] = {n: vars(r) for n, r in record_files(folder).items()}
    (folder / "manifest.json").write_text(json.dumps(content | {"checksum": sha256_json(content)}))


# -- data sets


def manifest(material: Material, rng: random.Random) -> str:
    with material.place() as place:
        for path in material.dataset.iterdir():
            (place / path.name).symlink_to(path)
        path = place / "manifest.json"
        whole = path.read_bytes()
        path.unlink()
        if rng.random() < 0.3:
            path.write_bytes(change_bytes(rng, whole))
        else:
            reseal(path, change_json(rng, json.loads(whole)), rng)
        opened = refused(lambda: open_dataset(place))
        return refused(lambda: [*verify_dataset(place, progress=False)]) if opened == WORKED else opened


def beton(material: Material, rng: random.Random) -> str:
    """Header, tables, regions and JPEGs: what FFCV and TurboJPEG would follow to anywhere."""
    with material.place() as place:
        whole = (rng.choice([material.dataset, material.jpeg]) / "test.beton").read_bytes()
        head = (0, 3200 + 10 * 40)
        pixels = (2 << 20, (2 << 20) + 10 * 700)  # the first page begins there
        ranges = [(0, 24), head, (len(whole) - 240, len(whole)), pixels, pixels, (0, len(whole))]
        (place / "x.beton").write_bytes(change_bytes(rng, whole, within=rng.choice(ranges)))
        return refused(lambda: read_beton(place / "x.beton", expect_count=rng.choice([None, 10]), expect_px=None))


def labels(material: Material, rng: random.Random) -> str:
    """A label of any value, in a folder whose hashes fit."""
    with material.place() as place:
        folder = Path(shutil.copytree(rng.choice([material.dataset, material.jpeg]), place / "data"))
        label = rng.choice([0, 9, 10, -1, 99, 2**40, 2**63 - 1, -(2**63)])
        change_label(folder, rng.choice(["train", "test", "test_triggered"]), rng.randrange(10), label)
        outcome = refused(lambda: open_dataset(folder))
        if (outcome == WORKED) != (0 <= label < 10):
            raise Broken(f"label {label}: {outcome}")
        return outcome


def checkpoints(material: Material, rng: random.Random) -> str:
    """A run's states with seals that fit and any content, and whatever else lies beside them."""
    import logging

    from dbd_dist.runtime.checkpoint import Checkpoints, save_state
    from dbd_dist.runtime.reporter import position_of

    row = {"stage": "simclr", "epoch": 1, "epochs": 2, "loss": 1.0, "time_s": 0.1}
    state = {"stage": "simclr", "key": "k", "rows": [row], "state": {"epoch": 1, "step": 3, "meter": {"images": 3}}}
    with material.place() as place:
        save_state(state, place / "checkpoint_000000.pt")
        newest = place / "checkpoint_000001.pt"
        match rng.randrange(4):
            case 0:
                newest.mkdir()
            case 1:
                newest.symlink_to(rng.choice(["nowhere", "/dev/zero", newest.name, "/"]))
            case _:
                with contextlib.suppress(UnicodeError):  # what torch does not write
                    save_state(change_json(rng, state), newest)
        (place / rng.choice(["checkpoint_final.pt", "checkpoint_.pt", "checkpoint_-1.pt", "x"])).write_text("x")
        logging.disable(logging.CRITICAL)
        try:
            name, found = Checkpoints(place, is_main=True).newest() or ("", {})
        finally:
            logging.disable(logging.NOTSET)
        position_of(found)
        return WORKED if name == newest.name else REFUSED


def tables(material: Material, rng: random.Random) -> str:
    with material.place() as place:
        folder = Path(shutil.copytree(material.dataset, place / "data"))
        for name in rng.choice([("samples.parquet",), ("truth.parquet",), ("samples.parquet", "truth.parquet")]):
            path = folder / name
            if rng.random() < 0.6:
                path.write_bytes(change_bytes(rng, path.read_bytes()))
            else:
                pq.write_table(change_table(rng, pq.read_table(path)), path)
        describe_files(folder)
        verdicts = [
            refused(lambda: read_samples(folder)), refused(lambda: read_truth(folder)),
            refused(lambda: [*verify_dataset(folder, progress=False)]),
        ]  # fmt: skip
        return REFUSED if REFUSED in verdicts else WORKED


def change_table(rng: random.Random, table: pa.Table) -> pa.Table:
    """Rows dropped, doubled, in another order; columns of other types, renamed, with nulls."""
    match rng.randrange(6):
        case 0:
            return table.slice(0, rng.randrange(table.num_rows))
        case 1:
            return pa.concat_tables([table, table.slice(rng.randrange(table.num_rows), 3)])
        case 2:
            order = list(range(table.num_rows))
            rng.shuffle(order)
            return table.take(order)
        case 3:
            return table.rename_columns([rng.choice([c, "x", "index", "\x1b[31m"]) for c in table.column_names])
        case 4:
            i = rng.randrange(table.num_columns)
            values = table.column(i).to_pylist()
            values[rng.randrange(len(values))] = rng.choice([None, values[0]])
            return table.set_column(i, table.column_names[i], pa.array(values))
        case _:
            i = rng.randrange(table.num_columns)
            kind = rng.choice([pa.string(), pa.int8(), pa.float64(), pa.bool_(), pa.large_string(), pa.null()])
            values = pa.nulls(table.num_rows, kind) if rng.random() < 0.5 else pa.array([None, *[1] * 0], kind)
            filled = values if len(values) == table.num_rows else pa.nulls(table.num_rows, kind)
            return table.set_column(i, table.column_names[i], filled)


def image(material: Material, rng: random.Random) -> str:
    name = rng.choice(sorted(material.images))
    data = change_bytes(rng, material.images[name])
    geometry = rng.choice([None, Geometry(resize_px=20, crop_px=16), Geometry(crop_px=8)])

    def decode() -> None:
        pixels = decode_image(data, where="x", geometry=geometry)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise Broken(f"{name} became {pixels.dtype} {pixels.shape}")

    return refused(decode)


# -- through the command


def command(place: Path, *argv: str) -> str:
    """Run the command in this process, with what would train left out, and hold it to its promise."""
    from dbd_dist import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(place), stubs():
        try:
            code = cli.main(list(argv))
            parsing = False
        except SystemExit as end:  # tyro's own way out
            code, parsing = end.code, True
    said = err.getvalue()
    if code not in (0, 2) or "Traceback" in out.getvalue() + said:
        raise Broken(f"{argv}: exit code {code}: {said[-2000:]}")
    if code == 2 and not parsing and argv:
        messages = [line for line in said.splitlines() if line.startswith("error: ")]
        if len(messages) != 1 or not said.endswith(messages[0] + "\n") or not messages[0].isprintable():
            raise Broken(f"{argv}: not one message: {said!r}")
    left = [p for p in place.rglob("*") if "partial" in p.name or p.name.startswith(".mark")]
    if left:
        raise Broken(f"{argv}: left {left}")
    return REFUSED if code else WORKED


@contextlib.contextmanager
def stubs() -> Iterator[None]:
    """Nothing trains, measures or starts Ray; what is checked before that is checked."""
    from unittest import mock

    from dbd_dist.launch.local import prepare_folder
    from dbd_dist.runtime import runner
    from tune_spaces import plan as plans

    def launch(config: Any, storage: Path, name: str, launcher: str, *, quiet: bool = False, **_: Any) -> None:
        _, dataset, _ = prepare_folder(config, storage, name)
        runner.check(config, dataset, 1)

    def sweep(plan: Any) -> Any:
        plans.check(plan, open_dataset(next(iter(plan.datas.values()))))
        raise UserError("not run")

    with contextlib.ExitStack() as stack:
        for name, stub in {
            "dbd_dist.launch.start.launch": launch,
            "dbd_dist.commands.craft.launch": launch,
            "dbd_dist.commands.craft._craft": mock.Mock(side_effect=UserError("not run")),
            "dbd_dist.commands.demo.main": mock.Mock(side_effect=UserError("not run")),
            "tune_spaces.command.run_sweep": sweep,
            "dbd_dist.bench.run.run": mock.Mock(),
            "cluster.check.examine": mock.Mock(return_value=[Finding("machine", "ok", "not looked at")]),
            "cluster.check.examine_cluster": mock.Mock(side_effect=UserError("not run")),
            "torchvision.datasets.CIFAR10.download": mock.Mock(side_effect=OSError("no network")),
        }.items():
            stack.enter_context(mock.patch(name, stub))
        yield


def check_made(folder: Path, outcome: str) -> str:
    """What `prepare` made is whole; what it refused is not there."""
    if outcome == REFUSED and folder.exists():
        raise Broken(f"refused, and left {sorted(p.name for p in folder.iterdir())}")
    if outcome == WORKED:
        for _ in verify_dataset(folder, progress=False):
            pass
    return outcome


def parquet(material: Material, rng: random.Random) -> str:
    with material.place() as place:
        whole = list(material.images.values())
        classes = rng.choice([["a", "b"], None, [rng.choice(HOSTILE_TEXT), "b"], list("abc")])
        for split, count in (("train", 8), ("test", 4)):
            images = [rng.choice(whole) for _ in range(count)]
            labels: list[Any] = [i % 2 for i in range(count)]
            if rng.random() < 0.4:
                images[rng.randrange(count)] = rng.choice([b"", change_bytes(rng, whole[0]), None])  # type: ignore[call-overload]
            if rng.random() < 0.3:
                labels[rng.randrange(count)] = rng.choice([None, -1, 2, 10**12, 2**63 - 1])
            struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            column = pa.array([None if i is None else {"bytes": i, "path": "../x"} for i in images], struct)
            given = pa.array(labels, pa.int64())
            if rng.random() < 0.4:
                texts = [
                    None if label is None else rng.choice([f"class {label}", HOSTILE_TEXT[label % 7]])
                    for label in labels
                ]
                listed = pa.array([[label] * rng.choice([1, 1, 1, 2]) for label in labels], pa.list_(pa.int64()))
                given = rng.choice(
                    [pa.array(texts), pa.array(texts).dictionary_encode(), given.cast("double", safe=False), listed]
                )
            table = pa.table({"image": column, "label": given})
            if rng.random() < 0.2:
                table = change_table(rng, table)
            if classes is not None:
                about = {"info": {"features": {"image": {}, "label": {"names": classes}}}}
                if rng.random() < 0.3:
                    about = change_json(rng, about)
                with contextlib.suppress(ValueError):
                    table = table.replace_schema_metadata({b"huggingface": json_text(rng, about)})
            path = place / rng.choice(["", "", "data/", "x/y/"]) / f"{rng.choice([split, split, 'Valid', 'x'])}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, compression=rng.choice(["snappy", "zstd", "none"]))
            if rng.random() < 0.4:
                path.write_bytes(change_bytes(rng, path.read_bytes()))
        flags = ["--image-px", "8"] if rng.random() < 0.8 else []
        flags += ["--on-bad-image", "skip"] if rng.random() < 0.5 else []
        attack = rng.choice([["clean"], ["badnets", "--target", "0", "--rate", "0.3", "--patch-px", "2"]])
        flags += rng.choice([[], [], ["--fit", "pad"], ["--background", "black"], ["--test-split", "test"]])
        source, flag = rng.choice([("parquet", "--root"), ("parquet", "--root"), ("hf", "--path")])
        outcome = command(place, "prepare", source, *attack, flag, ".", "--out", "made", "--workers", "1", *flags)
        return check_made(place / "made", outcome)


def folder_of_images(material: Material, rng: random.Random) -> str:
    with material.place() as place:
        names = ["ant", rng.choice(["bee", "\x1b[31mbee", "<b>", "bee\n", "\u202eb", "b" * 200])]
        for split, count in (("train", 4), ("test", 2)):
            for name in names:
                (place / "images" / split / name).mkdir(parents=True)
                for i in range(count):
                    data = rng.choice(list(material.images.values()))
                    path = place / "images" / split / name / rng.choice([f"{i}.png", f"{i}\x1b[2J.jpg", f"{i} \n.x"])
                    path.write_bytes(change_bytes(rng, data) if rng.random() < 0.1 else data)
        for clutter in rng.sample(
            [".DS_Store", "Thumbs.db", "boxes.txt", "__MACOSX/x.png", "deep/er/1.png", "x.gif"], 2
        ):
            path = place / "images" / rng.choice(["train", "train/ant", "test/ant", "."]) / clutter
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rng.choice([b"", b"x", next(iter(material.images.values()))]))
        if rng.random() < 0.2:
            aim = rng.choice(["/etc/passwd", "/dev/zero", "..", "0.png", "loop"])
            (place / "images" / "train" / "ant" / "loop").symlink_to(aim)
        flags = ["--on-bad-image", "skip"] if rng.random() < 0.5 else []
        flags += ["--follow-links"] if rng.random() < 0.3 else []
        if rng.random() < 0.2:
            rows = [
                f"{rng.choice(['train/ant/0.png', 'test/ant/1.png', '../x', HOSTILE_TEXT[0]])},{i % 2}"
                for i in range(6)
            ]
            content = "\n".join([rng.choice(["path,label", "", "a,b,c", "file;class"]), *rows]).encode()
            (place / "list.csv").write_bytes(change_bytes(rng, content) if rng.random() < 0.5 else content)
            flags += ["--list", "list.csv"]
        attack = rng.choice([["clean"], ["blended", "--target", "0", "--rate", "0.3"]])
        outcome = command(
            place, "prepare", "imagefolder", *attack, "--root", "images", "--out", "made", "--workers", "1",
            "--image-px", "8", "--resize-px", "10", *flags,
        )  # fmt: skip
        return check_made(place / "made", outcome)


def trigger(material: Material, rng: random.Random) -> str:
    with material.place() as place:
        buffer = io.BytesIO()
        Image.fromarray(np.full((3, 3, 3), 200, np.uint8)).save(buffer, format=rng.choice(["PNG", "BMP", "WEBP"]))
        (place / "x.png").write_bytes(change_bytes(rng, buffer.getvalue()))
        attack = rng.choice([["badnets"], ["blended", "--resize-pattern"], ["adap-blend"]])
        small = ["--train-per-class", "3", "--test-per-class", "1", "--rate", "0.3"]
        outcome = command(
            place, "prepare", "digits", *attack, "--pattern", "x.png", *small, "--out", "made", "--workers", "1"
        )
        return check_made(place / "made", outcome)


def artefact(material: Material, rng: random.Random) -> str:
    with material.place() as place:
        source, kind = rng.choice([(material.artefact, "adaptive"), (material.perturbed, "label-consistent")])
        folder = Path(shutil.copytree(source, place / "art"))
        content = json.loads((folder / "artefact.json").read_text())
        if rng.random() < 0.6:
            path = folder / "artefact.npz"
            path.write_bytes(change_bytes(rng, path.read_bytes()))
            content["sha256"] = sha256_file(path)
        else:
            content = change_json(rng, content)
        reseal(folder / "artefact.json", content, rng)
        verdict = refused(lambda: [a.sum() for a in read_artefact(folder, kind).arrays.values()])
        if verdict == REFUSED:
            return verdict
        rate = "0.3" if kind == "adaptive" else "0.1"
        small = ["--train-per-class", "3", "--test-per-class", "1", "--rate", rate, "--workers", "1"]
        outcome = command(place, "prepare", "digits", kind, "--artefact", "art", *small, "--out", "made")
        return check_made(place / "made", outcome)


# -- runs


def config(material: Material, rng: random.Random) -> str:
    with material.place() as place:
        whole = (material.run / "run.json").read_bytes()
        if rng.random() < 0.2:
            content = change_bytes(rng, whole)
        else:
            content = json_text(rng, change_json(rng, json.loads(whole)))
        (place / "run.json").write_bytes(content)
        name = rng.choice([[], ["--name", "again"]])
        return command(place, "train", "--config", "run.json", "--launcher", "local", "--storage", "runs", *name)


def claimed(material: Material, rng: random.Random) -> str:
    """A run folder that is there already, and damaged."""
    from dbd_dist.config import TrainConfig, from_dict
    from dbd_dist.runtime.run_folder import RunFolder

    with material.place() as place:
        for name in ("run.json", "result.json"):
            whole = (material.run / name).read_bytes()
            changed = json_text(rng, change_json(rng, json.loads(whole)))
            (place / name).write_bytes(change_bytes(rng, whole) if rng.random() < 0.5 else changed)
        folder, dataset = RunFolder(place), open_dataset(material.dataset)
        config = from_dict(TrainConfig, json.loads((material.run / "run.json").read_text())["config"])
        verdicts = [refused(lambda: folder.claim(config, dataset)), refused(folder.result)]
        return REFUSED if REFUSED in verdicts else WORKED


def exported(material: Material, rng: random.Random) -> str:
    import torch

    from dbd_dist.models.exported import read_exported

    with material.place() as place:
        stem = rng.choice(["model", "backbone"])
        for suffix in (".json", ".safetensors"):
            shutil.copy(material.run / f"{stem}{suffix}", place)
        weights, content = place / f"{stem}.safetensors", json.loads((place / f"{stem}.json").read_text())
        if rng.random() < 0.6:
            whole = weights.read_bytes()
            weights.write_bytes(change_bytes(rng, whole, within=rng.choice([(0, 600), (0, 8), (0, len(whole))])))
            content["weights"] = {"bytes": weights.stat().st_size, "sha256": sha256_file(weights)}
        else:
            content = change_json(rng, content)
        reseal(place / f"{stem}.json", content, rng)
        with contextlib.redirect_stderr(io.StringIO()):
            return refused(lambda: read_exported(weights).build(torch.device("cpu")))


def report(material: Material, rng: random.Random) -> str:
    with material.place() as place:
        folder = Path(shutil.copytree(material.run, place / "run"))
        for name in rng.sample(["run.json", "result.json", "metrics.jsonl", "split.parquet", "features.npz"], 2):
            path = folder / name
            whole = path.read_bytes()
            if name == "metrics.jsonl" and rng.random() < 0.7:
                rows = [
                    change_json(rng, json.loads(r)) if rng.random() < 0.3 else json.loads(r) for r in whole.splitlines()
                ]
                path.write_bytes(b"\n".join(json_text(rng, row) for row in rows) + b"\n")
            elif name.endswith(".json") and rng.random() < 0.7:
                path.write_bytes(json_text(rng, change_json(rng, json.loads(whole))))
            elif name == "split.parquet" and rng.random() < 0.5:
                pq.write_table(change_table(rng, pq.read_table(path)), path)
            else:
                path.write_bytes(change_bytes(rng, whole))
        fmt = rng.choice(["html", "html", "md", "text"])
        outcome = command(place, "report", "run", "--format", fmt, "--out", "page")
        page = place / "page"
        if page.exists() != (outcome == WORKED):
            raise Broken(f"{outcome}, and the page is {'there' if page.exists() else 'not there'}")
        if outcome == WORKED:
            text = page.read_text(encoding="utf-8")
            raw = [
                sign for sign in ("<script", "<img src=x", "\x1b", "\x9b", "\u202e") if sign in text and fmt == "html"
            ]
            if raw or (fmt == "html" and not text.endswith("</html>\n")) or "\x1b" in text:
                raise Broken(f"the page holds {raw}, or is cut off")
        return outcome


def run_folder(material: Material, rng: random.Random) -> str:
    """The doctor on folders of any kind."""
    with material.place() as place:
        source = rng.choice([material.run, material.artefact, material.dataset])
        folder = Path(shutil.copytree(source, place / "x"))
        path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
        path.write_bytes(change_bytes(rng, path.read_bytes()))
        return command(place, "doctor", "x")


def cache(material: Material, rng: random.Random) -> str:
    """The kept hashes: whatever is in their file, a hash of this very file comes out."""
    from unittest import mock

    with material.place() as place, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(place / "cache")}):
        (place / "file").write_bytes(b"content")
        with mock.patch.object(hashcache, "SETTLED_S", -1.0), mock.patch.object(hashcache, "_here", {}):
            hashcache.cached_sha256(place / "file")
            kept = place / "cache" / "dbd-dist" / "sha256.json"
            whole = kept.read_bytes()
            changed = change_bytes(rng, whole)
            kept.write_bytes(changed if rng.random() < 0.5 else json_text(rng, change_json(rng, json.loads(whole))))
            (place / "file").write_bytes(b"another content")
            hashcache._here.clear()
            if hashcache.cached_sha256(place / "file") != sha256_file(place / "file"):
                raise Broken("a kept hash of another content was believed")
    return WORKED


# -- command lines

WORDS = (
    "prepare", "craft", "train", "evaluate", "tune", "report", "bench", "doctor", "digits", "cifar10", "imagefolder",
    "parquet", "hf", "clean", "badnets", "ctrl", "blended", "wanet", "sig", "adap-blend", "adap-patch",
    "label-consistent", "adaptive", "smoke", "demo", "sce", "filter", "--help", "--debug", "--", "-", "-h", "--storage",
    "--data", "--out", "--root",
    "--datasets", "--artefact", "--pattern", "--rate", "--target", "--seed", "--protocol", "--workers", "--overwrite",
    "--untrusted", "--name", "--launcher", "--config", "--method", "--simclr.epochs", "--simclr.batch", "--simclr.lr",
    "--model.widths", "--model.depths", "--mixmatch.augment.pad-px", "--supervised.milestones", "--compute.workers",
    "--compute.stage", "--split.keep", "--parallel", "--smoke", "--preset", "--only", "--json", "--repeats",
    "--threads",
    "--quick", "--device", "--format", "--cluster", "--image-px", "--resize-px", "--train-per-class",
    "--test-per-class",
    "--alpha", "--patch-px", "--row", "--col", "--grid", "--strength", "--delta", "--frequency", "--mapping",
    "--fit", "--background", "--list", "--path", "--train-split", "--test-split", "--test-fraction",
    "--eps", "--step", "--steps", "--surrogate", "--backbone", "--mask-budget", "--on-bad-image", "--workers",
)  # fmt: skip
VALUES = (
    "0", "1", "2", "-1", "3", "0.5", "1.5", "nan", "inf", "-inf", "1e999", "1e-400", "99999999999999999999", "x",
    "True", "pad", "stretch", "black", "~/x",
    "None", "local", "ray", "cpu", "cuda", "released", "none", "dbd", "html", "loader", "all-to-all", ".", "..",
    "/", "/dev/null", "/dev/zero", "/proc/self/mem", "nowhere", "file:///x", "~", "data", "clean", "run", "art",
    "s3://bucket?endpoint_override=127.0.0.1:1&scheme=http",
)  # fmt: skip


def line(material: Material, rng: random.Random) -> str:
    with material.place() as place:
        for name, source in (
            ("data", material.dataset), ("clean", material.clean), ("run", material.run), ("art", material.artefact)
        ):  # fmt: skip
            (place / name).symlink_to(source)
        argv = rng.choice(
            [
                [], ["prepare", "digits"], ["prepare", "digits", "badnets"], ["prepare", "digits", "wanet"],
                ["prepare", "parquet"], ["prepare", "imagefolder"], ["train", "smoke", "--launcher", "local"],
                ["train", "smoke", "--launcher", "local", "--data", "data"], ["evaluate", "run"], ["tune", "sce"],
                ["report", "run"], ["bench", "--quick"], ["doctor"], ["tune", "filter", "--data", "data"],
                ["craft", "adaptive", "--data", "clean", "--out", "made", "--launcher", "local"],
                ["craft", "label-consistent", "--data", "clean", "--out", "made", "--launcher", "local"],
            ]
        )  # fmt: skip
        argv = list(argv)
        for _ in range(rng.choice([0, 1, 2, 2, 3, 4, 8])):
            word = rng.choice(WORDS)
            given = rng.choice(VALUES + HOSTILE_TEXT[:-10])
            argv += rng.choice([[word], [word, given], [word, given], [f"{word}={given}"], [given[:2000]]])
        if argv and argv[0] == "demo":
            argv[0] = "train"
        if rng.random() < 0.1 and argv:
            argv.insert(rng.randrange(len(argv)), rng.choice(HOSTILE_TEXT)[:500])
        # no more than a moment's work, and none of it outside the case's folder
        heavy = {"--train-per-class", "--image-px", "--grid"}
        argv = [a for a in argv if a not in heavy and "--debug" not in a]
        if argv[:2] in (["prepare", "digits"],):
            argv += ["--train-per-class", "4", "--test-per-class", "1"]
        with without_writing_elsewhere(place):
            return command(place, *argv)


@contextlib.contextmanager
def without_writing_elsewhere(place: Path) -> Iterator[None]:
    """Paths outside the case's folder are refused as a read-only disk would."""
    from unittest import mock

    real = Path.mkdir

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        allowed = (os.path.realpath(place), os.path.join(tempfile.gettempdir(), "dbd-bench-"))
        if not os.path.realpath(self).startswith(allowed) and not self.is_dir():
            raise PermissionError(13, "Permission denied", str(self))
        real(self, *arguments, **options)

    with mock.patch.object(Path, "mkdir", mkdir):
        yield


TARGETS: dict[str, Target] = {
    "manifest": Target(manifest, 2),
    "beton": Target(beton, 2),
    "labels": Target(labels),
    "checkpoints": Target(checkpoints, 4),
    "tables": Target(tables),
    "image": Target(image, 8),
    "parquet": Target(parquet),
    "imagefolder": Target(folder_of_images),
    "trigger": Target(trigger),
    "artefact": Target(artefact, 2),
    "config": Target(config, 2),
    "claim": Target(claimed, 2),
    "exported": Target(exported, 2),
    "report": Target(report),
    "doctor": Target(run_folder),
    "cache": Target(cache, 2),
    "command": Target(line, 3),
}


# -- what the driver has to see


def _crash(material: Material, rng: random.Random) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return WORKED


def _hang(material: Material, rng: random.Random) -> str:
    time.sleep(3600)
    return WORKED


def _raise(material: Material, rng: random.Random) -> str:
    return refused(lambda: {}["no such key"])


def _memory(material: Material, rng: random.Random) -> str:
    return refused(lambda: np.ones(10**13))


def _left(material: Material, rng: random.Random) -> str:
    with material.place() as place:
        (place / ".made.1.partial").mkdir()
        return command(place, "report")


FAULTS: dict[str, Target] = {
    "crash": Target(_crash), "hang": Target(_hang), "raise": Target(_raise), "memory": Target(_memory),
    "left": Target(_left),
}  # fmt: skip
"""Cases that fail, each in its way."""
