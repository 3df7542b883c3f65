"""From the flags of `dbd tune` to a plan, a sweep, and what is printed at its end."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.attacks.attack import NoAttack
from data_prep.errors import UserError
from dbd_dist.config import TrainConfig, override
from dbd_dist.craft.adaptive import Adaptive
from dbd_dist.launch.failures import RunFailed
from dbd_dist.launch.start import check_before_data, check_storage, prepare_for
from dbd_dist.methods import METHODS
from dbd_dist.presets import Preset
from dbd_dist.presets import preset as find_preset
from dbd_dist.reporting.wording import duration
from tune_spaces import metrics, page, tables
from tune_spaces.attack_settings import check_attack, of_training
from tune_spaces.book import Row
from tune_spaces.flags import Arguments, seconds
from tune_spaces.plan import Asha, Plan
from tune_spaces.space import Distribution, Space, combinations, grid
from tune_spaces.spaces import assignments, varied
from tune_spaces.spaces import space as find_space
from tune_spaces.sweep import run_sweep
from tune_spaces.trial import run_names

BEST_ARTEFACT = "best-artefact"
MIN_PSNR_DB = 20.0
ROBUST = "robust"
"""In the names of methods that the best attack is tried against."""


def run(arguments: Arguments) -> int:
    """Check, prepare, search, print.

    Raises:
        UserError: a mistake in what was asked for. RunFailed: Ray, or a trial, failed. Stopped: on request.
    """
    began = time.monotonic()
    plan, chosen = _plan(arguments)
    plan = _with_data(plan, chosen, arguments.data)
    book = run_sweep(plan)
    best = book.best()
    retrain = None if best is None else retrain_command(plan, best)
    if plan.attacks and best is not None and "too_visible_by" not in best["metrics"]:
        _keep_artefact(plan, best)
    page.write(plan, book, retrain)
    print(f"\n{tables.summary(plan, book)}")
    if best is not None and best.get("against"):
        lines = [[m, tables.cell(f.get("asr")), tables.cell(f.get("clean_acc"))] for m, f in best["against"].items()]
        print("\n" + tables.as_text(["best attack against", "asr", "clean_acc"], lines))
    if retrain is not None:
        print(f"\nretrain the best: {retrain}")
    if plan.attacks and (plan.folder / BEST_ARTEFACT).exists():
        print(f"apply the best attack: dbd prepare SOURCE adaptive --artefact {plan.folder / BEST_ARTEFACT}")
    print(f"\n{plan.folder / page.PAGE_FILE}\n{plan.folder}\ndone in {duration(time.monotonic() - began)}")
    failed = [row for row in book.rows.values() if row["status"] == "failed"]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {plan.trials} trials failed, the first with: {failed[0]['message']}",
            where=plan.folder,
            hint="the same command tries those again",
        )
    return 0


def _plan(arguments: Arguments) -> tuple[Plan, Preset]:
    """What the flags ask for; data sets still missing."""
    space = find_space(arguments.space)
    vary, fixed = varied(
        space,
        smoke=arguments.smoke,
        vary=assignments(arguments.vary, "--vary"),
        fix=assignments(arguments.fix, "--fix"),
    )
    check_storage(arguments.storage)
    chosen = find_preset("smoke" if arguments.smoke else arguments.preset)
    METHODS.find(arguments.method, where="--method")
    if space.attacks:
        _check_attacker(arguments, vary, fixed)
    objectives = metrics.find(arguments.metric, truth=arguments.truth == "known", attacks=space.attacks)
    base = _base(arguments, chosen, fixed)
    search = arguments.search or ("grid" if arguments.smoke else space.search)
    plan = Plan(
        space=arguments.space,
        vary=vary,
        fixed=fixed,
        base=base,
        datas=dict.fromkeys(arguments.seeds, Path()),
        search=search,
        trials=_count(arguments, space, search, vary),
        metrics=objectives,
        truth=arguments.truth == "known",
        asha=_asha(arguments, space, objectives, base),
        attacks=space.attacks,
        min_psnr=_min_psnr(arguments) if space.attacks else None,
        min_ssim=arguments.min_ssim,
        against=_against(arguments) if space.attacks else (),
        workers=arguments.workers,
        gpus_per_worker=arguments.gpus_per_worker,
        parallel=arguments.parallel,
        time_budget_s=None if arguments.time_budget is None else seconds(arguments.time_budget),
        storage=arguments.storage.expanduser().resolve(),
        name=_name(arguments, base),
        first=_first(vary, base) if search == "tpe" else None,
    )
    for field, given in vary.items():  # a field that does not exist is refused before data is prepared
        if of_training({field: None}):
            _refuse_unknown(base, field, given)
    check_before_data(dataclasses.replace(base, data=arguments.data), plan.name, "ray")
    return plan, chosen


def _base(arguments: Arguments, chosen: Preset, fixed: Mapping[str, Any]) -> TrainConfig:
    base = chosen.config(arguments.method)
    base = dataclasses.replace(
        base, seed=arguments.seeds[0], compute=dataclasses.replace(base.compute, workers=arguments.workers)
    )
    if arguments.truth == "none":
        base = override(base, {"mixmatch.withhold": metrics.WITHHELD})
    return override(base, of_training(fixed))


def _refuse_unknown(base: TrainConfig, field: str, given: Distribution) -> None:
    try:
        override(base, {field: given.bounds()[0]})
    except UserError as error:
        if error.where == field and "no such field" in error.what:
            raise


def _name(arguments: Arguments, base: TrainConfig) -> str:
    if arguments.name is not None:
        return arguments.name
    space = arguments.space if not arguments.space.startswith("file:") else Path(arguments.space[5:]).stem
    return f"tune/{space}-{base.preset}-s{'-'.join(map(str, arguments.seeds))}"


def _count(arguments: Arguments, space: Space, search: str, vary: Mapping[str, Distribution]) -> int:
    if search == "grid":
        points = len(grid(vary))
        return min(arguments.trials or points, points)
    asked, most = arguments.trials or space.trials, combinations(vary)
    return asked if search != "random" or most is None else min(asked, most)


def _asha(arguments: Arguments, space: Space, objectives: tuple[metrics.Metric, ...], base: TrainConfig) -> Asha | None:
    if not arguments.asha:
        return None
    if space.attacks or len(objectives) > 1:
        what = "trials that craft attacks have no epochs" if space.attacks else "several metrics have no order"
        raise UserError(what, where="--asha", expected="one metric of a space that varies the defence")
    if not base.evaluate_every:
        raise UserError("nothing is measured between epochs", where="--asha", hint="--fix evaluate_every=5")
    return Asha(grace=arguments.grace, reduction=arguments.reduction)


def _min_psnr(arguments: Arguments) -> float | None:
    if arguments.min_psnr is None and arguments.min_ssim is None:
        return MIN_PSNR_DB
    return arguments.min_psnr


def _against(arguments: Arguments) -> tuple[str, ...]:
    for name in arguments.against:
        METHODS.find(name, where="--against")
    return arguments.against or ("none", "dbd", *(name for name in METHODS if ROBUST in name))


def _check_attacker(arguments: Arguments, vary: Mapping[str, Distribution], fixed: Mapping[str, Any]) -> None:
    """Flags that a space of attacks has no use for."""
    if arguments.data is not None:
        raise UserError("attacks are crafted for the preset's own images", where="--data", expected="--preset")
    if arguments.truth == "none":
        raise UserError("an attacker knows the poison", where="--truth none", expected="--truth known")
    if arguments.workers > 1:
        raise UserError("trials that craft attacks have one worker", where="--workers", expected="1")
    check_attack(vary, fixed)


def _first(vary: Mapping[str, Distribution], base: TrainConfig) -> dict[str, Any] | None:
    """The values of the preset and of an unchanged attack, where all lie within the bounds: the first trial."""
    found: dict[str, Any] = {}
    for field, given in vary.items():
        if field == "prepare.rate":
            value: Any = 0.05
        elif field.startswith("craft."):
            value = 0.1 if field == "craft.alpha" else getattr(Adaptive, field[6:])
        else:
            value = _value(base, field)
        if not given.holds(value):
            return None
        found[field] = value
    return found


def _value(base: TrainConfig, field: str) -> Any:
    place: Any = base.to_dict(every_field=True)
    for part in field.split("."):
        place = place[int(part)] if isinstance(place, list) else place.get(part)
        if place is None:
            return None
    return place


def _with_data(plan: Plan, chosen: Preset, data: Path | None) -> Plan:
    """The plan with a data set for each seed."""
    if data is not None:
        if len(plan.datas) > 1:
            raise UserError("one data set and several seeds", where="--data", expected="one seed, or the preset's data")
        return dataclasses.replace(plan, datas=dict.fromkeys(plan.datas, data.resolve()))
    if plan.attacks:
        chosen = dataclasses.replace(chosen, prepare=dataclasses.replace(chosen.prepare, attack=NoAttack()))
    found = {seed: prepare_for(chosen, seed, plan.storage, plan.base.method) for seed in plan.datas}
    return dataclasses.replace(plan, datas=found)


def retrain_command(plan: Plan, row: Row) -> str | None:
    """What trains the run of a trial again, of its first seed."""
    names = run_names(plan.name, row["number"], list(plan.seeds))
    folder = plan.storage / names[plan.seeds[0]]
    if plan.attacks:
        folder = folder / plan.base.method.name
    if not (folder / "run.json").exists():
        return None
    name = f"{plan.name.replace('/', '-')}-best"
    words = ["dbd", "train", "--config", str(folder / "run.json"), "--name", name, "--storage", str(plan.storage)]
    return shlex.join(words)


def _keep_artefact(plan: Plan, row: Row) -> None:
    """The best attack's artefact, in the sweep's folder."""
    names = run_names(plan.name, row["number"], list(plan.seeds))
    source, out = plan.storage / names[plan.seeds[0]] / "artefact", plan.folder / BEST_ARTEFACT
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
