"""The trials of a sweep on disk: sweep.json, written whenever one begins or ends.

A row: "number"; "status" (running, finished, stopped: early, failed); "values" of the varied fields; "metrics", means
over seeds, and "spread", their standard deviations; "runs" (run folders); "stages" (name -> seconds, reused);
"seconds"; "waited_s" (for stages that others trained); "epoch" of an early stop; "message" of a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.io.json import read_json, write_json
from tune_spaces.metrics import Metric, front

FILE = "sweep.json"
EARLIER_FILE = "grid.json"
"""Of sweeps of version 0.2 and before."""
Row = dict[str, Any]


class Book:
    """All trials of one sweep.

    Args:
        identity: what the sweep is; see `Plan.identity`.

    Raises:
        UserError: the folder holds another sweep.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], metrics: Sequence[Metric]):
        self.folder, self.identity, self._metrics = folder, dict(identity), metrics
        self.rows: dict[int, Row] = {}
        if (folder / FILE).exists():
            stored = _stored(folder / FILE)
            _check_same(stored["sweep"], self.identity, folder)
            self.rows = {row["number"]: row for row in stored["trials"]}
        elif (folder / EARLIER_FILE).exists():
            raise UserError(
                "this sweep was made by an earlier version", where=folder, hint="choose another --name, or delete it"
            )

    def begin(self, number: int, values: Mapping[str, Any]) -> None:
        """A trial is about to start."""
        self.rows[number] = {"number": number, "status": "running", "values": dict(values), "metrics": {}}
        self.save()

    def end(self, number: int, **fields: Any) -> Row:
        """A trial has ended."""
        self.rows[number] = {**self.rows[number], **fields}
        self.save()
        return self.rows[number]

    def ended(self, number: int) -> bool:
        """Whether there is nothing left to do for a trial: failed ones are tried again."""
        return number in self.rows and self.rows[number]["status"] in ("finished", "stopped")

    def save(self) -> None:
        """Write sweep.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / FILE, {"sweep": self.identity, "trials": self.ranked()})

    def signed(self, row: Row) -> list[float] | None:
        """The metrics that are optimised, higher is better; None where one is missing. Attacks that are more visible
        than allowed are below all others, the more the worse."""
        if "too_visible_by" in row["metrics"]:
            return [-1e6 * (1 + row["metrics"]["too_visible_by"])] * len(self._metrics)
        values = [metric.signed(row["metrics"]) for metric in self._metrics]
        return None if None in values else values  # type: ignore[return-value]

    def ranked(self) -> list[Row]:
        """Best first: finished trials, then the others by number. With several metrics, those of the Pareto front
        first, by the first metric."""
        finished = [row for row in self.rows.values() if row["status"] == "finished" and self.signed(row) is not None]
        others = sorted((row for row in self.rows.values() if row not in finished), key=lambda row: row["number"])
        best = {row["number"] for row in self.front()}

        def place(row: Row) -> tuple[Any, ...]:
            signed = self.signed(row) or []
            first = row["number"] not in best if len(self._metrics) > 1 else False
            return (first, [-value for value in signed], row["number"])

        return sorted(finished, key=place) + others

    def front(self) -> list[Row]:
        """The finished trials that no other beats in every metric; with one metric, those with the best value."""
        rows = [row for row in self.rows.values() if row["status"] == "finished" and self.signed(row) is not None]
        return [rows[i] for i in front([self.signed(row) or [] for row in rows])]

    def best(self) -> Row | None:
        """The first in the ranking, if one has finished."""
        ranked = self.ranked()
        return (
            ranked[0] if ranked and ranked[0]["status"] == "finished" and self.signed(ranked[0]) is not None else None
        )


def _stored(path: Path) -> dict[str, Any]:
    hint = "choose another --name, or delete the folder"
    try:
        stored = read_json(path)
        if not isinstance(stored["sweep"], dict) or not all(
            isinstance(row["number"], int) and isinstance(row["values"], dict) and isinstance(row["metrics"], dict)
            for row in stored["trials"]
        ):
            raise TypeError("a field has the wrong type")
        return stored
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"not the trials of a sweep ({error})", where=path, hint=hint) from error


def _check_same(theirs: Mapping[str, Any], mine: Mapping[str, Any], folder: Path) -> None:
    differing = [name for name in mine if theirs.get(name) != mine[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"this sweep exists with another {name}: {theirs.get(name)!r}"[:300],
            where=folder,
            expected=f"{mine[name]!r}, to continue it"[:300],
            hint="choose another --name, or delete the folder",
        )
