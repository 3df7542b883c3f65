"""From a table to commands: the data sets, artefacts and runs that it needs, in an order that trains shared stages
once. Everything that is made is made by a `dbd` command that can be repeated by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from data_prep import cli as preparing
from data_prep.attacks import ATTACKS, Crafted, PerturbedImages
from data_prep.dataset.manifest import read_manifest
from data_prep.errors import UserError
from data_prep.io.json import read_json
from data_prep.sources import Source
from dbd_dist.commands import craft as crafting
from dbd_dist.commands import train
from dbd_dist.config import TrainConfig
from dbd_dist.craft import CRAFTS
from dbd_dist.fields import digest
from dbd_dist.launch.local import check_name
from dbd_dist.presets import preset
from dbd_dist.reproduce.cases import Case
from dbd_dist.reproduce.table import Table, Variant, variant_key
from dbd_dist.runtime.checkpoint import StageStore
from dbd_dist.runtime.computing import uses_bf16
from dbd_dist.runtime.keys import keys_on, method_hash

FOLDER = "reproduce"
"""Below the storage."""
THREADS = "--compute.threads"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where things are made, and how."""

    storage: Path
    launcher: Literal["local", "ray"] = "local"
    threads: int | None = None
    """Of each local run."""
    cpus_per_worker: int | None = None
    """Of each run on Ray."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One `dbd` command."""

    name: str
    argv: tuple[str, ...]
    done: bool
    """What it makes is there."""
    needs: tuple[str, ...] = ()
    """Tasks that have to succeed before."""
    after: tuple[str, ...] = ()
    """Tasks to wait for, however they end: they train a stage that this one shares."""
    log: Path


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the table."""

    case: Case
    variant: Variant
    seed: int
    config: TrainConfig
    task: Task
    folder: Path
    """Of the run."""
    train: tuple[str, ...]
    """Stages that this run trains: neither found in the store nor trained by an earlier run of the table."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a table takes."""

    table: Table
    place: Place
    making: tuple[Task, ...]
    """Data sets and artefacts, each after what it needs."""
    cells: tuple[Cell, ...]
    data: str
    """Names the images in the folders of runs, without their attack."""

    @property
    def tasks(self) -> list[Task]:
        """What is missing, each after what it needs; data sets that no missing run needs are left out."""
        wanted = {name for cell in self.cells if not cell.task.done for name in cell.task.needs}
        making: list[Task] = []
        for task in reversed(self.making):
            if task.name in wanted and not task.done:
                making.insert(0, task)
                wanted |= set(task.needs)
        return [*making, *(cell.task for cell in self.cells if not cell.task.done)]


def plan(table: Table, place: Place) -> Plan:
    """What there is and what is missing.

    Raises:
        UserError: a method that the preset has no settings for, flags that do not parse, a method that needs clean
            images where none are set aside, an artefact that cannot be made, or a finished run with other settings.
    """
    source = table.source or source_words(preset(table.preset).prepare.source)
    configs = {variant.name: _config(table, variant) for variant in table.variants}
    data = _DataSets(table, place, source)
    for case in table.cases:
        data.check(case)
    making: dict[str, Task] = {}
    cells: list[Cell] = []
    trained: dict[str, str] = {}
    for seed in table.seeds:
        for case in table.cases:
            tasks = data.tasks(case, seed)
            making |= {task.name: task for task in tasks}
            for variant in table.variants:
                config = dataclasses.replace(configs[variant.name], seed=seed)
                cells.append(_cell(table, place, data, case, variant, config, tasks[-1].name, trained))
    return Plan(table=table, place=place, making=tuple(making.values()), cells=_leaders_first(cells), data=data.tag)


def _config(table: Table, variant: Variant) -> TrainConfig:
    """A variant's configuration, its flags parsed as `dbd train` does."""
    argv = [table.preset, "--method", variant.method, *table.flags, *variant.flags]
    arguments, _ = train.parse(argv)
    if arguments.config.method.name != variant.method or arguments.name is not None:
        raise UserError("flags of a table name neither method nor run", where=f"{table.name}: {variant.name}")
    if arguments.config.method.needs_clean and table.holdout_clean is None:
        raise UserError(
            f"{arguments.config.method.title} needs clean images, and the table sets none aside",
            where=table.name,
            expected="holdout_clean above 0, such as 0.05",
        )
    for stage in arguments.config.method.stages():
        stage.check_network(arguments.config.model)
    return arguments.config


