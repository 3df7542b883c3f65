"""Which column of a table holds the images and which the labels: by name, else by type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

IMAGE, LABEL = "image", "label"
"""The usual names. They may be missing where another column can be nothing else."""

_IMAGES = ("image", "img", "picture", "photo", "pixels", "pixel_values", "jpg", "jpeg", "png", "webp", "file", "path")
_PATHS = ("image", "img", "picture", "photo", "image_path", "img_path", "file_name", "filename", "file", "path")
_LABELS = ("label", "labels", "class", "class_name", "category", "target", "y", "cls", "fine_label")
_NO_LABELS = ("__key__", "__url__", "id", "idx", "index", "key", "width", "height")


def find_columns(
    schema: Any, features: Mapping[str, Any], image: str, label: str, *, where: Path | str
) -> tuple[str, str]:
    """The names of both columns.

    Args:
        schema: an Arrow schema.
        features: Hugging Face's description of columns, by name, as far as there is one.
        image: the name that was asked for; `IMAGE` also stands for whichever holds images.
        label: likewise, `LABEL` for whichever holds labels.
        where: the file, for errors.

    Raises:
        UserError: not there, there twice, of another type, or more than one could be meant.
    """
    for name, flag in ((image, "image_column"), (label, "label_column")):
        if name in schema.names or name not in (IMAGE, LABEL):
            _check_once(schema, name, flag, where)
    found = image if image in schema.names else _image(schema, where)
    _check_once(schema, found, "image_column", where)  # one found by its type may have a namesake of another
    if not holds_images(schema.field(found).type):
        raise UserError(
            f"column {found!r} is {schema.field(found).type}",
            where=where,
            expected="struct<bytes: binary, path: string>, binary, or paths of files",
            hint="name another one with image_column",
        )
    labelled = label if label in schema.names else _label(schema, features, found, where)
    _check_once(schema, labelled, "label_column", where)
    if not holds_labels(schema.field(labelled).type):
        raise UserError(
            f"column {labelled!r} is {schema.field(labelled).type}",
            where=where,
            expected="integers, names or booleans",
            hint="name another one with label_column",
        )
    return found, labelled


def _check_once(schema: Any, name: str, flag: str, where: Path | str) -> None:
    times = schema.names.count(name)
    if times != 1:
        raise UserError(
            f"{'more than one' if times else 'no'} column {name!r}; the columns are {_listed(schema.names)}",
            where=where,
            hint=f"name the right one with {flag}",
        )


def holds_images(kind: Any) -> bool:
    """Can a column of this Arrow type hold images: bytes, a struct with them, paths, or lists of one of these?"""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return not pa.types.is_list(kind.value_type) and holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))
    return any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string)) or (
        pa.types.is_large_string(kind)
    )


def holds_labels(kind: Any) -> bool:
    """Can a column of this Arrow type hold labels, or lists of one?"""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating, pa.types.is_null)
    return any(test(kind) for test in (*tests, pa.types.is_string, pa.types.is_large_string))


def _image(schema: Any, where: Path | str) -> str:
    import pyarrow as pa

    def is_path(kind: Any) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    certain = [f.name for f in schema if holds_images(f.type) and not is_path(f.type)]
    lists = {f.name for f in schema if pa.types.is_list(f.type)}
    certain = [name for name in certain if name not in lists] or certain
    if not certain:
        certain = [f.name for f in schema if is_path(f.type) and f.name.lower() in _PATHS]
    return _only(certain, _IMAGES, "image", schema, where)


def _label(schema: Any, features: Mapping[str, Any], image: str, where: Path | str) -> str:
    def is_class(name: str) -> bool:
        feature = features.get(name)
        return isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"

    others = [f.name for f in schema if f.name != image and holds_labels(f.type)]
    classes = [name for name in others if is_class(name)]
    if not classes:
        classes = [name for name in others if name.lower() in _LABELS]
    if not classes:
        classes = [name for name in others if name.lower() not in _NO_LABELS]
        if len(classes) > 1:
            import pyarrow as pa

            integers = {f.name for f in schema if pa.types.is_integer(f.type)}
            whole = [n for n in classes if n in integers]
            classes = whole if len(whole) == 1 else classes
    return _only(classes, (), "label", schema, where)


def _only(candidates: list[str], preferred: tuple[str, ...], what: str, schema: Any, where: Path | str) -> str:
    if len(candidates) > 1:
        candidates = (
            sorted((n for n in candidates if n.lower() in preferred), key=lambda n: preferred.index(n.lower()))[:1]
            or candidates
        )
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        says, shown = f"several columns may be the {what}s", candidates
    else:
        says, shown = f"no column {what!r}, nor another that holds {what}s; the columns are", list(schema.names)
    raise UserError(
        f"{says}{': ' if candidates else ' '}{_listed(shown)}", where=where,
        hint=f"name the right one with {what}_column",
    )  # fmt: skip


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
