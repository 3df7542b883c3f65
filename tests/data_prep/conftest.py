"""Small images, and files of them, for the tests of data_prep."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


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
