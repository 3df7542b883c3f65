"""Check a cluster manifest before it costs machine time: `dbd cluster validate FILE...`.

Launcher files (`ray up`) go through Ray's own validation, which does not read `provider`, `node_config` and the
commands: those are checked here. RayJobs and RayClusters are checked against KubeRay's schema where it is given
(`--crd`, `--server`); what no schema can say, and which fields there are at all, is checked always. Unfilled <PLACE>s
are listed; `--ready` refuses them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import logging
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from cluster import crd
from data_prep.errors import UserError

MANIFESTS = Path(__file__).parent / "manifests"
PLACE = re.compile(r"<[A-Z][A-Z0-9_]*>")

# -- schemas; a "description" is what the message says is expected

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
MAPPING: Schema = {"type": "object"}
DISK_GIB: Schema = {"type": "integer", "minimum": 30, "description": "30 GiB or more: the installed project takes 6 GB"}


def _text(pattern: str, description: str) -> Schema:
    return {"type": "string", "pattern": f"^({PLACE.pattern}|{pattern})$", "description": description}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _fields(required: Schema, optional: Schema | None = None, *, others: str | None = None) -> Schema:
    """A mapping with these fields; with any others too, unless `others` names all that there are."""
    known = {name: {} for name in (others or "").split()} | (optional or {}) | required
    schema: Schema = {"type": "object", "required": list(required), "properties": known}
    if others is not None:
        schema |= {"additionalProperties": False, "description": f"no fields but {', '.join(sorted(known))}"}
    return schema


def _nodes(node_config: Schema) -> Schema:
    return {"type": "object", "minProperties": 1, "additionalProperties": _fields({"node_config": node_config})}


MACHINES = _list(TEXT, uniqueItems=True, description="[ADDRESS, ...], each machine once")
OWN = _fields({"type": TEXT}, {"worker_ips": MACHINES}, others="head_ip coordinator_address")
AWS = _fields({"region": _text(r"[a-z]{2}(-[a-z]+)+-\d", "a region such as us-west-2")})
AWS_DISKS = _list(_fields({}, {"Ebs": _fields({}, {"VolumeSize": DISK_GIB})}))
AWS_TYPE = _text(r".+\..+", "an instance type such as g6.2xlarge")
AWS_NODE = _fields({"InstanceType": AWS_TYPE}, {"BlockDeviceMappings": AWS_DISKS})
GCP = _fields({"region": TEXT, "availability_zone": TEXT, "project_id": TEXT})
GCP_DISK = _fields({"initializeParams": _fields({"sourceImage": TEXT}, {"diskSizeGb": DISK_GIB})})
GCP_BOOT = _fields({"boot": {"const": True}})
GCP_DISKS = _list(GCP_DISK, contains=GCP_BOOT, description="a disk with boot: true")
GCP_NODE = _fields({"machineType": TEXT, "disks": GCP_DISKS})
LAUNCHERS = {
    "local": _fields({"provider": OWN, "auth": _fields({"ssh_user": TEXT})}),
    "aws": _fields({"provider": AWS, "available_node_types": _nodes(AWS_NODE)}),
    "gcp": _fields({"provider": GCP, "available_node_types": _nodes(GCP_NODE)}),
}

# Pods: which fields there are (Kubernetes' API, v1), so that a typo is found; what is in them a schema knows better.
MOUNT = _fields(
    {"name": TEXT, "mountPath": TEXT}, others="mountPropagation readOnly recursiveReadOnly subPath subPathExpr"
)
AMOUNTS = _fields({}, {"limits": MAPPING, "requests": MAPPING}, others="claims")
CONTAINER = _fields(
    {"name": TEXT, "image": TEXT, "resources": AMOUNTS},
    {"volumeMounts": _list(MOUNT)},
    others="args command env envFrom imagePullPolicy lifecycle livenessProbe ports readinessProbe resizePolicy "
    "restartPolicy securityContext startupProbe stdin stdinOnce terminationMessagePath terminationMessagePolicy tty "
    "volumeDevices workingDir",
)
CLAIM = _fields({"claimName": TEXT}, others="readOnly")
VOLUME = _fields(
    {"name": TEXT},
    {"persistentVolumeClaim": CLAIM, "emptyDir": _fields({}, others="medium sizeLimit")},
    others="awsElasticBlockStore azureDisk azureFile cephfs cinder configMap csi downwardAPI ephemeral fc flexVolume "
    "flocker gcePersistentDisk gitRepo glusterfs hostPath image iscsi nfs photonPersistentDisk portworxVolume "
    "projected quobyte rbd scaleIO secret storageos vsphereVolume",
)
POD = _fields(
    {"containers": _list(CONTAINER, minItems=1)},
    {"volumes": _list(VOLUME)},
    others="activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy enableServiceLinks "
    "ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers hostname imagePullSecrets initContainers "
    "nodeName nodeSelector os overhead preemptionPolicy priority priorityClassName readinessGates resourceClaims "
    "resources restartPolicy runtimeClassName schedulerName schedulingGates securityContext serviceAccount "
    "serviceAccountName setHostnameAsFQDN shareProcessNamespace subdomain terminationGracePeriodSeconds tolerations "
    "topologySpreadConstraints",
)
TEMPLATE = _fields({"spec": POD}, others="apiVersion kind metadata")
HEAD = _fields(
    {"template": TEMPLATE},
    others="enableIngress headService labels rayStartParams resources serviceType",
)
WORKERS = _fields(
    {"groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT, "template": TEMPLATE},
    others="idleTimeoutSeconds labels numOfHosts rayStartParams resources scaleStrategy suspend",
)
RAYCLUSTER_SPEC = _fields(
    {
        "rayVersion": {"const": importlib.metadata.version("ray"), "description": "the version installed here"},
        "authOptions": _fields({"mode": {"const": "token", "description": "token: others open it to every pod"}}),
        "headGroupSpec": HEAD,
        "workerGroupSpecs": _list(WORKERS),
    },
    others="autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headServiceAnnotations managedBy "
    "suspend upgradeStrategy",
)
RAYJOB_SPEC = _fields(
    {
        "entrypoint": TEXT,
        "runtimeEnvYAML": TEXT,
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": COUNT,
        "backoffLimit": COUNT,
        "rayClusterSpec": RAYCLUSTER_SPEC,
    },
    others="activeDeadlineSeconds clusterSelector deletionStrategy entrypointNumCpus entrypointNumGpus "
    "entrypointResources jobId managedBy metadata submissionMode submitterConfig submitterPodTemplate suspend",
)
NAME = _text(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", "up to 47 small letters, digits and hyphens")
RAYJOB = _fields(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": _fields({"name": NAME}),
        "spec": RAYJOB_SPEC,
    }
)
RAYCLUSTER = _fields(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": _fields({"name": NAME}),
        "spec": RAYCLUSTER_SPEC,
    }
)


# -- the command


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check cluster manifests: files for `ray up`, KubeRay's RayJobs and RayClusters. Exits with 2 at the first bad
    one."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The YAML files."""
    ready: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Refuse files in which a <PLACE> is still to be filled in."""
    crd: tuple[Path, ...] = ()
    """KubeRay's CustomResourceDefinitions, to check against the whole schema (ray.io_rayjobs.yaml, ...)."""
    server: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let the cluster that kubectl is set up for check RayJobs and RayClusters too; nothing is applied."""


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, args=argv, prog="dbd cluster validate")
    try:
        if not options.files:
            raise UserError("no file is named", where="dbd cluster validate", expected="YAML files")
        schemas = dict(map(crd.read_crd, options.crd))
        for path in options.files:
            places = validate(path, schemas)
            if options.ready and places:
                hint = "replace each with your own value"
                raise UserError(f"Not filled in: {', '.join(places)}", where=path, hint=hint)
            if options.server:
                crd.ask_server(path)
            print(f"{path}: valid" + (f"; still to fill in: {', '.join(places)}" if places else ""))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def validate(path: Path, schemas: Mapping[str, Mapping[str, Schema]] | None = None) -> list[str]:
    """Check one file; returns the places in it that are still to be filled in.

    Args:
        schemas: of kinds of Kubernetes, by version; see `crd.read_crd`.

    Raises:
        UserError: the first mistake.
    """
    kinds = "a file for `ray up`, a RayJob or a RayCluster"
    try:
        parsed = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not YAML ({' '.join(str(error).split())})", where=path) from error
    if not isinstance(parsed, dict):
        raise UserError("not a mapping", where=path, expected=kinds)
    try:
        if "apiVersion" in parsed:
            _check_with_crd(parsed, schemas or {})
            if parsed.get("kind") == "RayCluster":
                check_raycluster(parsed)
            else:
                check_rayjob(parsed)
        elif "provider" in parsed:
            check_launcher(parsed)
        else:
            raise UserError("neither provider nor apiVersion is there", expected=kinds)
    except UserError as error:
        where = path if error.where is None else f"{path}: {error.where}"
        raise UserError(error.what, where=where, expected=error.expected, hint=error.hint) from error
    return sorted({place for value in _strings(parsed) for place in PLACE.findall(value)})


def _check_schema(config: dict, schema: Schema) -> None:
    error = best_match(Draft202012Validator(schema).iter_errors(config))
    if error is not None:
        expected = str(error.schema.get("description") or error.schema.get("const") or "")  # type: ignore[union-attr]
        what = textwrap.shorten(error.message, 200, placeholder="...")
        raise UserError(what, where=".".join(map(str, error.absolute_path)) or None, expected=expected or None)


# -- files for `ray up`


def check_launcher(config: dict) -> None:
    """A file for `ray up`."""
    provider = config["provider"]
    kind = provider.get("type") if isinstance(provider, dict) else None
    if kind not in LAUNCHERS:
        raise UserError(f"unknown provider {kind!r}", where="provider.type", expected=", ".join(LAUNCHERS))
    _check_with_ray(config)
    _check_schema(config, LAUNCHERS[kind])
    for place in ("head_start_ray_commands", "worker_start_ray_commands"):
        _check_start_commands(config.get(place), place)


def _check_with_ray(config: dict) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    output = io.StringIO()
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    try:
        # Ray prints the reason of some refusals and raises without it
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # jsonschema's, Ray's, click's, and KeyError where Ray trusts its input
        at = ".".join(map(str, getattr(error, "absolute_path", ())))
        reason = getattr(error, "message", "") or str(error) or " ".join(output.getvalue().split())
        raise UserError(f"Ray refuses it: {reason}", where=at or None) from error


def _check_start_commands(commands: Any, where: str) -> None:
    """Ray's defaults open the dashboard to every address and know no token: a file brings its own."""
    starts = [c for c in commands or [] if isinstance(c, str) and re.search(r"\bray start\b", c)]
    if not starts:
        raise UserError("no command starts Ray", where=where, hint="copy them from cluster/manifests")
    for start in starts:
        words = shlex.split(start)
        if "RAY_AUTH_MODE=token" not in words:
            what = "Ray starts without token authentication: anybody who reaches its ports can run code there"
            raise UserError(what, where=where, hint="put RAY_AUTH_MODE=token before `ray start`")
        hosts = [w.partition("=")[2] for w in words if w.startswith("--dashboard-host=")]
        if any(host not in ("127.0.0.1", "localhost", "::1") for host in hosts):
            expected = "127.0.0.1 (reach it with `ray dashboard`)"
            raise UserError(f"the dashboard listens on {hosts[0]}", where=where, expected=expected)


