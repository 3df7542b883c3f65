"""A table as Markdown, LaTeX, CSV and HTML: mean and sample standard deviation over seeds, the article beside them.
Markdown and HTML also have the article's claims."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dbd_dist.reporting import tables, wording
from dbd_dist.reporting.page import environment, write_file
from dbd_dist.reporting.wording import printable
from dbd_dist.reproduce import article, claims
from dbd_dist.reproduce.collect import TARGET_ACC, Made, Row, missing, trained_s, value_of

APART = 0.2
"""Standard deviation of a share from which the runs are listed instead: a mean of 90 and 15 % misleads."""
CLAIMS = "Claims of the article"
TEXTS = 2
"""Columns of text; the others are numbers."""


def _spread(row: Row, field: str, show: Callable[[float], str]) -> str:
    stat = row.stat(field)
    if stat is None:
        return "–"
    fewer = "" if stat.n == len(row.results) else f" (n = {stat.n})"
    return show(stat.mean) + ("" if stat.std is None else f" ± {show(stat.std)}") + fewer


def _percent(field: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        stat = row.stat(field)
        if stat is not None and stat.std is not None and stat.std > APART:
            values = [value_of(result, field) for result in row.results]
            return ", ".join(f"{100 * value:.1f}" for value in values if value is not None)
        return _spread(row, field, lambda share: f"{100 * share:.2f}")

    return cell


def _kept(row: Row) -> str:
    of = row.stat("poisoned")
    kept = _spread(row, "kept_poisoned", wording.number)
    if of is None or not of.mean or kept == "–":
        return "–"
    return f"{kept} of {wording.number(of.mean)}"


def _found(row: Row) -> str:
    found = _first(row, ("split_quality.last.most_suspect.0.1", "flagged.most_suspect.0.1")).removesuffix("0.1")
    stats = [row.stat(f"{found}{i}.1") for i in range(3)]
    return "–" if None in stats else " / ".join(f"{100 * stat.mean:.1f}" for stat in stats if stat is not None)


def _stated(numbers: dict[tuple[str, str], str]) -> Callable[[Row], str]:
    return lambda row: "" if row.own else numbers.get((row.case, row.variant), "")


def _auroc(*fields: str) -> Callable[[Row], str]:
    return lambda row: _spread(row, _first(row, fields), lambda share: f"{share:.3f}")


def _first(row: Row, fields: Sequence[str]) -> str:
    """The first field that a result of the row has: splits rank all samples, detectors flag some."""
    return next((field for field in fields if row.stat(field) is not None), fields[0])


def _both(*fields: str) -> Callable[[Row], str]:
    """Means of shares beside each other."""

    def cell(row: Row) -> str:
        stats = [row.stat(field) for field in fields]
        return "–" if not any(stats) else " / ".join("–" if s is None else f"{100 * s.mean:.1f}" for s in stats)

    return cell


def _rates(row: Row) -> str:
    return _both(*(_first(row, (f"split_quality.last.{rate}", f"flagged.{rate}")) for rate in ("tpr", "fpr")))(row)


UNTRIGGERED = "untriggered %"
TARGET = "target class %"
WARMUP = "after warm-up: acc. / ASR %"
NEAR = "poisoned near their true / given class, %"
FLAGGED = "images flagged: poisoned / clean, %"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "attack": lambda row: printable(row.attack),
    "method": lambda row: printable(row.method) + (f" {tables.CLEAN}" if row.needs_clean else ""),
    "n": lambda row: str(len(row.results)),
    "clean acc. %": _percent("clean_acc"),
    "ASR %": _percent("asr"),
    UNTRIGGERED: _percent("asr_untriggered"),
    TARGET: _percent(TARGET_ACC),
    "article: acc. / ASR %": _stated(article.ACCURACY_ASR),
    "poisoned kept": _kept,
    FLAGGED: _both("flagged.tpr", "flagged.fpr"),
    "classes flagged: right / wrong, %": _both("flagged.class_tpr", "flagged.class_fpr"),
    "dropped or flagged: poisoned / clean, %": _rates,
    "AUROC first split": _auroc("split_quality.first.auroc"),
    "AUROC at the end": _auroc("split_quality.last.auroc", "flagged.auroc"),
    "poisoned among most suspect, %": _found,
    "article: among most suspect, %": _stated(article.FOUND),
    WARMUP: _both("after_warmup.clean_acc", "after_warmup.asr"),
    "k-NN acc. %": _both("feature_quality.knn_acc"),
    NEAR: _both("feature_quality.poisoned_near_true", "feature_quality.poisoned_near_given"),
    "time": lambda row: _spread(row, "seconds", wording.duration),
}
"""Titles and cells; columns that are empty in every row are left out."""
SUSPECT = "poisoned among most suspect, %"
DETECTION = (
    "AUROC first split",
    "AUROC at the end",
    "dropped or flagged: poisoned / clean, %",
    SUSPECT,
    "article: among most suspect, %",
    WARMUP,
    "k-NN acc. %",
    NEAR,
)


def cells(made: Made) -> tuple[list[str], list[list[str]]]:
    """Head and body."""
    left_out = (FLAGGED,) if made.about["detects"] else DETECTION  # one column has what is flagged
    shown = [name for name in COLUMNS if name not in left_out]
    body = [[COLUMNS[name](row) for name in shown] for row in made.rows if row.results]  # `notes` name the others
    used = [i for i in range(len(shown)) if i < TEXTS + 1 or any(line[i] not in ("", "–") for line in body)]
    return [shown[i] for i in used], [[line[i] for i in used] for line in body]


def notes(made: Made) -> list[str]:
    """Sentences that belong below the table."""
    head, _ = cells(made)
    seeds = made.about["seeds"]
    lines = [f"Preset {made.about['preset']}, {wording.seeds(seeds)}."]
    if len(seeds) > 1:
        lines.append("Mean ± sample standard deviation over seeds, or the values themselves where they lie far apart.")
    if any(row.needs_clean for row in made.rows):
        lines.append(f"{tables.CLEAN} needs clean images of the defender's own, which the others do without.")
    if made.about["holdout_clean"]:
        lines.append(
            f"{100 * made.about['holdout_clean']:g} % of the training images are set aside clean in every data set."
        )
    if UNTRIGGERED in head:
        lines.append(
            "Untriggered: what ASR would be if the trigger did nothing, which is the share of the same images without "
            "it that are called what the attacker wants."
        )
    if TARGET in head:
        lines.append(
            "Target class: the share of its own test images that are recognised. Where it is low, that class is seldom "
            "called, and a low attack success says little."
        )
    if any(name.startswith("article") for name in head):
        lines.append(article.WHAT)
    if SUSPECT in head:
        lines.append(
            "Among most suspect: share of poisoned samples among those of the target class with the highest loss or "
            "score, 250, 500 and 1,000 of 50,000 training images or as many in proportion."
        )
    if NEAR in head:
        lines.append(
            "k-NN acc.: of test images by the votes of their 20 nearest features; near: the share of a poisoned "
            "sample's 20 nearest that have its true and its given class. Self-supervised features where there are any."
        )
    lines += _unlike(made)
    lines += _privacy(made)
    lines.append("Time: training of all stages, those that another run of the table trained among them.")
    lines += _cost(made)
    found = made.results
    for what, values, between in (
        ("Hardware", {_device(result) for result in found}, "; "),  # a device has commas of its own
        ("Commit", {str(result.get("commit")) for result in found if result.get("commit")}, ", "),
    ):
        if values:
            lines.append(f"{what}: {between.join(sorted(values))}.")
    gaps = missing(made)
    return [*lines, *([f"Without a result: {'; '.join(gaps)}."] if gaps else [])]


def _unlike(made: Made) -> list[str]:
    """Where methods did not train on the same images, which tables that were put together have."""
    hashes: dict[tuple[str, int], set[str]] = {}
    for row in made.rows:
        for result in row.results:
            hashes.setdefault((row.attack, result["seed"]), set()).add(str(result.get("data_hash")))
    found: dict[str, list[int]] = {}
    for (attack, seed), of in hashes.items():
        if len(of) > 1:
            found.setdefault(printable(attack), []).append(seed)
    if not found:
        return []
    named = "; ".join(f"{attack} ({wording.seeds(seeds)})" for attack, seeds in found.items())
    return [f"Not all methods trained on the same images, poisoned by the same command: {named}."]


def _cost(made: Made) -> list[str]:
    """What sharing stages spares: the table against each run by itself, and against DBD alone for each attack and seed
    whose methods were all run on one machine."""
    runs = [(row.case, result) for row in made.rows for result in row.results]
    once, apart = wording.duration(trained_s(runs)), wording.duration(sum(_seconds(result) for _, result in runs))
    if once == apart:
        return []
    ratios = []
    for case, seed in dict.fromkeys((case, result["seed"]) for case, result in runs):
        rows = [row for row in made.rows if row.case == case]
        here = {row.variant: result for row in rows for result in row.results if result["seed"] == seed}
        alone = _seconds(here["dbd"]) if "dbd" in here else 0.0
        if alone and len(here) == len(rows) and len({_device(result) for result in here.values()}) == 1:
            ratios.append(trained_s((case, result) for result in here.values()) / alone)
    over = f" (median of {len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    against = f"; all methods take {median(ratios):.2f} times as long as DBD alone{over}" if ratios else ""
    return [f"With each shared stage trained once, all runs took {once}, without sharing it would be {apart}{against}."]


def _privacy(made: Made) -> list[str]:
    """What training with noise guarantees, where a method says so."""
    rows = [row for row in made.rows if row.stat("measures.epsilon") is not None]
    found = []
    for method in dict.fromkeys(row.method for row in rows):
        measured = [result["measures"] for row in rows if row.method == method for result in row.results]
        epsilons = [f"{one['epsilon']:,.1f}" for one in measured if "epsilon" in one]
        deltas = [f"{one['delta']:g}" for one in measured if "delta" in one]
        found.append(
            f"{printable(method)}: differential privacy with epsilon {', '.join(dict.fromkeys(epsilons))} at delta "
            f"{', '.join(dict.fromkeys(deltas))}; above some 10 it promises little."
        )
    return found


def _seconds(result: Any) -> float:
    return sum((result.get("seconds") or {}).values())


def _device(result: Any) -> str:
    size = result.get("world_size") or 1
    workers = f", {size} workers" if size != 1 else ""
    return f"{printable(result.get('device'))}{workers}, {result.get('precision')}"


def commands(made: Made) -> list[str]:
    """That make every cell, each once, in an order in which they can be run."""
    found = [command for result in made.results for command in result["commands"]]
    return list(dict.fromkeys(found))


def as_markdown(made: Made, *, with_commands: bool = True) -> str:
    """The table, its notes, the article's claims, and the commands of all cells."""
    head, body = cells(made)
    sides = ["---"] * TEXTS + ["---:"] * (len(head) - TEXTS)
    lines = _markdown_table(head, body, sides)
    text = "\n".join(lines + [part for note in notes(made) for part in ("", _markdown(note))])
    checked = claims.cells(made)
    if checked:
        lines = _markdown_table(claims.HEAD, checked, ["---"] * len(claims.HEAD))
        text += "\n".join(["", "", f"### {CLAIMS}", "", claims.summary(made), "", *lines])
    if with_commands:
        text += "\n\nCommands:\n\n```\n" + "\n".join([made.about["command"], "", *commands(made)]) + "\n```"
    return text + "\n"


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], sides: Sequence[str]) -> list[str]:
    lines = [f"| {' | '.join(map(_markdown, line))} |" for line in (head, *body)]
    return [lines[0], f"| {' | '.join(sides)} |", *lines[1:]]


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~$])", r"\\\1", text).replace("&", "&amp;")


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "†": r"$^\dagger$", "–": "--", "<": r"$<$",
    ">": r"$>$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def as_latex(made: Made) -> str:
    """A tabular for the package booktabs, a rule between attacks; notes and commands as comments."""
    head, body = cells(made)
    lines = [f"% {printable(line, 400)}" for line in (made.about["title"], *notes(made), made.about["command"])]
    lines += [rf"\begin{{tabular}}{{{'l' * TEXTS}{'r' * (len(head) - TEXTS)}}}", r"\toprule"]
    lines += [" & ".join(map(_latex, head)) + r" \\", r"\midrule"]
    before = None
    for line in body:
        if before is not None and line[0] != before:
            lines.append(r"\midrule")
        shown = [line[0] if line[0] != before else "", *line[1:]]
        lines.append(" & ".join(map(_latex, shown)) + r" \\")
        before = line[0]
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [f"% {printable(command, 2000)}" for command in commands(made)]
    return "\n".join(lines) + "\n"


