"""`dbd report RUN...`: tables, figures and one page from run folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep.errors import UserError
from dbd_dist.runtime.bucket.address import address_of
from dbd_dist.runtime.bucket.folder import local_folder


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What runs found: a self-contained HTML page, or only the table, averaged over seeds."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of finished runs, or their addresses in an object store."""
    out: Path | None = None
    """File to write. Default: for html report.html in the run folder, or in the folder that the runs share; for md and
    text the terminal."""
    format: Literal["html", "md", "text"] = "html"
    """html: tables, curves, loss histograms, t-SNE, suspects. md, text: the table alone."""
    figures: Path | None = None
    """Write figures alone, as PNG and SVG, into this folder: t-SNE, losses, ROC and detection, attacks, accuracy over
    epochs, seconds by stage."""


def main(argv: list[str]) -> int:
    """Parse, read, write."""
    arguments = tyro.cli(Arguments, args=argv, prog="dbd report")
    if not arguments.runs:
        raise UserError("no run folder is named", where="dbd report", hint="name the folders of one or more runs")
    to_page = arguments.format == "html" and arguments.figures is None
    if to_page and arguments.out is None and any(map(address_of, arguments.runs)):
        raise UserError("runs in an object store have no folder for the page", where="--out", expected="a file")
    folders = list({os.path.realpath(folder): folder for folder in map(local_folder, arguments.runs)}.values())
    from dbd_dist.reporting import page, runs, settings, tables

    loaded = [runs.load_run(folder, arrays=False) for folder in folders]
    for run in loaded:
        if run.result is None:
            raise UserError(
                f"there is no result.json: the run {run.state}"
                if run.metrics == []
                else f"there is no result.json ({run.state})",
                where=run.folder,
                hint="wait for the run, or repeat its command to resume it",
            )
    if arguments.figures is not None:
        if arguments.out is not None:
            raise UserError("figures go to a folder of their own", where="--out", expected="no --out with --figures")
        from dbd_dist.reporting import pictures

        print(pictures.summary(*pictures.write_figures(folders, arguments.figures)))
        return 0
    if arguments.format == "html":
        print(page.write_report(folders, arguments.out or _common(folders) / "report.html"))
        return 0
    rows = tables.aggregate(*settings.results_of(loaded))
    text = (tables.as_markdown if arguments.format == "md" else tables.as_text)(rows)
    if arguments.out is None:
        print(text)
    else:
        page.write_file(arguments.out, text + "\n")
        print(arguments.out)
    return 0


def _common(folders: list[Path]) -> Path:
    paths = [folder.resolve() for folder in folders]
    return paths[0] if len(paths) == 1 else Path(os.path.commonpath(paths))