# -- RayJobs


def check_rayjob(manifest: dict) -> None:
    """A RayJob for KubeRay."""
    _check_schema(manifest, RAYJOB)
    spec = manifest["spec"]
    try:
        command = shlex.split(spec["entrypoint"])
    except ValueError as error:
        raise UserError(f"cannot be split into words ({error})", where="spec.entrypoint") from error
    if command[:1] != ["dbd"]:
        raise UserError(f"{spec['entrypoint']!r} does not run dbd", where="spec.entrypoint", expected="dbd COMMAND ...")
    if not spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"]:
        what, hint = "has no effect on a cluster that is kept", "set shutdownAfterJobFinishes: true"
        raise UserError(what, where="spec.ttlSecondsAfterFinished", hint=hint)
    try:
        runtime_env = yaml.safe_load(spec["runtimeEnvYAML"])
    except yaml.YAMLError as error:
        raise UserError(f"not YAML ({' '.join(str(error).split())})", where="spec.runtimeEnvYAML") from error
    if runtime_env is not None and not isinstance(runtime_env, dict):
        raise UserError("not a mapping", where="spec.runtimeEnvYAML")
    _check_groups(spec["rayClusterSpec"], "spec.rayClusterSpec")


def check_raycluster(manifest: dict) -> None:
    """A RayCluster for KubeRay."""
    _check_schema(manifest, RAYCLUSTER)
    _check_groups(manifest["spec"], "spec")


