"""Small images, and files of them, for the tests of data_prep."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[2]
REAL_DATA = CHECKOUT.parent / "shared" / "data"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def encode_image() -> Callable[..., bytes]:
    """Pixels to the bytes of an image file."""

    def encode(pixels: np.ndarray, fmt: str = "PNG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=fmt, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def write_parquet() -> Callable[..., Path]:
    """Image files' bytes (or None) and labels to a Parquet file in the Hugging Face layout."""

    def write(
        path: Path,
        images: Sequence[bytes | None],
        labels: Sequence[int | None],
        names: Sequence[str] | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table(
            {
                "image": pa.array([None if i is None else {"bytes": i, "path": None} for i in images], struct),
                "label": pa.array(labels, pa.int64()),
            }
        )
        if names is not None:
            features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            table = table.replace_schema_metadata(metadata)
        pq.write_table(table, path, row_group_size=7)
        return path

    return write


@pytest.fixture
def parquet_root(tmp_path: Path, rng, encode_image, write_parquet) -> Path:
    """40 training and 20 test images of 12 px, PNG, three classes with names."""
    root = tmp_path / "shapes"
    for split, count in (("train", 40), ("test", 20)):
        images = [encode_image(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)) for _ in range(count)]
        labels = [i % 3 for i in range(count)]
        write_parquet(root / f"{split}.parquet", images, labels, ["disc", "ring", "star"])
    return root


@pytest.fixture
def cifar10_root() -> Path:
    root = REAL_DATA / "cifar10-jpeg"
    if not root.is_dir():
        pytest.skip("no real images beside the checkout")
    return root


@pytest.fixture
def imagenette_root() -> Path:
    root = REAL_DATA / "imagenette-224"
    if not root.is_dir():
        pytest.skip("no real images beside the checkout")
    return root


@pytest.fixture
def within() -> Callable[..., Any]:
    """Call a function and fail, rather than hang with it, after a while: bare FFCV hangs where it should raise."""

    def call(work: Callable[[], Any], seconds: float = 30) -> Any:
        outcome: Future[Any] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return outcome.result(timeout=seconds)

    return call


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int | None], None]]:
    """Make writes beyond so many bytes of a file fail, as on a full disk: first short, then with an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


@pytest.fixture(scope="session")
def run_python() -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run a program in a process of its own, for what ends or harms the process."""

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture
def make_image_folder(encode_image, rng) -> Callable[..., dict[str, np.ndarray]]:
    """Write ROOT/SPLIT/CLASS/*.png; returns the pixels by path below ROOT, in sorted order."""

    def make(
        root: Path,
        classes: Sequence[str] = ("bee", "ant"),
        count: int = 6,
        splits: Sequence[str] = ("train", "test"),
        shape: tuple[int, int] = (12, 12),
    ) -> dict[str, np.ndarray]:
        pixels = {}
        for split in splits:
            for name in sorted(classes):
                (root / split / name).mkdir(parents=True)
                for i in range(count):
                    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
                    relative = f"{split}/{name}/{i:02d}.png"
                    (root / relative).write_bytes(encode_image(image))
                    pixels[relative] = image
        return pixels

    return make


@pytest.fixture(scope="session")
def files_below() -> Callable[[Path], list[str]]:
    """All files below a folder, hidden ones too."""
    return lambda folder: sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="session")
def ffcv_writes() -> Callable[..., None]:
    """Write a file with FFCV's own writer, one worker, pages as ours."""

    def write(path: Path, images: np.ndarray, labels: np.ndarray, mode: str = "raw") -> None:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        from data_prep.beton.format import page_bytes

        class Samples:
            def __len__(self) -> int:
                return len(images)

            def __getitem__(self, i: int) -> tuple[np.ndarray, int, int]:
                return images[i], int(labels[i]), i

        fields = {"image": RGBImageField(write_mode=mode), "label": IntField(), "index": IntField()}
        page = page_bytes(images[0].nbytes)
        DatasetWriter(str(path), fields, page_size=page, num_workers=1).from_indexed_dataset(Samples())

    return write
