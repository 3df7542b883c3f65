"""`dbd cluster render TARGET`: the file that starts this project on a kind of cluster, from one set of settings.

What only its user knows stays in it as a <PLACE>, which `dbd cluster validate --ready` finds. The files in
`cluster/manifests` are what the defaults give.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cluster.gauges import GAUGES
from data_prep.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
TARGETS = {
    "aws": "aws.yaml",
    "gcp": "gcp.yaml",
    "onprem": "onprem.yaml",
    "kuberay-rayjob": "kuberay-rayjob.yaml",
    "kuberay-raycluster": "kuberay-raycluster.yaml",
    "slurm": "slurm.sh",
    "skypilot": "skypilot.yaml",
    "anyscale": "anyscale.yaml",
    "grafana": "grafana.json",
}
"""Target -> name of its file."""
MACHINES = {  # head, worker with a GPU, worker without
    "aws": ("m6i.2xlarge", "g6.2xlarge", "m6i.2xlarge"),
    "gcp": ("n2-standard-8", "g2-standard-8", "n2-standard-8"),
    "anyscale": ("m6i.2xlarge", "g6.2xlarge", "m6i.2xlarge"),
}
PLAIN = re.compile(r"[A-Za-z0-9_./~-]*[A-Za-z_~/][A-Za-z0-9_./~-]*|<[A-Z][A-Z0-9_]*>[A-Za-z0-9_./:-]*")
"""Strings that YAML takes as strings without quotes, and places to fill in with what follows them."""
NOT_STRINGS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n", "~")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster for one run at a time."""

    workers: int = 2
    """Nodes that train, besides the head."""
    gpus: int = 1
    """GPUs of each of them; 0 for training on CPUs."""
    cpus: int = 8
    """CPUs of each of them."""
    memory_gib: int = 32
    """Memory of each of them."""
    name: str = "dbd"
    """Of the cluster or job."""
    command: str = ""
    """What to run, where the target runs something: "train cifar10_badnets --data ...". Default: train demo."""
    storage: str = "/mnt/dbd"
    """Folder that all nodes mount."""
    image: str = "<IMAGE_REPOSITORY>/dbd-dist:0.2.0"
    """Container image (kuberay, anyscale)."""
    pull_secret: str = ""
    """Secret to pull it with (kuberay)."""
    claim: str = "<RUNS_CLAIM>"
    """Persistent volume claim for runs, ReadWriteMany (kuberay)."""
    namespace: str = ""
    """Of Kubernetes (kuberay)."""
    node_selector: tuple[str, ...] = ()
    """LABEL=VALUE of the nodes that train (kuberay)."""
    region: str = "<REGION>"
    """Of the cloud (aws, gcp)."""
    head_type: str = ""
    """Machine type of the head (aws, gcp, anyscale)."""
    worker_type: str = ""
    """Machine type of the nodes that train (aws, gcp, anyscale)."""
    accelerator: str = "L4"
    """Kind of GPU (skypilot)."""
    spot: bool = False
    """Machines that may be taken away; runs resume (aws, gcp, skypilot, anyscale)."""
    hours: int = 4
    """Time limit (slurm)."""

    def __post_init__(self) -> None:
        for name, fewest, most in (("workers", 1, 1000), ("gpus", 0, 64), ("cpus", 1, 1024), ("memory_gib", 1, 65536),
                                   ("hours", 1, 999)):  # fmt: skip
            value = getattr(self, name)
            if not fewest <= value <= most:
                raise _wrong(name, value, f"{fewest} to {most}")
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", self.name):
            raise _wrong("name", self.name, "up to 47 small letters, digits and hyphens, first a letter")
        if not re.fullmatch(r"/[\w./-]+", self.storage):
            raise _wrong("storage", self.storage, "an absolute path of letters, digits, . - _ /")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and (not value.isprintable() or len(value) > 2000):
                raise _wrong(field.name, value, "one line that can be printed")
        if not re.fullmatch(r"[\w.+-]+", self.accelerator):
            raise _wrong("accelerator", self.accelerator, "a name such as L4 or H100")
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise _wrong("command", self.command, f"words of a shell ({error})") from error
        if "--storage" in words:
            raise UserError("it is added from --storage here", where="--command", expected="a command without it")
        if words[:1] == ["dbd"]:
            raise _wrong("command", self.command, "what follows dbd, such as train PRESET")
        for pair in self.node_selector:
            if not re.fullmatch(r"[\w./-]+=[\w.-]*", pair):
                raise _wrong("node_selector", pair, "LABEL=VALUE")


