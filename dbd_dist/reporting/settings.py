"""In which settings runs of one name differ, so that they are told apart rather than averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dbd_dist.reporting.wording import printable

_STAGES = {"none": ("model", "supervised"), "dbd": ("model", "simclr", "warmup", "split", "mixmatch")}
_NOT_METHOD = ("preset", "method", "data", "seed", "evaluate_every", "stop_after", "name")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values as text: {"a": {"b": 1}} gives ("a.b", "1")."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def of_method(config: Mapping[str, Any], attack: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a run's result depends on besides data and seed: the settings of the stages that its method runs.

    Args:
        config: `config` of run.json.
        attack: that of the data set's manifest, where it was found: its name does not tell all of its settings.
    """
    method = str(config.get("method"))
    chosen: dict[str, Any] = {
        name: value
        for name, value in config.items()
        if (name in _STAGES[method] if method in _STAGES else name not in _NOT_METHOD) and name != "compute"
    }
    compute = config.get("compute")
    if isinstance(compute, Mapping) and "sync_bn" in compute:
        chosen["compute"] = {"sync_bn": compute["sync_bn"]}
    if attack:
        # an artefact is crafted anew for every seed, as samples are chosen anew
        chosen["attack"] = {k: v for k, v in attack.items() if k not in ("artefact", "artefact_sha256")}
    return dict(flat(chosen))


def differing(keys: Sequence[Any], settings: Sequence[Mapping[str, str]]) -> list[str]:
    """For every run the settings in which the runs of its key differ, as "split.keep=0.4, ..."; empty where they agree.

    Args:
        keys: runs of equal keys would share a row.
        settings: of every run, from `of_method`.
    """
    together: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        together.setdefault(key, []).append(i)
    labels = [""] * len(keys)
    for at in together.values():
        names = sorted({name for i in at for name in settings[i]})
        vary = [name for name in names if len({settings[i].get(name) for i in at}) > 1]
        for i in at:
            # no limit on the whole: two rows must not come to look alike
            labels[i] = ", ".join(f"{name}={printable(settings[i].get(name, 'default'), 40)}" for name in vary)
    return labels
