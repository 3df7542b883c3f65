"""Label columns of any type to class names and labels from 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.classes import difference

HIGHEST = 1_000_000
"""Of a label that is not in a list of names: a damaged one looks like any other number."""
NAME_CHARACTERS = 1_000
"""Of a class name."""


@dataclass(frozen=True)
class Labels:
    """The labels of one split, as they are given."""

    codes: np.ndarray
    """int64 (n,): positions in `names`, or numbers where there are none."""
    missing: np.ndarray
    """bool (n,): where a label is null."""
    names: tuple[str, ...] | None
    """What the codes mean; None where they are numbers of unknown meaning."""
    fixed: bool = False
    """The names are a list with an order of its own, rather than the values that occur."""

    @property
    def usable(self) -> bool:
        """Is there any label? Test splits of competitions have -1 or null in all rows."""
        return bool((~self.unlabelled).any())

    @property
    def unlabelled(self) -> np.ndarray:
        """bool (n,): null, or -1, which stands for it."""
        return self.missing | ((self.codes == -1) & (self.names is None or self.fixed))


def read_labels(column: Any, names: Sequence[str] | None, *, where: Path | str) -> Labels:
    """The labels of an Arrow column: integers, whole floats, strings, booleans, dictionaries of these, or lists of one.

    Args:
        column: a ChunkedArray or Array of n values.
        names: the class names in their order, where the column's description has them.
        where: names the column's file in errors.

    Raises:
        UserError: another type, several labels in a row, a float that is not whole, a name that is not in `names`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        counts = pc.list_value_length(column)  # pyright: ignore[reportAttributeAccessIssue]
        if column.null_count or pc.min_max(counts)["max"].as_py() != 1 or pc.min_max(counts)["min"].as_py() != 1:  # pyright: ignore[reportAttributeAccessIssue]
            raise UserError("rows have several labels, or none", where=where, expected="one label a row")
        column = pc.list_flatten(column)  # pyright: ignore[reportAttributeAccessIssue]
    if pa.types.is_null(column.type):  # every row is null
        column = column.cast(pa.int64())
    if pa.types.is_boolean(column.type):
        column, names = column.cast(pa.int64()), names or ("False", "True")
    if pa.types.is_dictionary(column.type) and not _is_text(column.type.value_type):
        column = column.cast(column.type.value_type)
    missing = np.asarray(column.is_null(nan_is_null=True).to_numpy(), dtype=bool)
    if pa.types.is_dictionary(column.type) or _is_text(column.type):
        return _texts(column, missing, names, where)
    if pa.types.is_floating(column.type):
        values = column.fill_null(0).to_numpy().astype(np.float64)
        values[missing] = 0
        wrong = np.flatnonzero((values != np.rint(values)) | (np.abs(values) > 2**53))
        if len(wrong):
            raise UserError(
                f"row {wrong[0]}: label {values[wrong[0]]:g} is not whole", where=where, expected="whole numbers"
            )
        codes = values.astype(np.int64)
    elif pa.types.is_integer(column.type):
        codes = column.fill_null(0).to_numpy().astype(np.int64)
    else:
        raise UserError(f"the labels are {column.type}", where=where, expected="integers or names")
    codes[missing] = 0
    return Labels(codes, missing, None if names is None else tuple(names), fixed=names is not None)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _texts(column: Any, missing: np.ndarray, names: Sequence[str] | None, where: Path | str) -> Labels:
    """The labels of a column of strings or a dictionary of them."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    whole = column.unify_dictionaries().combine_chunks()
    values = whole.dictionary.to_pylist() if len(whole) else []
    codes = whole.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    occur = np.zeros(len(values), dtype=bool)  # a category without a row is no class
    occur[codes[~missing]] = True
    order = sorted_names([str(value) for value, kept in zip(values, occur) if kept])
    too_long = next((name for name in order if len(name) > NAME_CHARACTERS), None)
    if too_long is not None:
        raise UserError(
            f"a class name of {len(too_long):,} characters", where=where, expected=f"at most {NAME_CHARACTERS:,}"
        )
    listed = tuple(names) if names is not None else tuple(order)
    place = {name: i for i, name in enumerate(listed)}
    unknown = [name for name in order if name not in place]
    if unknown:
        raise UserError(f"label {unknown[0]!r} is not a class", where=where, expected=", ".join(listed[:20]))
    position = np.array([place.get(str(value), 0) for value in values] or [0], dtype=np.int64)
    return Labels(position[codes], missing, listed, fixed=names is not None)


def sorted_names(names: Sequence[str]) -> list[str]:
    """Class names in order: by number where all are whole numbers (2 before 10), else as text, as torchvision does."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def joined(train: Labels, test: Labels | None, *, where: Path | str) -> tuple[tuple[str, ...], list[np.ndarray], str]:
    """One list of classes for both splits.

    Returns:
        Class names, int64 labels of train and test (those of rows without a label mean nothing), and what had to be
        mapped, "" where nothing.

    Raises:
        UserError: names that differ, test labels that are not in train, numbers without end.
    """
    both = [train] if test is None else [train, test]
    if train.fixed or (test is not None and test.fixed):
        named = train if train.fixed else test
        assert named is not None
        assert named.names is not None
        return _trimmed(named.names, [one.codes for one in both], [one.unlabelled for one in both])
    if any((one.names is None) != (train.names is None) for one in both):
        raise UserError("labels are names in one split and numbers in another", where=where, expected="the same in all")
    if train.names is not None:
        place = {name: i for i, name in enumerate(train.names)}
        for one in both[1:]:
            if not set(one.names or ()) <= set(place):
                raise UserError(
                    f"classes differ from those in train: {difference(train.names, one.names or ())}",
                    where=where,
                    expected="classes that are in train",
                )
        moved = [np.array([place[name] for name in one.names or ()] or [0], dtype=np.int64) for one in both]
        return train.names, [to[one.codes] for to, one in zip(moved, both)], ""
    return _numbers([one.codes for one in both], [one.missing for one in both], where)


