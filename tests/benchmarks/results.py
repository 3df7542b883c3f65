"""docs/results.md from docs/results/*.json and the text in docs/results/results.md.j2.

    python -m tests.benchmarks.results [docs/results] [--check]

Every number of the page comes from a file. A file that the text does not name, such as a new gpu_*.json, is shown as a
plain table. A file is an object with `command`, `device` and `commit`, and one of: `results` (contents of
result.json), `rows` (objects with the same fields, those of `dbd bench` among them), `figures` (numbers for the text).
A folder that `dbd reproduce TABLE --out docs/results/NAME` wrote becomes a section with its table, and with the `note`
that its table.json may have. The small tables of
the README, between comments that name them, are written too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dbd_dist.reporting import names, tables, wording
from dbd_dist.reproduce import formats
from dbd_dist.reproduce.claims import SELDOM
from dbd_dist.reproduce.collect import ABOUT, TARGET_ACC, Made, Row, read

FRACTIONS = ("clean_acc", "asr", "robust_acc")
PHOTOGRAPHED = ("badnets", "blended", "wanet", "label-consistent")
"""Attacks of the README's table of photographs."""
ON_DIGITS = ("badnets", "blended", "wanet", "label-consistent", "adaptive", "clean")
"""And of the digits."""
APART = 0.2
"""Standard deviation of attack success from which the runs are listed instead: a mean of 90 and 15 % misleads."""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first columns are text, the others numbers."""
    sides = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, sides, *rows])


def percent(results: Sequence[Mapping[str, Any]], field: str) -> str:
    """ "98.94 ± 0.50" over runs; empty where none has the field."""
    values = [result[field] for result in results if result.get(field) is not None]
    stat = tables.statistics(values)
    if stat is None:
        return ""
    if stat.std is not None and stat.std > APART:
        return ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * stat.mean:.2f}" + ("" if stat.std is None else f" ± {100 * stat.std:.2f}")


def kept(results: Sequence[Mapping[str, Any]]) -> str:
    """ "11, 5 of 36": poisoned images kept, by seed."""
    found = [result for result in sorted(results, key=lambda r: r["seed"]) if result.get("kept_poisoned") is not None]
    return f"{', '.join(str(r['kept_poisoned']) for r in found)} of {found[0]['poisoned']}" if found else ""


def value(field: str, content: Any) -> str:
    """A cell of a plain table."""
    if content is None:
        return ""
    if isinstance(content, Mapping):
        return ", ".join(f"{name} {value(name, inner)}" for name, inner in content.items())
    if isinstance(content, list):
        return ", ".join(value(field, inner) for inner in content)
    if isinstance(content, float):
        if field in FRACTIONS:
            return f"{100 * content:.2f} %"
        return f"{content:,.0f}" if abs(content) >= 1000 else f"{content:#.3g}".rstrip(".")
    return str(content).replace("|", "\\|")


class Page:
    """What the template calls; keeps count of the files that it has used."""

    def __init__(self, folder: Path):
        self.files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        self.tables: dict[str, Made] = {
            path.parent.name: read(path.parent) for path in sorted(folder.glob(f"*/{ABOUT}"))
        }
        """What `dbd reproduce` wrote, by folder."""
        self.used: set[str] = set()

    def file(self, name: str) -> dict[str, Any]:
        self.used.add(name)
        return self.files[name]

    def figures(self, name: str) -> dict[str, Any]:
        return self.file(name)["figures"]

    def source(self, name: str) -> str:
        """Where a file's numbers come from, in one line."""
        content = self.file(name)
        about = content.get("about") or content
        rows = _rows(content)
        commits = {str(row["commit"]) for row in rows if row.get("commit")} or {str(about.get("commit") or "")}
        command = about.get("command") or ""
        if isinstance(command, list):
            command = ("; " if any(" " in part for part in command) else " ").join(command)
        host = about.get("host") or {}
        device = host.get("gpus") or (f"{host['cpu']}, {host['cores']} cores" if host else about.get("device"))
        parts = [
            f"`{command}`" if command else "",
            value("", device),
            f"commit {', '.join(sorted(commits))}" if any(commits) else "",
        ]
        note = about.get("note")
        line = f"[{name}.json](results/{name}.json): {'; '.join(filter(None, parts))}."
        return line + (f" Note: {note.rstrip('.')}." if note else "")

    def runs(self, name: str) -> str:
        """Runs over seeds, a row for each data set and method."""
        rows = tables.aggregate(self.file(name)["results"])
        titles = ("data set", "training images", "method", "seeds", "clean accuracy %", "attack success %")
        cells = []
        for row in rows:
            seeds = wording.seeds(row.seeds).split(" ", 1)[1]
            measures = [percent(row.results, field) for field in FRACTIONS]
            time = tables.COLUMNS["time"](row)
            cells.append([row.dataset, f"{row.train_size:,}", row.title, seeds, *measures, kept(row.results), time])
        return markdown_table([*titles, "robust accuracy %", "poisoned images kept", "time"], cells, text_columns=4)

    def attacks(self, name: str) -> str:
        """A row an attack, without and with defence."""
        content = self.file(name)
        rows = []
        for case, about in content["cases"].items():
            of = [result for result in content["results"] if result["case"] == case]
            plain, defended = ([r for r in of if names.defends(r["method"], r) == defends] for defends in (False, True))
            cells = [percent(runs, field) for runs in (plain, defended) for field in ("clean_acc", "asr")]
            rows.append([about["title"], about["protocol"], *cells, kept(defended)])
        measures = [
            f"{method}: {what} %" for method in ("no defence", "DBD") for what in ("accuracy", "attack success")
        ]
        head = ["attack", "protocol", *measures, "poisoned images kept, by seed"]
        return markdown_table(head, rows, text_columns=2)

    def shortened(self, name: str) -> str:
        """Runs of recipes with shortened schedules, beside the figures of the paper."""
        content, cells = self.file(name), []
        for run in content["runs"]:
            epochs = ", ".join(f"{stage} {n} of {run['full_epochs'][stage]}" for stage, n in run["epochs"].items())
            paper = " / ".join(
                f"{100 * share:.2f}" for share in content["about"]["paper"][run["attack"]][run["method"]]
            )
            time = wording.duration(sum(run["seconds"].values()))
            measures = [percent([run], field) for field in FRACTIONS]
            cells.append([run["attack"], names.title(run["method"], run), epochs, *measures, kept([run]), time, paper])
        head = ["attack", "method", "epochs", "clean accuracy %", "attack success %", "robust accuracy %"]
        head += ["poisoned images kept", "time", "paper: accuracy / attack success %"]
        return markdown_table(head, cells, text_columns=3)

    def plain(self, name: str) -> str:
        """Rows of any kind, with what all have in common below."""
        rows = _rows(self.file(name))
        if rows and "median" in rows[0]:
            cells = [[str(r["name"]), measured(r), str(r.get("n") or ""), str(r.get("unit") or "")] for r in rows]
            return markdown_table(["", "median (least – most)", "n", "unit"], cells)
        fields = dict.fromkeys(field for row in rows for field in row)
        shared = {f for f in fields if len(rows) > 1 and len({json.dumps(row.get(f)) for row in rows}) == 1}
        shown = [field for field in fields if field not in shared]
        table = markdown_table(shown, [[value(field, row.get(field)) for field in shown] for row in rows])
        common = "; ".join(f"{field} {value(field, rows[0][field])}" for field in fields if field in shared)
        return table + (f"\n\nAll rows: {common}." if common else "")

    def table(self, name: str) -> str:
        """A table of `dbd reproduce`, its notes and where it comes from."""
        made = self.tables[name]
        source = (
            f"[{name}](results/{name}): `{made.about['command']}`; the files there have the commands of every cell."
        )
        note = made.about.get("note")
        return f"{formats.as_markdown(made, with_commands=False)}\n{source}" + (f" Note: {note}." if note else "")

    def others(self, start: str = "") -> list[str]:
        """Files that the text has not named so far."""
        return [name for name in self.files if name not in self.used and name.startswith(start)]

    def demo(self) -> str:
        """The demo over its seeds."""
        rows = tables.aggregate(self.file("demo")["results"])
        cells = [[row.title, *(percent(row.results, f) for f in FRACTIONS), kept(row.results)] for row in rows]
        head = ["", "clean accuracy %", "attack success %", "robust accuracy %", "poisoned images kept, by seed"]
        return markdown_table(head, cells)

    def digits_and_gpu(self) -> str:
        """The small table at the top of the README."""
        cells = []
        for row in tables.aggregate(self.file("demo")["results"]):
            images = f"digits (`make demo`), {len(row.results)} seeds, 2 CPU cores"
            measures = [percent(row.results, field) for field in ("clean_acc", "asr")]
            cells.append([images, row.title, *measures, tables.COLUMNS["poisoned kept"](row)])
        for run in (run for run in self.file("gpu_cifar10")["runs"] if run["attack"] == "badnets"):
            images = f"CIFAR-10, {run['scale']} of the schedule, one {run['device']}"
            measures = [percent([run], "clean_acc"), percent([run], "asr"), kept([run]) or "–"]
            cells.append([images, names.title(run["method"], run), *measures])
        head = ["images under BadNets, 5 % poisoned", "training", "clean accuracy %", "attack success %"]
        return markdown_table([*head, "poisoned images kept"], cells, text_columns=2)

    def digits(self) -> str:
        """Every attack and method on the digits."""
        hardened = [row for row in self.tables["digits_robust"].rows if row.variant == "dbd-robust"]
        return _small([*self.tables["digits_main"].rows, *hardened], ON_DIGITS)

    def photographs(self) -> str:
        """`cifar10_cpu`."""
        return _small(self.tables["cifar10_main"].rows, PHOTOGRAPHED)

    def readme(self) -> dict[str, str]:
        """The README's tables, by the comment that stands before them."""
        return {
            "digits and gpu": self.digits_and_gpu(),
            "digits": self.digits(),
            "photographs": self.photographs(),
        }


