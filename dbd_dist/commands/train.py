"""`dbd train PRESET`: dataset folder -> run folder."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.dataset.manifest import check_recorded, read_manifest
from data_prep.errors import UserError
from data_prep.io.json import read_json
from dbd_dist.config import TrainConfig
from dbd_dist.launch.start import STORAGE, check_before_data, launch_staged, prepare_for, stage_storage
from dbd_dist.methods import METHODS
from dbd_dist.presets import PRESETS, Preset, preset
from dbd_dist.stages import STAGES

_LONG = {f"--{name}": f"--compute.{name}" for name in ("wait-s", "log", "profile")}
"""Short forms of flags."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    method: str
    """How to train; each method has flags of its own, below."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    name: str | None = None
    """Name of the run, its folder under the storage. Default: PRESET-METHOD-sSEED. The same name resumes a run."""
    storage: Path = STORAGE
    """Where run folders lie: a folder, on a cluster one that all nodes share; or s3://BUCKET/PREFIX (gs:, abfs:),
    staged on this machine and uploaded with every checkpoint. Default: $DBD_STORAGE, or runs/."""
    launcher: Literal["ray", "local"] = "ray"
    """ray: Ray Train workers. local: this process, or torchrun's, without Ray."""
    cpus_per_worker: int | None = None
    """CPUs that Ray sets aside for each worker. Default: an equal part of all, so that one run has the cluster."""


def main(argv: list[str]) -> int:
    """Parse, train, print the result."""
    arguments, prepared = parse(argv)
    config = arguments.config
    name = arguments.name if arguments.name is not None else f"{config.preset}-{config.method.name}-s{config.seed}"
    check_before_data(config, name, arguments.launcher)
    staging = stage_storage(arguments.storage)
    storage = arguments.storage if staging is None else staging.folder
    if config.data is None:
        if prepared is None:
            raise UserError("no dataset folder is given", where="--data", hint="make one with `dbd prepare`")
        folder = prepare_for(prepared, config.seed, storage, config.method)
        config = dataclasses.replace(config, data=folder)
        config.check_image_px(read_manifest(folder).image_px)
    cpus = arguments.cpus_per_worker
    result = launch_staged(config, staging, storage, name, arguments.launcher, cpus_per_worker=cpus)
    if int(os.environ.get("RANK", "0")) != 0:
        return 0
    if staging is None:
        folder, stages = (str((storage / part).resolve()) for part in (name, "stages"))
    else:
        folder, stages = staging.run_address(name), staging.run_address("stages")
    if result is None:
        print(f"stopped after {config.stop_after}; kept in {stages}")
        return 0
    from dbd_dist.reporting.tables import format_results

    print(format_results([result]))
    print(f"\n{folder}")
    return 0


def parse(argv: list[str]) -> tuple[Arguments, Preset | None]:
    """What a command line asks for, and the preset where it starts from one.

    Raises:
        UserError: there is no such preset or method, or a setting that is not allowed.
        SystemExit: flags that do not parse (2), or --help (0).
    """
    started, rest, prepared, source = _start(argv)
    rest = [
        _LONG.get(word.partition("=")[0], word.partition("=")[0]) + "".join(word.partition("=")[1:]) for word in rest
    ]
    rest = _without_other_methods(rest, started)
    backbone = _value("--model.backbone", rest)
    if backbone is not None:  # a preset's depths are those of its own backbone
        started = dataclasses.replace(started, model=started.model.with_backbone(backbone))
    arguments = tyro.cli(
        Arguments,
        args=rest,
        default=Arguments(method=started.method.name, config=started),
        prog=f"dbd train {started.preset}",
        description=_description(started.preset),
        config=(tyro.conf.FlagConversionOff,),
    )
    config = arguments.config
    if source is not None and config.data is not None and config.data == started.data:
        check_recorded(config.data, *source)
    if config.preset != started.preset:
        raise UserError(
            f"{config.preset!r} would rename the preset {started.preset} and change nothing",
            where="--preset",
            hint=f"name a preset first: dbd train {config.preset if config.preset in PRESETS else 'PRESET'}",
        )
    return arguments, prepared


def _start(argv: list[str]) -> tuple[TrainConfig, list[str], Preset | None, tuple[Any, Path] | None]:
    """The configuration to start from, the flags that are left, the preset with its data where it is one, and the hash
    of the data of a stored run with the file that records it."""
    method = _value("--method", argv)
    if argv and argv[0].startswith("--config"):
        path, rest = (argv[0].split("=", 1)[1], argv[1:]) if "=" in argv[0] else (([*argv, ""])[1], argv[2:])
        stored, data_hash = _stored(Path(path))
        if method not in (None, stored.method.name):
            raise UserError(
                f"{path} is of the method {stored.method.name}",
                where=f"--method {method}",
                hint=f"start from a preset: dbd train {stored.preset} --method {method}",
            )
        return stored, rest, None, (data_hash, Path(path))
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            return preset("demo").config(method or "dbd"), ["--help"], None, None
        raise UserError(
            "no preset is named",
            where="dbd train",
            expected=f"one of {', '.join(PRESETS)}, or --config RUN/run.json",
        )
    chosen = preset(argv[0])
    return chosen.config(method or "dbd"), argv[1:], chosen, None


def _without_other_methods(argv: list[str], config: TrainConfig) -> list[str]:
    """The flags, without those of stages that the method does not have: version 0.1 took them without effect."""
    own = {stage.name for stage in config.method.stages()}
    kept: list[str] = []
    dropping = False
    for word in argv:
        if word.startswith("--"):
            stage, dot, _ = word[2:].partition(".")
            dropping = bool(dot) and stage in STAGES and stage not in own
            if dropping:
                print(f"note: {word.partition('=')[0]} has no effect on --method {config.method.name}", file=sys.stderr)
        if not dropping:
            kept.append(word)
    return kept


def _value(flag: str, argv: list[str]) -> str | None:
    """What a flag says, before anything is parsed: others depend on it."""
    for word, following in zip(argv, [*argv[1:], None]):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag:
            return following
    return None


def _stored(path: Path) -> tuple[TrainConfig, Any]:
    """The configuration of a stored run, and the hash of its data."""
    try:
        stored = read_json(path)
        return TrainConfig.from_dict(stored["config"], where=f"{path}: config"), stored.get("data_hash")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=f"--config {path}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError("not a run description", where=path, expected="the run.json of a run folder") from error


def _description(name: str) -> str:
    lines = ["Presets:"]
    for other, build in PRESETS.items():
        first = (build.__doc__ or "").partition("\n\n")[0]
        lines.append(f"  {other}: {' '.join(first.split())}")
    methods = [f"  {kind.name}: {' '.join((kind.__doc__ or '').split())}" for kind in METHODS.values()]
    opening = f"Train from the preset {name}. Every flag below changes one of its settings."
    return "\n".join([opening, "", *lines, "", "Methods:", *methods])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
