"""One self-contained HTML page from run folders: no script, nothing loaded from elsewhere, light and dark.

The templates hold the page; `sections` computes what they show. Whatever a template prints passes through `_safe`: only
what was made here as `Markup` (drawings, images) is not escaped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from dbd_dist.reporting import curves, gallery, sections, settings, shown, tables, wording
from dbd_dist.reporting.conclusions import conclusions
from dbd_dist.reporting.runs import Run, load_run
from dbd_dist.reporting.wording import printable

LONGEST = 1000
"""Characters of any one text on the page."""


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the page on some runs.

    Args:
        folders: run folders; those of unfinished runs are shown as far as they got.
        out: the file to write.

    Returns:
        `out`.

    Raises:
        UserError: no folder is given, one is no run folder, a file in it is damaged, or `out` cannot be written.
    """
    if not folders:
        raise UserError("no run folder is named", where="report", hint="name the folders of one or more runs")
    write_file(out, render(folders))
    return out


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        UserError: it cannot be written there.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError("is a folder", where=path, hint="name a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=path, hint="choose another file") from error
    finally:
        with suppress(OSError):  # renamed, or never there
            temporary.unlink()


def render(folders: Sequence[Path]) -> str:
    """The page as text."""
    runs = [load_run(folder, arrays=False) for folder in folders]
    results, variants = settings.results_of(runs)
    rows = tables.aggregate(results, variants)
    chosen = shown.choose(runs, rows)
    return environment().get_template("report.html").render(
        title=_title(runs),
        conclusions=conclusions(rows)[: shown.SHOWN_ROWS] or [_unfinished(runs)],
        runs=runs,
        rows=rows,
        chosen=chosen,
        losses=curves.losses(runs),
        measured=curves.measured(runs, rows),
        features=sections.features(chosen),
    )  # fmt: skip


def _title(runs: Sequence[Run]) -> str:
    found = dict.fromkeys(tables.family(run.result) for run in runs if run.result)
    datasets = list(found or dict.fromkeys(run.dataset for run in runs))
    return f"DBD-Dist: {', '.join(map(printable, datasets[:3]))}{' …' if len(datasets) > 3 else ''}"


def _unfinished(runs: Sequence[Run]) -> str:
    states = wording.joined(f"{printable(run.folder.name, 40)}: {run.state}" for run in runs[:4])
    return f"There is no result yet ({states}{' …' if len(runs) > 4 else ''})."


def environment() -> Any:
    """The Jinja2 environment of the page's templates: what strangers named is made printable, then escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        finalize=_safe,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {"short": printable, "unbroken": _unbroken}
    for module in (curves, gallery, sections, settings, shown, tables):
        env.globals[module.__name__.rpartition(".")[2]] = module
    return env


def _safe(value: Any) -> Any:
    return value if hasattr(value, "__html__") else printable(value, LONGEST)


def _unbroken(text: str) -> Any:
    """Text in which a number and its "%" stay on one line."""
    from markupsafe import Markup, escape

    return Markup(str(escape(printable(text, LONGEST))).replace(" %", "&nbsp;%"))