def _small(rows: Sequence[Row], cases: Sequence[str]) -> str:
    """A row a method that has results: accuracy / attack success under each attack."""
    titles = {row.case: row.attack for row in reversed(rows)} | {"clean": "no attack"}
    methods: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.results and row.case in cases:
            methods.setdefault(row.variant, {})[row.case] = row
    cells = []
    for of in methods.values():
        one = next(iter(of.values()))
        named = one.method + (f" {tables.CLEAN}" if one.needs_clean else "")
        cells.append([named, *(_pair(of.get(case)) for case in cases)])
    return markdown_table(["accuracy / attack success %", *(titles[case] for case in cases)], cells)


def _pair(row: Row | None) -> str:
    """Accuracy and attack success in percent, with a mark where the target's own images are seldom recognised."""
    stats = [] if row is None else [row.stat(field) for field in ("clean_acc", "asr")]
    shown = " / ".join(f"{100 * stat.mean:.1f}" for stat in stats if stat is not None) or "–"
    recognised = None if row is None else row.stat(TARGET_ACC)
    return shown + (" ‡" if recognised is not None and recognised.mean < SELDOM else "")


def with_tables(text: str, made: Mapping[str, str]) -> str:
    """A page with its tables anew, each between a comment with its name and `<!-- end -->`."""
    for name, table in made.items():
        before, found, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not found or not end:
            raise ValueError(f"the page has no place for the table {name!r}")
        text = f"{before}{found}\n{table}\n\n{end}{after}"
    return text