class _DataSets:
    """The data sets of a table: their folders and commands."""

    def __init__(self, table: Table, place: Place, source: Sequence[str]):
        self._table, self._place, self._source = table, place, tuple(source)
        self._holdout = () if table.holdout_clean is None else ("--holdout-clean", f"{table.holdout_clean:g}")
        parsed = _parsed([*source, "clean", *self._holdout])
        self.tag = parsed.source.slug + ("" if table.holdout_clean is None else f"-h{table.holdout_clean:g}")
        if table.source:  # a path may be in it
            self.tag += f"-{digest(self._source)[:6]}"

    def folder(self, case: Case, seed: int) -> Path:
        name = case.key if case.attack == "clean" else f"{case.key}-s{seed}"
        return self._place.storage / "datasets" / f"{self.tag}-{name}"

    def artefact(self, case: Case, seed: int) -> Path:
        return self._place.storage / FOLDER / self._table.preset / "artefacts" / f"{self.tag}-{case.key}-s{seed}"

    def check(self, case: Case) -> None:
        """Refuse what would fail later: flags, and an artefact that is given and missing, or cannot be made."""
        kind = ATTACKS.find(case.attack, where=self._table.name)
        given = flag("--artefact", case.flags)
        if issubclass(kind, Crafted) and given is None and case.attack not in CRAFTS:
            raise UserError(
                f"{case.attack} needs an artefact, and no `dbd craft {case.attack}` makes one",
                where=f"{self._table.name}: {case.name}",
                expected='its folder, as flags = ["--artefact", "FOLDER"]',
            )
        if given is not None and not Path(given).is_dir():
            clean = self.folder(_CLEAN, 0)
            words = (case.attack, *case.craft, "--data", str(clean), "--out", given, "--preset", self._table.preset)
            raise UserError(
                "there is no such artefact",
                where=f"{self._table.name}: {case.name}: --artefact {given}",
                hint=f"make it with `dbd craft {' '.join(words)}`, or leave --artefact out to have it made",
            )
        placeholder = ("--artefact", ".") if issubclass(kind, Crafted) and given is None else ()
        if placeholder:
            crafting.parse(list(self._craft(case, self._table.seeds[0]).argv[1:]))
        parsed = _parsed([*self._source, case.attack, *case.flags, *placeholder, *self._holdout])
        if isinstance(parsed.attack, Crafted) and not placeholder:
            self._check_artefact(case, parsed.attack)
        px = getattr(parsed.source, "image_px", None)  # unknown where the images decide
        if px is not None and parsed.has_attack and not placeholder:
            _fits(parsed, px, f"{self._table.name}: {case.name}")

    def _check_artefact(self, case: Case, attack: Crafted) -> None:
        """Refuse one that cannot be read, or was made for the images that another seed chooses."""
        made_with = attack.read().settings.get("seed")
        others = [seed for seed in self._table.seeds if seed != made_with]
        if isinstance(attack, PerturbedImages) and made_with is not None and others:
            raise UserError(
                f"this artefact is of the images that seed {made_with} chooses, and seed {others[0]} chooses others",
                where=f"{self._table.name}: {case.name}: --artefact {attack.artefact}",
                expected=f"the table's seeds to be [{made_with}]",
                hint="leave --artefact out to have one made for each seed",
            )

    def tasks(self, case: Case, seed: int) -> list[Task]:
        """The commands that lead to a data set, which the last of them makes."""
        folder = self.folder(case, seed)
        argv = ["prepare", *self._source, case.attack, *case.flags]
        before: list[Task] = []
        if case.attack in CRAFTS and flag("--artefact", case.flags) is None:
            before = [*self.tasks(_CLEAN, seed), self._craft(case, seed)]
            argv += ["--artefact", str(self.artefact(case, seed))]
        argv += [*self._holdout, *([] if case.attack == "clean" else ["--seed", str(seed)]), "--out", str(folder)]
        return [*before, self._task(folder, argv, (folder / "manifest.json").exists(), before[-1:])]

    def _craft(self, case: Case, seed: int) -> Task:
        out, place, preset_name = self.artefact(case, seed), self._place, self._table.preset
        clean = self.folder(_CLEAN, seed)
        argv = ["craft", case.attack, *case.craft, "--data", str(clean), "--out", str(out), "--preset", preset_name]
        argv += ["--seed", str(seed), "--storage", str(place.storage), "--launcher", place.launcher]
        argv += ["--name", f"{FOLDER}/{preset_name}/craft/{out.name}"]
        done = (out / "artefact.json").exists()
        task = self._task(out, argv, done, [])
        return dataclasses.replace(task, needs=(str(clean),))

    def _task(self, makes: Path, argv: Sequence[str], done: bool, needs: Sequence[Task]) -> Task:
        logs = self._place.storage / FOLDER / self._table.preset / "logs"
        return Task(
            name=str(makes),
            argv=tuple(argv),
            done=done,
            needs=tuple(task.name for task in needs),
            log=logs / f"{argv[0]}-{makes.name}.log",
        )


_CLEAN = Case(name="clean", title="none", attack="clean")