def _trimmed(
    names: tuple[str, ...], codes: list[np.ndarray], unlabelled: list[np.ndarray]
) -> tuple[tuple[str, ...], list[np.ndarray], str]:
    """Without the names of a list that no row of any split has: a part of a larger data set brings all of its names."""
    occur = np.zeros(len(names), dtype=bool)
    for values, without in zip(codes, unlabelled):
        seen = values[~without]
        if ((seen < 0) | (seen >= len(names))).any():  # reported with its row by whoever checks all labels
            return names, codes, ""
        occur[seen] = True
    if occur.all() or occur.sum() < 2:
        return names, codes, ""
    moved = np.cumsum(occur) - 1
    left = tuple(name for name, kept in zip(names, occur) if kept)
    said = f"{len(names) - len(left):,} of {len(names):,} class names have no image and are left out"
    return left, [moved[np.where(without, 0, values)] for values, without in zip(codes, unlabelled)], said


def _numbers(
    codes: list[np.ndarray], missing: list[np.ndarray], where: Path | str
) -> tuple[tuple[str, ...], list[np.ndarray], str]:
    """Numbers without names: 0 to K - 1 as they are, others in their order."""
    seen = [values[~without] for values, without in zip(codes, missing)]
    kinds = np.unique(seen[0])
    highest = max((int(values.max()) for values in seen if len(values)), default=0)
    lowest = min((int(values.min()) for values in seen if len(values)), default=0)
    if highest > HIGHEST:
        raise UserError(f"label {highest}", where=where, expected=f"labels of at most {HIGHEST:,}")
    whole = np.array_equal(kinds, np.arange(len(kinds)))
    if whole or lowest < 0:  # what is below 0 is reported with its row by whoever checks all labels
        return tuple(str(i) for i in range(max(len(kinds), highest + 1 if lowest < 0 else 0))), codes, ""
    unknown = [int(v) for values in seen[1:] for v in np.setdiff1d(values, kinds)]
    if unknown:
        raise UserError(f"test label {unknown[0]} is of no training image", where=where, expected="labels of train")
    moved = [np.searchsorted(kinds, values).clip(max=len(kinds) - 1) for values in codes]
    said = f"labels {kinds[0]} to {kinds[-1]}" + ("" if np.ptp(kinds) == len(kinds) - 1 else ", with gaps,")
    return tuple(str(kind) for kind in kinds), moved, f"{said} became classes 0 to {len(kinds) - 1}, called by them"
