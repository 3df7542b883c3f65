"""The flags of `dbd tune`; nothing here imports torch, for which --help need not wait."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep.errors import UserError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Search a space with Ray Tune. Stages that trials share are trained once."""

    space: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPACE")]
    """What to vary: a name, several with + between them, or file:PATH of a Python file with a Space."""
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """FIELD=DISTRIBUTION, more than once if need be: split.keep=uniform(0.2,0.8), also choice(A,B,...), loguniform,
    int, logint."""
    fix: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """FIELD=VALUE, more than once if need be: warmup.epochs=20. A field of the space is not varied then."""
    search: Literal["grid", "random", "tpe"] | None = None
    """grid: every combination (5 even steps of a range that names none). tpe: Optuna's estimator. The space's own
    unless given."""
    trials: int | None = None
    """How many; the space's own number, or the whole grid, unless given. More than before continues a sweep."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seed"])] = (0,)
    """A trial's value is the mean over these; data sets are poisoned with them too."""
    metric: tuple[str, ...] = ()
    """What to optimise; several for a Pareto front. score (clean_acc minus asr) unless given; for attacks asr."""
    truth: Literal["known", "none"] = "known"
    """none: optimise what a defender sees, withheld_agreement unless --metric names another such metric."""
    asha: bool = False
    """Stop trials early that fall behind (asynchronous successive halving over epochs of the last stage)."""
    grace: int = 5
    """With --asha: epochs before a trial can be stopped."""
    reduction: int = 3
    """With --asha: one of so many goes on at each rung."""
    method: str = "dbd"
    """The defence that is tuned, or attacked."""
    against: tuple[str, ...] = ()
    """Spaces of attacks: methods to try against the best attack at the end; none, dbd and the robust ones unless
    given."""
    min_psnr: float | None = None
    """Spaces of attacks: PSNR in dB that a trigger must have at least; 20 unless a bound is given."""
    min_ssim: float | None = None
    """Spaces of attacks: SSIM that a trigger must have at least."""
    preset: str = "demo"
    """What all trials have in common."""
    smoke: bool = False
    """A few short trials on the embedded images: tests the machinery, not the method."""
    data: Path | None = None
    """Dataset folder, for one seed; the preset's own unless given."""
    workers: int = 1
    """Ray Train workers of each trial, from 1. Trials of one worker share started processes."""
    gpus_per_worker: float | None = None
    """GPUs of each worker, fractions too; one where there are any unless given."""
    parallel: int | None = None
    """Trials at the same time, from 1; as many as fit unless given."""
    time_budget: str | None = None
    """Stop after this long, with checkpoints: 90s, 30m, 2h. The same command continues."""
    name: str | None = None
    """Folder of the sweep under the storage: tune/SPACE-PRESET-sSEED unless given. The same name resumes a sweep."""
    storage: Path = Path(os.environ.get("DBD_STORAGE") or "runs")
    """Where runs lie; on a cluster, a path that all nodes share. Default: $DBD_STORAGE, or runs/."""


def seconds(text: str) -> float:
    """A time budget: "90", "90s", "1.5h".

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if found is None or float(found[1]) == 0:
        raise UserError(f"{text!r} is no time", where="--time-budget", expected="e.g. 90s, 30m, 2h")
    return float(found[1]) * UNITS[found[2]]
