"""Damage and malice from a seed: bytes, JSON values, words of a command line."""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.beton import read_beton
from data_prep.beton.format import FIELD, FIELDS, HEADER, SAMPLE
from data_prep.dataset.manifest import record_files
from data_prep.io.hashes import content_hash, data_hash
from data_prep.io.json import sealed

HOSTILE_TEXT = (
    "", " ", ".", "..", "/", "../../etc/passwd", "/dev/zero", "a\0b", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\nb",
    "a\rb", "\u202egnp.exe", "\ud800", "\udcff", "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>",
    "${jndi:x}", "%s%n", "'; DROP TABLE x; --", "é", "数", "\U0001f600", "a" * 300, "a" * 100_000, "nan", "-1", "1e999",
    "{}", "[]", "null", "\u2028", "\x9b31m",
)  # fmt: skip
HOSTILE_NUMBERS = (
    0, -1, 1, 2, 3, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30,
    10**400, -(10**400), 3.4e38, -3.4e38,
    -(2**63), 0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def value(rng: random.Random) -> Any:
    """A JSON value that nobody expects."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(HOSTILE_TEXT)
    if kind < 6:
        return rng.choice(HOSTILE_NUMBERS)
    return rng.choice([None, True, False, [], {}, [None], {"": {}}, [[]], {"a": "b"}, nested(50), nested(400)])


def change_json(rng: random.Random, content: Any, times: int | None = None) -> Any:
    """A copy with some nodes replaced, removed, added or doubled."""
    content = copy.deepcopy(content)
    for _ in range(times if times is not None else rng.choice([1, 1, 1, 2, 4])):
        nodes: list[tuple[Any, Any]] = []
        open_nodes = [content]
        while open_nodes and len(nodes) < 3000:
            node = open_nodes.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            nodes += [(node, key) for key in keys]
            open_nodes += [node[key] for key in keys]
        if not nodes:
            return value(rng)
        parent, key = rng.choice(nodes)
        match rng.randrange(7):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(HOSTILE_TEXT)[:1000]] = value(rng)
            case 1 | 2 if isinstance(parent, list):
                parent.insert(rng.randrange(len(parent) + 1), parent[key])
            case 3 if isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
                parent[key] = parent[key] * rng.choice([-1, 2, 0.5, 1000]) + rng.choice([0, 1, -1])
            case 4 if isinstance(parent[key], str) and parent[key]:
                at = rng.randrange(len(parent[key]))
                parent[key] = parent[key][:at] + rng.choice(HOSTILE_TEXT)[:400] + parent[key][at + 1 :]
            case _:
                parent[key] = value(rng)
    return content


def json_text(rng: random.Random, content: Any) -> bytes:
    """As bytes, now and then in a way that no writer would choose."""
    try:
        text = json.dumps(content, ensure_ascii=rng.random() < 0.7)
    except RecursionError:
        text = "[" * 5000
    if rng.random() < 0.05:
        text = "\ufeff" + text
    return text.encode("utf-8", "surrogatepass")


def change_bytes(rng: random.Random, data: bytes, *, within: tuple[int, int] | None = None) -> bytes:
    """Bits flipped, numbers overwritten, pieces removed, doubled or exchanged; within a range of positions."""
    out = bytearray(data)
    low, high = within or (0, len(out))
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        low, high = min(low, len(out)), min(high, len(out))
        if low >= high:
            return bytes(out)
        at = rng.randrange(low, high)
        match rng.randrange(9):
            case 0 | 1 | 2:
                out[at] ^= 1 << rng.randrange(8)
            case 3:
                out[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
            case 4 | 5:
                powers = [2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
                number = rng.choice([0, 1, len(out), *powers])
                size = rng.choice(["<H", "<I", "<Q", ">I", ">H"])
                piece = struct.pack(size, number % (1 << 8 * struct.calcsize(size)))
                out[at : at + len(piece)] = piece
            case 6:
                del out[at : at + rng.choice([1, 2, 8, 100, 10_000])]
            case 7:
                start = rng.randrange(low, high)
                out[at:at] = out[start : start + rng.choice([1, 4, 64, 1000])]
            case 8:
                if rng.random() < 0.5:
                    del out[at:]
                else:
                    length = rng.choice([1, 4, 16, 256])
                    out[at : at + length] = bytes(min(length, len(out) - at))
    return bytes(out)


def change_label(folder: Path, split: str, sample: int, label: int) -> None:
    """Give one sample of a data set another label, and make every hash fit, as a careful forger would."""
    path = folder / f"{split}.beton"
    content = bytearray(path.read_bytes())
    start = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
    np.frombuffer(content, dtype=SAMPLE, count=sample + 1, offset=start)["label"][sample] = label
    path.write_bytes(bytes(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    images, labels, _ = read_beton(path)
    hashes = manifest["content_hash"] | {split: content_hash(images, labels)}
    files = {name: vars(record) for name, record in record_files(folder).items()}
    del manifest["checksum"]
    manifest |= {"content_hash": hashes, "data_hash": data_hash(hashes), "files": files}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
