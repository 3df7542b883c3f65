"""Command lines and files that cannot work out, one a line: exit code 2, one message that names the thing.

Nothing is left behind, and nothing that was there is changed.

Words in braces are files and folders of the test (`MATERIAL`). After the arrow: what the message has to say.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.artefacts import write_artefact
from data_prep.attacks import NoAttack
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import open_dataset
from data_prep.pipeline import prepare
from data_prep.sources import Digits
from dbd_dist.cli import main
from dbd_dist.models.heads import Classifier
from dbd_dist.runtime.run_folder import RunFolder
from tests.fuzz.mutate import change_label

pytestmark = pytest.mark.slow  # each is quick; together they take a minute

SMOKE = "train smoke --data {data} --launcher local --simclr.batch 60 --warmup.batch 60"

COMMANDS = """
nonsense -> nonsense
Train -> Train
prepare -> digits, cifar10
prepare nonsense -> nonsense
prepare Digits -> Digits
prepare digits nonsense -> nonsense
prepare digits badnets badnets -> badnets
prepare digits --no-such-flag -> --no-such-flag
prepare digits --seed -> --seed
prepare digits --seed x -> --seed
prepare digits --seed 1.5 -> --seed
prepare digits --seed -1 -> seed
prepare digits --workers 0 -> workers
prepare digits --workers -2 -> workers
prepare digits --image-px 7 -> --image-px
prepare digits --image-px 513 -> --image-px
prepare digits --image-px 16.7 -> --image-px
prepare digits --image-px 99999999999999999999 -> --image-px
prepare digits --test-fraction 0 -> --test-fraction
prepare digits --test-fraction 1 -> --test-fraction
prepare digits --test-fraction nan -> --test-fraction
prepare digits --train-per-class 0 -> --train-per-class
prepare digits --train-per-class 100000 -> --train-per-class
prepare digits --test-per-class -5 -> --test-per-class
prepare digits --test-per-class 99999 -> --test-per-class
prepare digits --subset-seed -1 -> --subset-seed
prepare digits --on-bad-image ignore -> ignore
prepare digits --rate 0.05 -> rate
prepare digits --target 3 -> target
prepare digits --protocol ten-percent -> --protocol
prepare digits badnets --setting paper --protocol released -> both --setting and --protocol
prepare digits sig --protocol released -> no clean-label attack
prepare digits --protocol other -> other
prepare digits badnets --rate 0 -> rate
prepare digits badnets --rate 1 -> rate
prepare digits badnets --rate 5 -> 0.05
prepare digits badnets --rate -0.1 -> rate
prepare digits badnets --rate nan -> rate
prepare digits badnets --rate inf -> rate
prepare digits badnets --rate 1e-9 -> rate
prepare digits badnets --rate 5% -> --rate
prepare digits badnets --rate 0.99 -> rate
prepare digits badnets --target 10 -> target
prepare digits badnets --target -1 -> target
prepare digits badnets --target three -> --target
prepare digits badnets --mapping all-to-all --target 3 -> target
prepare digits badnets --mapping all-to-some -> all-to-some
prepare digits badnets --patch-px 0 -> --patch-px
prepare digits badnets --patch-px 17 -> --patch-px
prepare digits badnets --row -1 -> row
prepare digits badnets --row 14 --col 0 -> row
prepare digits badnets --pattern nowhere.png -> nowhere.png
prepare digits badnets --pattern {text} -> not an image
prepare digits badnets --pattern {empty} -> empty
prepare digits badnets --pattern {folder} -> folder
prepare digits badnets --pattern {pipe} -> pipe
prepare digits badnets --pattern {alpha} -> alpha channel
prepare digits badnets --pattern {wide} -> 5 x 3
prepare digits badnets --pattern {torn} -> torn
prepare digits badnets --pattern= -> --pattern
prepare digits badnets --pattern {large} -> larger|sticks out|trigger
prepare digits blended --alpha 0 -> alpha
prepare digits blended --alpha 1.5 -> alpha
prepare digits blended --alpha nan -> alpha
prepare digits blended --alpha 0.12345678 -> alpha
prepare digits blended --test-alpha -1 -> --test-alpha
prepare digits blended --pattern-seed -1 -> --pattern-seed
prepare digits blended --pattern {wide} -> 5 x 3
prepare digits wanet --grid 1 -> grid
prepare digits wanet --grid 17 -> grid
prepare digits wanet --strength 1e308 -> strength
prepare digits wanet --strength nan -> strength
prepare digits wanet --strength -1 -> strength
prepare digits wanet --field-seed -1 -> --field-seed
prepare digits sig --delta 0 -> delta
prepare digits sig --delta nan -> delta
prepare digits sig --frequency 0 -> frequency
prepare digits sig --frequency inf -> frequency
prepare digits label-consistent -> --artefact
prepare digits label-consistent --artefact nowhere -> nowhere
prepare digits label-consistent --artefact {artefact} -> adaptive
prepare digits label-consistent --artefact= -> --artefact
prepare digits adaptive --artefact {data} -> not an artefact
prepare digits adaptive --artefact {artefact} -> another data set
prepare digits adaptive --artefact {brokenartefact} -> damaged
prepare digits --untrusted badnets -> untrusted
prepare digits --out {text} -> is a file
prepare digits --out {text}/below -> Not a directory
prepare digits --out {folder} -> is not empty and not a data set
prepare digits --out . -> .
prepare digits --out .. -> out
prepare digits --out= -> --out
prepare digits --datasets= -> --datasets
prepare digits --out {long} -> too long
prepare digits --out {data} -> another data set
prepare digits badnets --out {data} --seed 9 -> another data set
prepare imagefolder -> --root
prepare imagefolder --root nowhere -> not an image folder
prepare imagefolder --root {text} -> not an image folder
prepare imagefolder --root= -> --root
prepare imagefolder --root {circle} -> circle
prepare imagefolder --root {images} --image-px 0 -> --image-px
prepare imagefolder --root {images} --image-px 300 -> 300
prepare imagefolder --root {images} --image-px 9000 --resize-px 9000 -> 8192
prepare imagefolder --root {links} --image-px 8 --resize-px 8 -> outside the image folder
prepare imagefolder --root {classlinks} --image-px 8 --resize-px 8 -> outside the image folder
prepare imagefolder --root {oneclass} --image-px 8 --resize-px 8 -> 1 class only
prepare imagefolder --root {emptyclass} --image-px 8 --resize-px 8 -> empty
prepare imagefolder --root {notrain} -> no train
prepare imagefolder --root {images} --list nowhere.csv -> nowhere.csv
prepare imagefolder --root {images} --list {empty} -> empty
prepare imagefolder --root {images} --list {text} -> columns of the list
prepare imagefolder --root {images} --list= -> --list
prepare imagefolder --root {images} --fit round -> round
prepare imagefolder --root {images} --background red -> red
prepare imagefolder --root {images} --test-split dev -> --test-split
prepare imagefolder --root {images} --image-px 8 --resize-px 8 badnets --target wasp -> wasp
prepare imagefolder --root {images} badnets --image-px 8 --resize-px 8 --target 2 -> target
prepare imagefolder --root {badimage} --image-px 8 --resize-px 8 -> 0.png
prepare imagefolder --root {bomb} --image-px 8 --resize-px 8 -> too many pixels
prepare parquet -> --root
prepare parquet --root nowhere -> no such folder
prepare parquet --root {folder} -> no train images
prepare parquet --root {badparquet} -> unreadable Parquet
prepare parquet --root {parquet} --image-px 0 -> --image-px
prepare parquet --root {parquet} --image-px 8193 -> --image-px
prepare parquet --root {parquet} --image-column nothing -> nothing
prepare parquet --root {parquet} --label-column image -> image
prepare parquet --root {parquet} --image-column label -> label
prepare parquet --root {parquet} --test-split dev -> --test-split
prepare parquet --root {parquet} --train-split dev -> --train-split
prepare parquet --root {parquet} --train-split a --test-split a -> --train-split
prepare parquet --root {parquet} --fit pad -> --image-px
prepare parquet --root {parquet} --test-fraction 1 -> --test-fraction
prepare hf -> --path
prepare hf nowhere/at/all -> no such folder
prepare hf --path= -> --path
prepare hf {folder} -> no data set
prepare hf {text} -> no such folder
prepare hf {badparquet} -> train.parquet
prepare hf {parquet} --label-column image -> image
prepare hf {parquet} --label-column nothing -> --label-column
prepare hf {parquet} --test-split dev -> --test-split
prepare hf {hugelabel} -> label
prepare parquet --root {nulllabel} -> label is null
prepare parquet --root {hugelabel} -> label
prepare parquet --root {deepnames} -> huggingface
prepare parquet --root {surrogate} -> not Unicode|huggingface
prepare cifar10 --root nowhere --no-download -> nowhere
prepare cifar10 --root {text} --no-download -> text
train -> preset
train --seed 1 -> preset
train nothing -> nothing
train Smoke -> Smoke
train smoke smoke -> smoke
train --config -> --config
train --config= -> --config
train --config nowhere.json --launcher local -> nowhere.json
train --config {text} --launcher local -> text
train --config {folder} --launcher local -> folder
train --config {pipe} --launcher local -> pipe
train --config {deep} --launcher local -> deep
train --config {nan} --launcher local -> nan
train --config {unknownfield} --launcher local -> seeds
train --config {wrongtype} --launcher local -> simclr.lr
train --config {surrogatepath} --launcher local -> config.data
train --config {zeropath} --launcher local -> config.data
evaluate {oddrun} -> oddrun
train --config {manyblocks} --launcher local -> depths
train --config {wide_network} --launcher local -> widths
train --config {otherdata}/run.json --launcher local -> holds other data
train --config {nodata}/run.json --launcher local -> not a dataset folder
evaluate {otherdata} -> holds other data
evaluate {nodata} -> --data
train smoke --data {badlabel} --launcher local -> label 99 is not a class
doctor {badlabel} -> label 99 is not a class
bench --data {badlabel} -> label 99 is not a class
tune sce --data {badlabel} -> label 99 is not a class
craft adaptive --data {badlabel} --out made --launcher local -> label 99 is not a class
SMOKE --seed {longnumber} -> seed
SMOKE --simclr.epochs {longnumber} -> simclr.epochs
SMOKE --simclr.lr 1e308 -> simclr.lr
SMOKE --compute.stall-s 1e308 -> compute.stall_s
SMOKE --compute.patience-s 1e308 -> compute.patience_s
SMOKE --compute.resident-gib 1e308 -> compute.resident_gib
SMOKE --stop-after warmup --warmup.batch 241 -> warmup.batch
train smoke --data nowhere --launcher local -> nowhere
train smoke --data {text} --launcher local -> dataset folder
train smoke --data {folder} --launcher local -> dataset folder
train smoke --data= --launcher local -> --data
train smoke --data {brokendata} --launcher local -> train.beton
train smoke --data {editedmanifest} --launcher local -> edited
train smoke --data {strangefile} --launcher local -> files
SMOKE --no-such -> --no-such
SMOKE --method other -> other
SMOKE --preset demo -> --preset
SMOKE --storage= -> --storage
SMOKE --storage {text} -> text
SMOKE --storage s3://bucket?endpoint_override=127.0.0.1:1&scheme=http -> s3
SMOKE --storage /proc/nothing -> /proc/nothing
SMOKE --name= -> --name
SMOKE --name .. -> --name
SMOKE --name /absolute -> --name
SMOKE --name a/../../b -> --name
SMOKE --name stages -> stages
SMOKE --name datasets/x -> datasets
SMOKE --name $'a\\nb' -> --name
SMOKE --name $'a\\033[31m' -> --name
SMOKE --launcher slurm -> slurm
SMOKE --seed -1 -> seed
SMOKE --seed x -> --seed
SMOKE --evaluate-every -1 -> evaluate_every
SMOKE --stop-after mixmatch -> mixmatch
SMOKE --simclr.epochs 0 -> simclr.epochs
SMOKE --simclr.epochs -1 -> simclr.epochs
SMOKE --simclr.epochs many -> --simclr.epochs
SMOKE --simclr.batch 1 -> simclr.batch
SMOKE --simclr.batch 241 -> simclr.batch
SMOKE --simclr.chunk 7 -> simclr.chunk
SMOKE --simclr.chunk 0 -> simclr.chunk
SMOKE --simclr.optimizer adam -> adam
SMOKE --simclr.lr 0 -> simclr.lr
SMOKE --simclr.lr nan -> simclr.lr
SMOKE --simclr.lr inf -> simclr.lr
SMOKE --simclr.lr fast -> --simclr.lr
SMOKE --simclr.momentum 1 -> simclr.momentum
SMOKE --simclr.weight-decay -1 -> simclr.weight_decay
SMOKE --simclr.temperature 0 -> simclr.temperature
SMOKE --simclr.schedule-epochs 1 -> simclr.schedule_epochs
SMOKE --simclr.symmetric maybe -> --simclr.symmetric
SMOKE --simclr.augment.crop round -> round
SMOKE --simclr.augment.scale 1 0.2 -> scale
SMOKE --simclr.augment.scale 0.2 -> --simclr.augment.scale
SMOKE --simclr.augment.ratio 0 1 -> ratio
SMOKE --simclr.augment.flip-p 2 -> flip_p
SMOKE --simclr.augment.blur-sigma 2 1 -> blur_sigma
SMOKE --simclr.augment.jitter 1 1 1 0.6 -> jitter
SMOKE --simclr.augment.std 0 1 1 -> std
SMOKE --simclr.augment.mean nan 0 0 -> mean
SMOKE --simclr.augment.mean 0 0 0 -> mean
SMOKE --warmup.epochs 0 -> warmup.epochs
SMOKE --warmup.loss focal -> focal
SMOKE --warmup.sce-alpha -1 -> warmup.sce_alpha
SMOKE --warmup.sce-alpha 0 --warmup.sce-beta 0 -> no loss
SMOKE --warmup.augment.pad-px 16 -> warmup.augment.pad_px
SMOKE --split.keep 0 -> split.keep
SMOKE --split.keep 1 -> split.keep
SMOKE --split.keep 0.999 -> mixmatch.batch
SMOKE --split.batch 0 -> split.batch
SMOKE --split.augment.pad-px 99 -> split.augment.pad_px
SMOKE --mixmatch.steps 0 -> mixmatch.steps
SMOKE --mixmatch.batch 121 -> mixmatch.batch
SMOKE --mixmatch.mix-alpha 0 -> mixmatch.mix_alpha
SMOKE --mixmatch.lambda-u -1 -> mixmatch.lambda_u
SMOKE --mixmatch.ramp-epochs 0 -> mixmatch.ramp_epochs
SMOKE --mixmatch.augment.pad-px 1000 -> mixmatch.augment.pad_px
SMOKE --mixmatch.augment.pad-px -1 -> pad_px
SMOKE --method none --supervised.augment.pad-px 16 -> supervised.augment.pad_px
SMOKE --method none --supervised.milestones -1 -> supervised.milestones
SMOKE --method none --supervised.milestones 0 5 -> supervised.milestones
SMOKE --method none --supervised.milestones 5 5 -> supervised.milestones
SMOKE --method none --supervised.milestones 9 5 -> supervised.milestones
SMOKE --method none --supervised.momentum -0.1 -> supervised.momentum
SMOKE --model.block wide -> wide
SMOKE --model.widths 8 16 -> widths
SMOKE --model.widths 0 -> widths
SMOKE --model.depths 2000 --model.widths 8 -> model.depths
SMOKE --model.depths 1 --model.widths 99999999 -> model.widths
SMOKE --model.projection-dim 0 -> projection_dim
SMOKE --model.stem imagenet -> 32 px
SMOKE --compute.workers 0 -> compute.workers
SMOKE --compute.device tpu -> tpu
SMOKE --compute.precision fp8 -> fp8
SMOKE --compute.threads 0 -> compute.threads
SMOKE --compute.threads 100000 -> compute.threads
SMOKE --compute.stage relative -> compute.stage
SMOKE --compute.stage= -> --compute.stage
SMOKE --compute.resident-gib -1 -> compute.resident_gib
evaluate -> RUN
evaluate nowhere -> nowhere
evaluate {text} -> text
evaluate {data} -> model.json
evaluate {brokenweights} --data {data} -> model.safetensors
evaluate {halfpixel} --data {data} -> image_px
evaluate {editedmodel} --data {data} -> checksum
evaluate {run} --data nowhere -> nowhere
evaluate {run} --data= -> --data
evaluate {run} --data {brokendata} -> train.beton
evaluate {run} --no-such -> --no-such
tune -> SPACE
tune everything -> everything
tune sce --preset nothing -> nothing
tune sce --parallel 0 -> --parallel
tune sce --parallel -3 -> --parallel
tune sce --parallel many -> --parallel
tune sce --workers 0 -> --workers
tune sce --workers -1 -> --workers
tune sce --seed -1 -> seed
tune sce --storage= -> --storage
tune sce --storage gs://bucket -> gs
tune sce --name .. -> --name
tune sce --data nowhere -> nowhere
tune sce sce -> sce
report -> no run folder
report nowhere -> nowhere
report {text} -> text
report {data} -> run.json
report {run} -> result.json
report {run} --format pdf -> pdf
report {brokenresult} -> result.json
report {nanresult} -> result.json
report {finished} --out= -> --out
report {finished} --out {folder} -> is a folder
report {finished} --out {long} -> too long
report {finished} --out {text}/below --format md -> text
report {badmetrics} -> line 1
report {badsplit} -> split.parquet
report {badfeatures} -> features.npz
report {pickled} -> features.npz
bench --repeats 0 -> --repeats
bench --repeats -1 -> --repeats
bench --repeats x -> --repeats
bench --repeats 99999999 -> --repeats
bench --threads 0 -> --threads
bench --threads 99999 -> --threads
bench --device tpu -> tpu
bench --only nothing -> nothing
bench --only loader nothing -> nothing
bench --data nowhere -> nowhere
bench --data {text} -> text
bench --data {brokendata} -> train.beton
bench --data {few} -> 20 training images
bench --data= -> --data
bench --json= -> --json
bench --json {folder} -> is a folder
bench --json {text}/x.json -> text
bench --json {long} -> too long
bench extra -> extra
doctor nowhere -> nowhere
doctor {folder} -> nothing to check
doctor {text} -> nothing to check
doctor {brokendata} -> train.beton
doctor {brokenartefact} -> artefact.npz
doctor {brokenweights} -> model.safetensors
doctor {editedmanifest} {data} -> edited
doctor {data} nowhere {brokendata} -> 2 of 3
doctor --no-such -> --no-such
doctor --storage= -> --storage
craft -> label-consistent
craft nothing -> nothing
craft adaptive -> --data
craft adaptive --data {clean} -> --out
craft adaptive --data nowhere --out made --launcher local -> nowhere
craft adaptive --data {data} --out made --launcher local -> poisoned already
craft adaptive --data {clean} --out= --launcher local -> --out
craft adaptive --data {clean} --out .. --launcher local -> --out
craft adaptive --data {clean} --out {text} --launcher local -> text
craft adaptive --data {clean} --out {folder} --launcher local -> folder
craft adaptive --data {clean} --out made --workers 0 -> --workers
craft adaptive --data {clean} --out made --launcher local --preset nothing -> nothing
craft adaptive --data {clean} --out made --launcher local --backbone nowhere -> nowhere
craft adaptive --data {clean} --out made --launcher local --target 10 -> target
craft adaptive --data {clean} --out made --launcher local --alpha 2 -> craft.alpha
craft adaptive --data {clean} --out made --launcher local --steps 0 -> craft.steps
craft adaptive --data {clean} --out made --launcher local --lr nan -> craft.lr
craft adaptive --data {clean} --out made --launcher local --mask-budget 0 -> craft.mask_budget
craft label-consistent --data {clean} --out made --launcher local --eps 0 -> craft.eps
craft label-consistent --data {clean} --out made --launcher local --eps 256 -> craft.eps
craft label-consistent --data {clean} --out made --launcher local --step 0 -> craft.step
craft label-consistent --data {clean} --out made --launcher local --rate 2 -> rate
craft label-consistent --data {clean} --out made --launcher local --rate 0.9 -> rate
craft label-consistent --data {clean} --out made --launcher local --norm l1 -> l1
craft label-consistent --data {clean} --out made --launcher local --surrogate {data} -> model.json
craft label-consistent --data {clean} --out made --launcher local --surrogate {brokenweights} -> model.safetensors
craft label-consistent --data {clean} --out made --launcher local --surrogate= -> --surrogate
demo --seed -1 -> seed
demo --name .. -> --name
demo --storage= -> --storage
demo --storage s3://x -> s3
demo extra -> extra
"""

CASES = [tuple(line.split(" -> ")) for line in COMMANDS.strip().splitlines()]


def test_there_are_many():
    assert len({line for line, _ in CASES}) == len(CASES) >= 200


@pytest.fixture(scope="module")
def material(tmp_path_factory, digits, smoke_config) -> dict[str, Path]:
    """What the words in braces stand for; not to be changed."""
    root = tmp_path_factory.mktemp("material")
    found: dict[str, Path] = {"data": digits, "long": Path("x" * 300), "longnumber": Path("9" * 400)}

    def write(name: str, content: bytes | str, path: str | None = None) -> None:
        found[name] = root / name
        target = root / name if path is None else root / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())

    def copy(name: str, of: str, change: Callable[[Path], object]) -> None:
        found[name] = Path(shutil.copytree(found[of], root / name))
        change(found[name])

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def edit(path: Path, **fields) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    write("text", "text")
    write("empty", b"")
    write("folder", "dear", "file")
    os.mkfifo(root / "pipe")
    (root / "circle").symlink_to("circle")
    found |= {name: root / name for name in ("pipe", "circle")}
    for name, image in {
        "alpha": Image.new("RGBA", (3, 3)), "wide": Image.new("RGB", (5, 3)), "large": Image.new("RGB", (99, 99)),
        "torn": Image.effect_noise((64, 64), 90),
    }.items():  # fmt: skip
        image.save(root / name, format="PNG")
        found[name] = root / name
    os.truncate(root / "torn", 900)

    for name, text in {
        "deep": "[" * 100_000, "nan": '{"config": {"simclr": {"lr": NaN}}}', "unknownfield": '{"config": {"seeds": 1}}',
        "surrogatepath": '{"config": {"data": "\\ud800"}}', "zeropath": '{"config": {"data": "a\\u0000b"}}',
        "wrongtype": '{"config": {"simclr": {"lr": "fast"}}}',
        "manyblocks": '{"config": {"model": {"depths": [1000000000], "widths": [8]}}}',
        "wide_network": '{"config": {"model": {"depths": [1], "widths": [1000000000]}}}',
    }.items():  # fmt: skip
        write(name, text)

    found["clean"] = prepare(
        PrepareConfig(source=Digits(train_per_class=24, test_per_class=5), attack=NoAttack(), out=root / "clean"),
        progress=False,
    ).folder
    found["few"] = prepare(
        PrepareConfig(source=Digits(train_per_class=2, test_per_class=1), attack=NoAttack(), out=root / "few"),
        progress=False,
    ).folder
    copy("badlabel", "data", lambda f: change_label(f, "train", 3, 99))
    copy("brokendata", "data", lambda f: flip(f / "train.beton"))
    copy("editedmanifest", "data", lambda f: edit(f / "manifest.json", seed=77))
    copy("strangefile", "data", lambda f: edit(f / "manifest.json", files={"..": {"bytes": 1, "sha256": "a" * 64}}))

    arrays = {"pattern": np.zeros((16, 16, 3), np.uint8), "mask": np.full((16, 16), 26, np.uint8)}
    found["artefact"] = write_artefact(
        root / "artefact",
        "adaptive",
        arrays,
        image_px=16,
        target=3,
        fingerprint="f" * 64,
        settings={},
        evidence={},
        versions={},
    ).folder
    copy("brokenartefact", "artefact", lambda f: flip(f / "artefact.npz"))

    run, dataset = RunFolder(root / "run"), open_dataset(digits)
    run.claim(smoke_config, dataset)
    run.write_model(Classifier(smoke_config.model, 10).state_dict(), smoke_config, dataset, smoke_config.normalise)
    found["run"] = run.path
    copy("brokenweights", "run", lambda f: flip(f / "model.safetensors"))
    copy("editedmodel", "run", lambda f: edit(f / "model.json", image_px=32))

    def unsealed(folder: Path) -> None:
        content = json.loads((folder / "model.json").read_text())
        content = {k: v for k, v in content.items() if k not in ("weights", "checksum")}
        (folder / "model.json").write_text(json.dumps(content | {"image_px": 16.7}))

    copy("halfpixel", "run", unsealed)
    copy("otherdata", "run", lambda f: edit(f / "run.json", data_hash="0" * 64))

    def without_data(folder: Path) -> None:
        config = json.loads((folder / "run.json").read_text())["config"]
        edit(folder / "run.json", config=config | {"data": str(folder / "nowhere")})

    copy("nodata", "run", without_data)
    copy("oddrun", "run", lambda f: (f / "run.json").write_text('{"config": {"data": "\\ud800"}}'))
    result = {"method": "dbd", "dataset": "x", "clean_acc": 0.5}
    copy("finished", "run", lambda f: (f / "result.json").write_text(json.dumps(result)))
    copy("brokenresult", "run", lambda f: (f / "result.json").write_text("{"))
    copy("nanresult", "run", lambda f: (f / "result.json").write_text(json.dumps(result | {"clean_acc": float("nan")})))
    copy("badmetrics", "finished", lambda f: (f / "metrics.jsonl").write_text("{\n{}\n"))
    copy("badsplit", "finished", lambda f: (f / "split.parquet").write_text("PAR1"))
    copy("badfeatures", "finished", lambda f: (f / "features.npz").write_text("PK"))
    objects = np.array([{}], dtype=object)
    copy("pickled", "finished", lambda f: np.savez(f / "features.npz", index=objects, features=objects, kind="ssl"))

    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "pixels.png")
    png = (root / "pixels.png").read_bytes()
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            for i in range(4):
                write("images", png, f"{split}/{name}/{i}.png")
    copy("links", "images", lambda f: (f / "train" / "ant" / "link.png").symlink_to("/etc/hostname"))

    def linked(folder: Path) -> None:
        shutil.rmtree(folder / "test" / "bee")
        (folder / "test" / "bee").symlink_to(found["images"] / "test" / "bee")

    copy("classlinks", "images", linked)
    copy("oneclass", "images", lambda f: [shutil.rmtree(f / s / "bee") for s in ("train", "test")])
    copy("emptyclass", "images", lambda f: [p.unlink() for p in (f / "train" / "ant").iterdir()])
    copy("notrain", "images", lambda f: shutil.rmtree(f / "train"))
    copy("badimage", "images", lambda f: (f / "train" / "ant" / "0.png").write_bytes(png[:100]))
    bomb = Image.new("1", (20_000, 20_000))
    copy("bomb", "images", lambda f: bomb.save(f / "train" / "ant" / "0.png"))

    def table(name: str, labels: list, about: bytes | None = None) -> None:
        found[name] = root / name
        found[name].mkdir()
        content = pa.table({"image": pa.array([png] * len(labels), pa.binary()), "label": pa.array(labels, pa.int64())})
        if about is not None:
            content = content.replace_schema_metadata({b"huggingface": about})
        for split in ("train", "test"):
            pq.write_table(content, found[name] / f"{split}.parquet")

    table("parquet", [0, 1, 0, 1])
    table("nulllabel", [0, 1, None])
    table("hugelabel", [0, 1, 2**62])
    table("deepnames", [0, 1], b"[" * 50_000)
    table("surrogate", [0, 1], json.dumps({"info": {"features": {"label": {"names": ["\ud800", "b"]}}}}).encode())
    copy("badparquet", "parquet", lambda f: os.truncate(f / "train.parquet", 100))
    return found


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("DBD_STORAGE", raising=False)
    return place


def words(line: str, material: dict[str, Path]) -> list[str]:
    line = line.replace("SMOKE", SMOKE)
    for name, path in material.items():
        line = line.replace("{" + name + "}", str(path))
    assert "{" not in line, line
    # the control characters of the table, as a shell's $'...' gives them
    given = [word.removeprefix("$") for word in shlex.split(line.replace("$'", "'$"))]
    return [word.replace("\\n", "\n").replace("\\033", "\x1b") for word in given]


def looked_at(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of all that a command may not touch."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (at.st_size, at.st_mtime_ns) for path, at in found.items()}


@pytest.mark.parametrize(("line", "says"), CASES, ids=[line for line, _ in CASES])
def test_is_refused_with_one_message(line, says, material, place, capsys):
    before = looked_at(material["run"].parent)
    try:
        code = main(words(line, material))
    except SystemExit as end:  # tyro's own way out
        code = end.code
    shown, message = capsys.readouterr()
    assert code == 2, message
    assert "Traceback" not in shown + message
    ours = [text for text in message.splitlines() if text.startswith("error: ")]
    boxes = message.count("For full helptext")  # flags that do not parse
    assert len(ours) + boxes == 1, message
    if ours:
        assert ours[0].isprintable()
        assert message.endswith(ours[0] + "\n")
    text = " ".join(message.replace("│", " ").split())
    assert any(part.lower() in text.lower() for part in says.split("|")), message
    assert list(place.iterdir()) == []
    assert looked_at(material["run"].parent) == before