NUMBERS = ("clean_acc", "asr", "robust_acc", "asr_untriggered", TARGET_ACC, "kept_poisoned", "poisoned", "seconds",
           "images", "split_quality.first.auroc",
           "split_quality.last.auroc", "split_quality.last.tpr", "split_quality.last.fpr",
           "split_quality.last.most_suspect.0.1", "split_quality.last.most_suspect.1.1",
           "split_quality.last.most_suspect.2.1", "flagged.tpr", "flagged.fpr", "flagged.auroc",
           "flagged.most_suspect.0.1", "flagged.most_suspect.1.1", "flagged.most_suspect.2.1",
           "flagged.class_tpr", "flagged.class_fpr", "after_warmup.clean_acc", "after_warmup.asr",
           "feature_quality.knn_acc", "feature_quality.poisoned_near_true", "feature_quality.poisoned_near_given",
           "measures.epsilon")  # fmt: skip
"""Columns of the CSV, each as mean and standard deviation; shares in 0-1."""


def as_csv(made: Made) -> str:
    """A line a row: plain numbers, hardware, commits and commands."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    spread = [f"{field.replace('.', '_')}_{what}" for field in NUMBERS for what in ("mean", "std")]
    writer.writerow(
        [
            "attack", "method", "needs_clean", "n", "seeds", *spread, "article_acc_asr", "article_found", "hardware",
            "commit", "commands",
        ]
    )  # fmt: skip
    for row in made.rows:
        stats = [row.stat(field) for field in NUMBERS]
        numbers = [value for stat in stats for value in (("", "") if stat is None else (stat.mean, stat.std))]
        writer.writerow(
            [
                printable(row.case), printable(row.variant), row.needs_clean, len(row.results),
                " ".join(str(result["seed"]) for result in row.results), *numbers,
                COLUMNS["article: acc. / ASR %"](row), COLUMNS["article: among most suspect, %"](row),
                *("; ".join(dict.fromkeys(values)) for values in (
                    map(_device, row.results), (str(result.get("commit")) for result in row.results),
                    (command for result in row.results for command in result["commands"]),
                )),
            ]
        )  # fmt: skip
    return stream.getvalue()


def as_html(made: Made) -> str:
    """A page of its own."""
    head, body = cells(made)
    groups: dict[str, list[Sequence[str]]] = {}
    for line in body:
        groups.setdefault(line[0], []).append(line[1:])
    return environment().get_template("table.html").render(
        title=made.about["title"], head=head[1:], groups=groups, lines=notes(made), commands=commands(made),
        command=made.about["command"], claims=claims.cells(made), claims_head=claims.HEAD, claims_title=CLAIMS,
        claims_summary=claims.summary(made),
    )  # fmt: skip


FORMATS: dict[str, Callable[[Made], str]] = {"md": as_markdown, "tex": as_latex, "csv": as_csv, "html": as_html}


def write(made: Made, folder: Path) -> list[Path]:
    """The table in every format, named by the table.

    Raises:
        UserError: the folder cannot be written.
    """
    paths = [folder / f"{made.about['table']}.{suffix}" for suffix in FORMATS]
    for path, form in zip(paths, FORMATS.values()):
        write_file(path, form(made))
    return paths