def flag(name: str, words: Sequence[str]) -> str | None:
    """What a flag says."""
    for word, following in zip(words, [*words[1:], None]):
        if word == name or word.startswith(f"{name}="):
            return following if word == name else word.partition("=")[2]
    return None


def _fits(config: preparing.PrepareConfig, px: int, where: str) -> None:
    """Refuse a trigger that images of that side have no room for."""
    attack = config.poison
    try:
        for trigger in (attack.train_trigger, attack.cover_trigger, attack.test_trigger):
            trigger(px)
    except UserError as error:
        typed = preparing.as_typed(error)
        raise UserError(
            typed.what, where=f"{where}: {typed.where}", expected=typed.expected, hint=typed.hint
        ) from error


def _parsed(argv: list[str]) -> preparing.PrepareConfig:
    try:
        return preparing.parse(argv)
    except UserError as error:
        raise preparing.as_typed(error) from error


def source_words(source: Source) -> tuple[str, ...]:
    """A source as arguments of `dbd prepare`: its name, and the flags of fields that are not at their defaults."""
    words = [source.name]
    for field in fields(source):
        value = getattr(source, field.name)
        if field.default is MISSING or value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return tuple(words)


def _cell(
    table: Table,
    place: Place,
    data: _DataSets,
    case: Case,
    variant: Variant,
    config: TrainConfig,
    needs: str,
    trained: dict[str, str],
) -> Cell:
    """One run; `trained` says which run trains a stage, and gets what this one adds."""
    folder = data.folder(case, config.seed)
    key = variant_key(variant, table.flags)
    name = f"{FOLDER}/{table.preset}/{data.tag}-{case.key}/{key}/s{config.seed}"
    check_name(name)
    run = place.storage / name
    argv = ["train", table.preset, "--method", variant.method, "--seed", str(config.seed), "--data", str(folder)]
    argv += ["--storage", str(place.storage), "--name", name, "--launcher", place.launcher]
    if place.launcher == "local" and place.threads is not None:
        argv += [THREADS, str(place.threads)]
    if place.launcher == "ray" and place.cpus_per_worker is not None:
        argv += ["--cpus-per-worker", str(place.cpus_per_worker)]
    argv += [*table.flags, *variant.flags]
    manifest = read_manifest(folder) if (folder / "manifest.json").exists() else None
    done = _finished(run, config, None if manifest is None else manifest.data_hash)
    device = "cuda" if config.compute.device != "cpu" and torch.cuda.is_available() else "cpu"
    keys = keys_on(
        config,
        needs if manifest is None else manifest.data_hash,
        0 if manifest is None else manifest.num_classes,
        bf16=uses_bf16(config.compute, torch.device(device)),
        workers=config.compute.workers or 1 if place.launcher == "ray" else 1,
    )
    store = StageStore((place.storage / "stages").resolve())
    found = {stage for stage, of in keys.items() if manifest is not None and store.has(stage, of)}
    shared = list(keys)[:-1]  # the last stage is never stored
    after = {} if done else {trained[keys[s]]: None for s in shared if s not in found and keys[s] in trained}
    own = [s for s in keys if not done and s not in found and (s not in shared or keys[s] not in trained)]
    if not done:
        trained |= {keys[s]: str(run) for s in own if s in shared}
    task = Task(
        name=str(run),
        argv=tuple(argv),
        done=done,
        needs=(needs,),
        after=tuple(after),
        log=place.storage / FOLDER / table.preset / "logs" / f"{name.removeprefix(FOLDER + '/').replace('/', '_')}.log",
    )
    return Cell(
        case=case, variant=variant, seed=config.seed, config=config, task=task, folder=run, train=tuple(own)
    )  # fmt: skip


def _finished(run: Path, config: TrainConfig, data_hash: str | None) -> bool:
    """Whether the run has a result.

    Args:
        data_hash: of the data set that the table has for it; None where it is not made, and the run's stays unknown.

    Raises:
        UserError: it is that of other settings, or of other images.
    """
    if not (run / "result.json").exists():
        return False
    try:
        stored = read_json(run / "run.json")
        trained, images = stored["config"], stored["data_hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("not a run description", where=run / "run.json", hint="delete the folder") from error
    other = None
    if method_hash(TrainConfig.from_dict(trained, where=f"{run / 'run.json'}: config")) != method_hash(config):
        other = "with other settings than the table's"
    elif data_hash is not None and images != data_hash:
        other = "on other images than the table's data set has now"
    if other is not None:
        raise UserError(
            f"this run is finished, {other}",
            where=run,
            hint="choose another --storage, or delete the folder to train it again",
        )
    return True


def _leaders_first(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells, those that wait for a stage of another after those that wait for nothing: with several runs at a
    time none then has to wait while there is other work. Seed by seed, so that a part of the grid is a whole table."""
    return tuple(sorted(cells, key=lambda cell: (cell.seed, len(cell.task.after))))
