"""A list of pictures and their labels: CSV or JSON."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.io import limits
from data_prep.io.json import parse_json
from data_prep.sources.split_names import split_of

_PATH = (
    "path",
    "file",
    "file_name",
    "filename",
    "filepath",
    "image",
    "image_path",
    "img_path",
    "img",
    "image_id",
    "id",
)
_LABEL = ("label", "labels", "class", "class_name", "category", "target", "y", "breed", "species")
_SPLIT = ("split", "set", "subset", "partition", "phase", "fold", "data_set", "dataset")


def read_list(path: Path) -> list[tuple[str, str, str]]:
    """Path, label and split ("" where the list has none) of every picture, as the list has them.

    CSV has a header that names its columns, or exactly two of them, path and label; it is separated by commas,
    semicolons or tabs. JSON is a list of objects with these fields, an object of labels by path, or an object a line.

    Raises:
        UserError: unreadable, empty, columns that cannot be told, a row without path or label.
    """
    try:
        text = limits.read_limited(path, limits.JSON_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the list ({error.strerror})", where=path) from error
    except UnicodeDecodeError as error:
        raise UserError("the list is not UTF-8", where=path, expected="a CSV or JSON file") from error
    rows = _json(text, path) if path.suffix.lower() in (".json", ".jsonl", ".ndjson") else _csv(text, path)
    if not rows:
        raise UserError("the list is empty", where=path, expected="a row a picture")
    return rows


def _csv(text: str, where: Path) -> list[tuple[str, str, str]]:
    first = text.partition("\n")[0]
    delimiter = max("\t;,", key=first.count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise UserError(f"the list is not CSV ({error})", where=where) from error
    if not rows:
        return []
    header = [name.strip().lower() for name in rows[0]]
    places = [_place(header, names) for names in (_PATH, _LABEL, _SPLIT)]
    if places[0] is None or places[1] is None:
        if len(header) != 2 or places != [None, None, None]:
            raise _unclear(rows[0], where)
        places, rows = [0, 1, None], [[], *rows]
    at, by, of = places
    assert at is not None
    assert by is not None
    made = []
    for number, row in enumerate(rows[1:], start=1):
        if len(row) <= max(at, by) or not row[at].strip() or not row[by].strip():
            raise UserError(f"row {number} has no path or no label", where=where, expected="both in every row")
        made.append((row[at].strip(), row[by].strip(), row[of].strip() if of is not None and of < len(row) else ""))
    return made


def _json(text: str, where: Path) -> list[tuple[str, str, str]]:
    lines = where.suffix.lower() != ".json"
    try:
        content = [parse_json(line) for line in text.splitlines() if line.strip()] if lines else parse_json(text)
    except ValueError as error:
        raise UserError(f"the list is not JSON ({error})", where=where) from error
    if isinstance(content, dict):
        content = [{"path": path, "label": label} for path, label in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError("the list is no list of objects", where=where, expected='[{"path": ..., "label": ...}, ...]')
    if not content:
        return []
    keys = list(content[0])
    places = [_place([key.lower() for key in keys], names) for names in (_PATH, _LABEL, _SPLIT)]
    if places[0] is None or places[1] is None:
        raise _unclear(keys, where)
    names = [None if place is None else keys[place] for place in places]
    made = []
    for number, row in enumerate(content):
        values: list[Any] = ["" if name is None else row.get(name) for name in names]
        if (
            not all(isinstance(value, str | int) and not isinstance(value, bool) for value in values)
            or "" in values[:2]
        ):
            raise UserError(f"entry {number} has no path or no label", where=where, expected="text or a number in each")
        made.append(tuple(map(str, values)))
    return made


def _place(header: list[str], names: tuple[str, ...]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _unclear(header: list[str], where: Path) -> UserError:
    return UserError(
        f"the columns of the list are {', '.join(header[:10])}", where=where, expected="path and label, and maybe split"
    )


def split_name(text: str) -> str:
    """The split that a row of a list names; "" where it names none."""
    return split_of(text) or text