def _wrong(field: str, value: object, expected: str) -> UserError:
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
    return UserError(f"{shown} is not allowed", where=f"--{field.replace('_', '-')}", expected=expected)


def render(target: str, cluster: Cluster | None = None) -> str:
    """The text of a target's file.

    Raises:
        UserError: there is no such target.
    """
    if target not in TARGETS:
        raise unknown(target)
    cluster = cluster or Cluster()
    if target == "grafana":
        return grafana()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # YAML and shell, by the filters below
    )
    environment.filters["yaml"] = _yaml
    environment.filters["shell"] = _shell
    values: dict[str, Any] = dataclasses.asdict(cluster)
    head, with_gpu, without = MACHINES.get(target, ("", "", ""))
    values["head_type"] = cluster.head_type or head
    values["worker_type"] = cluster.worker_type or (with_gpu if cluster.gpus else without)
    values["node_selector"] = dict(pair.split("=", 1) for pair in cluster.node_selector)
    values["ray_version"] = importlib.metadata.version("ray")
    return environment.get_template(f"{TARGETS[target]}.j2").render(values)


def unknown(target: str) -> UserError:
    import difflib

    near = difflib.get_close_matches(target, TARGETS, n=1, cutoff=0.4)
    return UserError(
        f"there is no target {target!r}",
        where="dbd cluster render",
        expected=", ".join(TARGETS),
        hint=f"did you mean {near[0]!r}" if near else None,
    )


def _yaml(value: Any) -> str:
    """A value as YAML in one line: JSON is YAML, and plain words need no quotes."""
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in NOT_STRINGS:
        return value
    return json.dumps(value)


def _shell(command: str) -> str:
    """A command line, each of its words quoted where a shell would read more into it; "" stays empty."""
    return shlex.join(shlex.split(command))


def grafana() -> str:
    """A dashboard of Grafana's with a panel for each gauge; it asks for the Prometheus data source that scrapes Ray."""
    panels = [
        {
            "id": number + 1,
            "type": "timeseries",
            "title": text,
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": _unit(field)}, "overrides": []},
            "targets": [
                {
                    "expr": f'max by (run, stage) (ray_dbd_{field}{{run=~"$run"}})',
                    "legendFormat": "{{run}} {{stage}}",
                    "refId": "A",
                }
            ],
        }
        for number, (field, text) in enumerate(GAUGES.items())
    ]
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": "label_values(ray_dbd_epoch, run)",
            "refresh": 2,
            "multi": True,
            "includeAll": True,
        },
    ]
    board = {
        "uid": "dbd-dist",
        "title": "DBD-Dist runs",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }
    return json.dumps(board, indent=2) + "\n"


def _unit(field: str) -> str:
    if field in ("clean_acc", "asr"):
        return "percentunit"
    return "s" if field.endswith("_s") and not field.endswith("per_s") else "short"


# -- the command


@dataclass(frozen=True, kw_only=True)
class Arguments:
    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Cluster)
    out: Path | None = None
    """File to write; must not be there yet. Default: the screen."""


def main(argv: Sequence[str]) -> int:
    """Print or write the file of the target that comes first.

    Raises:
        UserError: an unknown target, a value that is not allowed, a file that is there already.
    """
    target, rest = (argv[0], list(argv[1:])) if argv and not argv[0].startswith("-") else ("", list(argv))
    if not target and "-h" not in rest and "--help" not in rest:
        raise UserError("no target is named", where="dbd cluster render", expected=", ".join(TARGETS))
    if target and target not in TARGETS:
        raise unknown(target)
    arguments = tyro.cli(
        Arguments,
        args=rest,
        prog=f"dbd cluster render {target or 'TARGET'}",
        description=f"The file for a kind of cluster: {', '.join(TARGETS)}.",
        config=(tyro.conf.FlagConversionOff,),
    )
    text = render(target, arguments.cluster)
    if arguments.out is None:
        print(text, end="")
        return 0
    try:
        with open(arguments.out.expanduser(), "x") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError("is there already", where=f"--out {arguments.out}", hint="name another file") from error
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=f"--out {arguments.out}") from error
    print(arguments.out, file=sys.stderr)
    return 0
