"""`dbd tune SPACE`: a sweep over a named space."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.errors import UserError
from dbd_dist.launch.start import STORAGE, check_before_data, check_storage, prepare_for
from dbd_dist.presets import preset as find_preset
from tune_spaces.spaces import SPACES
from tune_spaces.spaces import space as find_space


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Run every point of a named grid as a Ray Tune trial. Stages that no trial changes are trained once."""

    space: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPACE")]
    """What to vary."""
    preset: str = "demo"
    """What all trials have in common."""
    smoke: bool = False
    """A few short trials on the embedded images: tests the machinery, not the method."""
    data: Path | None = None
    """Dataset folder; the preset's own unless given."""
    seed: int = 0
    workers: int = 1
    """Ray Train workers of each trial, from 1."""
    parallel: int | None = None
    """Trials at the same time, from 1; as many as fit unless given."""
    name: str | None = None
    """Folder of the sweep under the storage: tune/SPACE-PRESET-sSEED unless given. The same name resumes a
    sweep."""
    storage: Path = STORAGE


def main(argv: list[str]) -> int:
    """Run the sweep and print its table."""
    spaces = ", ".join(f"{name} ({space.why})" for name, space in SPACES.items())
    arguments = tyro.cli(Arguments, args=argv, prog="dbd tune", description=f"Spaces: {spaces}.")
    for flag in ("parallel", "workers"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"{value} is not allowed", where=f"--{flag}", expected="a whole number from 1")
    space = find_space(arguments.space, smoke=arguments.smoke)
    check_storage(arguments.storage)
    chosen = find_preset("smoke" if arguments.smoke else arguments.preset)
    config = dataclasses.replace(
        chosen.config(),
        seed=arguments.seed,
        data=arguments.data,
        compute=dataclasses.replace(chosen.compute, workers=arguments.workers),
    )
    name = arguments.name if arguments.name is not None else f"tune/{arguments.space}-{config.preset}-s{config.seed}"
    check_before_data(config, name, "ray")
    if config.data is None:
        config = dataclasses.replace(config, data=prepare_for(chosen, config.seed, arguments.storage, config.method))
    from tune_spaces.sweep import run_sweep

    rows = run_sweep(config, space, storage=arguments.storage, name=name, parallel=arguments.parallel)
    fields = list(space.grid)
    print("  ".join([f"{field:>18}" for field in fields] + ["  accuracy", "attack success", "kept poisoned"]))
    for row in rows:
        asr = "-" if row["asr"] is None else f"{row['asr']:.3f}"
        kept = "-" if row["kept_poisoned"] is None else f"{row['kept_poisoned']} of {row['poisoned']}"
        print(
            "  ".join([f"{row[f]:>18g}" for f in fields] + [f"{row['clean_acc']:>10.3f}", f"{asr:>14}", f"{kept:>13}"])
        )
    print(f"\n{(arguments.storage / name).resolve()}")
    return 0
