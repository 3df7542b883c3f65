"""A trial that varies the attack: craft the trigger, poison the data with it, train under the defence and without."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.artefacts import Artefact
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import Dataset, open_dataset
from data_prep.io.json import read_json
from data_prep.pipeline import prepare
from dbd_dist.config import TrainConfig
from dbd_dist.craft import job as crafting
from dbd_dist.craft.adaptive import AdaptiveAttack
from dbd_dist.craft.craft import TrainingSet
from dbd_dist.launch.local import craft_local, run_local
from dbd_dist.models.exported import read_exported
from dbd_dist.presets import preset
from tune_spaces.attack_settings import craft_of, of_training, rate_of
from tune_spaces.metrics import mean
from tune_spaces.trial import left_by, run_names, run_one

ARTEFACT, DATA = "artefact", "data"
"""In a trial's folder (of each seed): what was crafted, and the data set that was poisoned with it."""


def craft_and_train(number: int, values: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """An attack for each seed, and the runs under it."""
    began, results, folders = time.monotonic(), [], []
    values = {**job["attack"], **values}
    for seed, name in run_names(job["name"], number, [int(seed) for seed in job["datas"]]).items():
        found, ran = _one(values, seed, name, job)
        results.append(found)
        folders += ran
    means, spread = mean(results)
    return {
        "status": "finished",
        "metrics": means,
        "spread": spread,
        "by_seed": dict(zip(job["datas"], results, strict=True)),
        "seconds": round(time.monotonic() - began, 2),
    } | left_by(folders)


def _one(values: Mapping[str, Any], seed: int, name: str, job: Mapping[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    """The metrics of one seed, and the run folders."""
    storage = Path(job["storage"])
    fixed = of_training(values)
    artefact = craft(values, seed, name, job)
    dataset = poison(values, seed, storage / name, job)
    stealth = dataset.manifest.stealth or {}
    found = {"psnr_db": stealth.get("psnr_db"), "ssim": stealth.get("ssim")}
    after = artefact.evidence["after"]
    found["clustering"] = after["distance_to_own_centre"] / max(after["distance_to_benign_centres"], 1e-12)
    short = max(
        ((job[f"min_{which}"] or 0) - (found[key] or 0)) / (job[f"min_{which}"] or 1)
        for which, key in (("psnr", "psnr_db"), ("ssim", "ssim"))
    )
    if short > 0:
        return {**found, "too_visible_by": short}, []
    for method, prefix in ((job["method"], ""), ("none", "_none")):
        config = _config(method, fixed if method == job["method"] else {}, dataset.folder, seed, job)
        result = run_one(config, f"{name}/{method}", job, reports=False)
        found |= {f"{key}{prefix}": result[key] for key in ("asr", "clean_acc") if key in result}
        if not prefix:
            found |= {key: result[key] for key in ("kept_poisoned", "poisoned") if key in result}
            found |= on_the_way(read_json(storage / name / method / "result.json"))
    return found, [storage / name / method for method in (job["method"], "none")]


def on_the_way(result: Mapping[str, Any]) -> dict[str, float]:
    """How far the attack came under a defence with a warm-up and a split, from result.json."""
    found = {
        "asr_warmup": (result.get("after_warmup") or {}).get("asr"),
        "first_auroc": ((result.get("split_quality") or {}).get("first") or {}).get("auroc"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _config(method: str, values: Mapping[str, Any], data: Path, seed: int, job: Mapping[str, Any]) -> TrainConfig:
    from dbd_dist.config import override

    base = TrainConfig.from_dict(job["base"])
    if base.method.name != method:
        base = dataclasses.replace(preset(base.preset).config(method), compute=base.compute)
    return override(base, {**values, "seed": seed, "data": str(data)})


def craft(values: Mapping[str, Any], seed: int, name: str, job: Mapping[str, Any]) -> Artefact:
    """The trigger: its backbone is pretrained on the clean images by the attacker, once for all trials."""
    storage = Path(job["storage"])
    clean = open_dataset(Path(job["datas"][str(seed)]))
    trained = dataclasses.replace(
        _config(job["method"], of_training(values), clean.folder, seed, job), stop_after="simclr"
    )
    run_local(trained, storage=storage, name=f"{name}/backbone", quiet=True, heeds_file=True)
    made = craft_of(values, target=_prepare(values, seed, job).poison_target, seed=seed)
    data, weights = TrainingSet.read(clean), storage / name / "backbone" / "backbone.safetensors"
    crafting.check_data(made, data)
    settings = crafting.settings(made, clean, read_exported(weights))
    out = storage / name / ARTEFACT
    there = crafting.finished(out, made, settings, data, overwrite=False)
    if there is not None:
        return there
    task = crafting.Job(
        craft=made, data=clean.folder.resolve(), weights=weights, work=crafting.work_folder(out, settings, made)
    )
    task.work.mkdir(parents=True, exist_ok=True)
    craft_local(task, trained.compute.device, quiet=True)
    return crafting.finish(task, out, settings, data)


def _prepare(
    values: Mapping[str, Any], seed: int, job: Mapping[str, Any], artefact: Path | None = None
) -> PrepareConfig:
    own = preset(job["preset"]).prepare
    attack = own.attack if artefact is None else AdaptiveAttack(artefact=artefact)
    return dataclasses.replace(own, attack=attack, rate=rate_of(values), seed=seed)


def poison(values: Mapping[str, Any], seed: int, folder: Path, job: Mapping[str, Any]) -> Dataset:
    """The data set with the trigger of `folder` in it."""
    config = _prepare(values, seed, job, folder / ARTEFACT)
    return prepare(dataclasses.replace(config, out=folder / DATA, workers=1), progress=False)


def against(method: str, values: Mapping[str, Any], number: int, job: Mapping[str, Any]) -> dict[str, Any]:
    """What a method makes of a trial's attack, mean over seeds."""
    results = []
    for seed, name in run_names(job["name"], number, [int(seed) for seed in job["datas"]]).items():
        own = of_training(values) if method == job["method"] else {}
        config = _config(method, own, Path(job["storage"]) / name / DATA, seed, job)
        results.append(run_one(config, f"{name}/{method}", job, reports=False))
    means, spread = mean(results)
    return {"method": method, "metrics": means, "spread": spread}