def _rows(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a file, whatever it calls them."""
    for key in ("results", "rows", "runs"):
        if key in content:
            return content[key]
    benches = content.get("bench")
    if isinstance(benches, Mapping):
        return [{**row, "name": f"{bench}: {row['name']}"} for bench, rows in benches.items() for row in rows]
    return [content.get("figures") or {}]


def measured(row: Mapping[str, Any]) -> str:
    """ "12.0 (11.5 – 12.3)"."""
    spread = "" if row.get("least") is None else f" ({value('', row['least'])} – {value('', row['most'])})"
    return value("", row["median"]) + spread


def render(folder: Path) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,  # Markdown from our own files
    )  # fmt: skip
    environment.filters["duration"] = wording.duration
    return environment.get_template("results.md.j2").render(page=Page(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page beside the folder, or say whether it is current."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/results"))
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is not current")
    arguments = parser.parse_args(argv)
    out, readme = arguments.folder.with_suffix(".md"), arguments.folder.resolve().parents[1] / "README.md"
    texts = {out: render(arguments.folder)}
    if readme.exists():
        texts[readme] = with_tables(readme.read_text(), Page(arguments.folder).readme())
    if arguments.check:
        old = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
        for path in texts:
            print(f"{path} is {'not current' if path in old else 'current'}")
        return 1 if old else 0
    for path, text in texts.items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