def _check_with_crd(manifest: dict, schemas: Mapping[str, Mapping[str, Schema]]) -> None:
    """Against the definition of its kind, where one is given."""
    if not schemas:
        return
    kind, version = str(manifest.get("kind")), str(manifest.get("apiVersion"))
    versions = schemas.get(kind)
    if versions is None:
        raise UserError(f"no --crd defines {kind!r}", where="kind", expected=", ".join(sorted(schemas)))
    if version not in versions:
        raise UserError(f"unknown version {version!r}", where="apiVersion", expected=", ".join(sorted(versions)))
    _check_schema(manifest, versions[version])


def _check_groups(spec: dict, where: str) -> None:
    """Fields that have to fit each other, which a schema cannot say."""
    groups = {f"{where}.workerGroupSpecs.{number}": group for number, group in enumerate(spec["workerGroupSpecs"])}
    for at, group in groups.items():
        low, now, high = group["minReplicas"], group["replicas"], group["maxReplicas"]
        if not low <= now <= high:
            what = f"minReplicas {low}, replicas {now}, maxReplicas {high}"
            raise UserError(what, where=at, expected="min <= replicas <= max")
    for at, group in {f"{where}.headGroupSpec": spec["headGroupSpec"], **groups}.items():
        pod = group["template"]["spec"]
        volumes = {volume.get("name") for volume in pod.get("volumes", [])}
        mounts = [mount.get("name") for container in pod["containers"] for mount in container.get("volumeMounts", [])]
        for name in mounts:
            if name not in volumes:
                what = f"{name!r} is mounted, and is not a volume"
                raise UserError(what, where=f"{at}.template.spec.containers", expected=f"{sorted(volumes)}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


if __name__ == "__main__":
    sys.exit(main())
