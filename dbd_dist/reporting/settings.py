"""In which settings runs of one name differ, so that they get rows of their own rather than an average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.dataset.manifest import read_manifest
from data_prep.errors import UserError
from dbd_dist.reporting import names, tables
from dbd_dist.reporting.runs import Run
from dbd_dist.reporting.wording import printable

_NOT_METHOD = ("preset", "method", "data", "seed", "evaluate_every", "stop_after", "name", "compute")
_DEEPEST = 20


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and values as text: {"a": {"b": 1}} gives {"a.b": "1"}."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and prefix.count(".") < _DEEPEST:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value)
    return found


def of_method(run: Run, attack: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a run's result depends on besides data and seed: the settings of its method's stages.

    Args:
        run: one that may share a row with others.
        attack: that of the data set's manifest, where it was found: its name does not hold all of its settings.
    """
    chosen: dict[str, Any] = {
        name: value
        for name, value in run.config.items()
        if name not in _NOT_METHOD and names.is_setting(name, run.method, run.description)
    }
    compute = run.config.get("compute")
    if isinstance(compute, Mapping) and "sync_bn" in compute:
        chosen["compute"] = {"sync_bn": compute["sync_bn"]}
    if attack:
        # an artefact is crafted anew for every seed, as samples are chosen anew
        chosen["attack"] = {k: v for k, v in attack.items() if k not in ("artefact", "artefact_sha256")}
    return flat(chosen)


def differing(keys: Sequence[Any], chosen: Sequence[Mapping[str, str]]) -> list[str]:
    """For every run the settings in which the runs of its key differ, as "split.keep=0.4, ..."; empty where they agree.

    Args:
        keys: runs of equal keys would share a row.
        chosen: of every run, from `of_method`.
    """
    together: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        together.setdefault(key, []).append(i)
    labels = [""] * len(keys)
    for at in together.values():
        fields = sorted({name for i in at for name in chosen[i]})
        vary = [name for name in fields if len({chosen[i].get(name) for i in at}) > 1]
        for i in at:
            # no limit on the whole: two rows must not come to look alike
            labels[i] = ", ".join(f"{name}={printable(chosen[i].get(name, 'default'), 40)}" for name in vary)
    return labels


def results_of(runs: Sequence[Run]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Results of finished runs, and what sets each apart from others of its name, for `tables.aggregate`."""
    finished = [run for run in runs if run.result is not None]
    results: list[Mapping[str, Any]] = [run.result for run in finished if run.result is not None]
    keys = [(tables.family(r), r.get("attack"), r.get("preset"), r.get("train_size"), r["method"]) for r in results]
    return results, differing(keys, [of_method(run, _attack(run)) for run in finished])


def _attack(run: Run) -> Mapping[str, Any] | None:
    if not run.config.get("data"):
        return None
    try:
        manifest = read_manifest(str(run.config["data"]))
    except UserError:  # the table can be made without the data set
        return None
    return manifest.attack if manifest.data_hash == run.data_hash else None
