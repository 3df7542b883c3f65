"""Look into a cluster manifest before it costs machine time: `python -m cluster.validate FILE...`.

Launcher files (`ray up`) go through Ray's own validation, which leaves `provider`, `node_config` and the
commands unread: those are read here. RayJobs are checked against the shape that KubeRay documents. Unfilled
<PLACE>s are listed; `--ready` refuses them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import ipaddress
import logging
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from data_prep.errors import UserError

MANIFESTS = Path(__file__).parent / "manifests"
PLACE = re.compile(r"<[A-Z][A-Z0-9_]*>")
RAYJOB_SPEC = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "backoffLimit": int,
    "rayClusterSpec": dict,
}
RAYJOB_SPEC_MORE = {
    "activeDeadlineSeconds",
    "clusterSelector",
    "deletionStrategy",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "managedBy",
    "metadata",
    "submissionMode",
    "submitterPodTemplate",
    "submitterConfig",
    "suspend",
}
RAYCLUSTER_SPEC = {"rayVersion": str, "authOptions": dict, "headGroupSpec": dict, "workerGroupSpecs": list}
RAYCLUSTER_SPEC_MORE = {
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headServiceAnnotations",
    "managedBy",
    "suspend",
    "upgradeStrategy",
}
SHUTDOWN_FIELD = "shutdownAfterJobFinishes"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check cluster manifests: files for `ray up`, KubeRay's RayJobs. Exits with 2 at the first bad one."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The YAML files."""
    ready: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Refuse files in which a <PLACE> is still to be filled in."""


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, args=argv, prog="python -m cluster.validate")
    try:
        for path in options.files:
            places = validate(path)
            if options.ready and places:
                raise UserError(
                    f"Not filled in: {', '.join(places)}", where=path, hint="replace each with your own value"
                )
            print(f"{path}: valid" + (f"; still to fill in: {', '.join(places)}" if places else ""))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def validate(path: Path) -> list[str]:
    """Check one file; the places in it that are still to be filled in."""
    try:
        text = path.read_text()
        parsed = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"Cannot be read ({error.strerror})", where=path) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"Is not YAML ({' '.join(str(error).split())})", where=path) from error
    if not isinstance(parsed, dict):
        raise UserError("Holds no mapping", where=path, expected="a file for `ray up`, or a RayJob")
    try:
        if "apiVersion" in parsed:
            check_rayjob(parsed)
        elif "provider" in parsed:
            check_launcher(parsed)
        else:
            raise UserError("Has neither provider nor apiVersion", expected="a file for `ray up`, or a RayJob")
    except UserError as error:
        where = path if error.where is None else f"{path}: {error.where}"
        raise UserError(error.what, where=where, expected=error.expected, hint=error.hint) from error
    return sorted({place for value in _strings(parsed) for place in PLACE.findall(value)})


def check_launcher(config: dict) -> None:
    """A file for `ray up`."""
    provider = config["provider"]
    kind = provider.get("type") if isinstance(provider, dict) else None
    checks = {"local": _check_local, "aws": _check_aws, "gcp": _check_gcp}
    if kind not in checks:
        raise UserError(f"The provider {kind!r} is not known", where="provider.type", expected=", ".join(checks))
    _check_with_ray(config)
    checks[kind](config)
    for place in ("head_start_ray_commands", "worker_start_ray_commands"):
        _check_start_commands(config.get(place), place)


def _check_with_ray(config: dict) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    try:
        # Ray prints the reason of some refusals and raises without it.
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # jsonschema's, Ray's, click's, and KeyError where Ray trusts its input
        at = ".".join(map(str, getattr(error, "absolute_path", ())))
        reason = getattr(error, "message", "") or str(error) or " ".join(said.getvalue().split())
        raise UserError(f"Ray refuses it: {reason}", where=at or None) from error


def _check_local(config: dict) -> None:
    provider = config["provider"]
    known = {"type", "head_ip", "worker_ips", "coordinator_address"}
    _only(provider, known, "provider")
    if "coordinator_address" in provider:
        return
    if not isinstance(provider["worker_ips"], list):
        raise UserError("Is no list", where="provider.worker_ips", expected="[ADDRESS, ...]")
    addresses = [provider["head_ip"], *provider["worker_ips"]]
    for number, address in enumerate(addresses):
        where = "provider.head_ip" if number == 0 else f"provider.worker_ips[{number - 1}]"
        _check_address(address, where)
        if address in addresses[:number]:
            raise UserError(f"{address} is listed twice", where=where, expected="each machine once")
    if "ssh_user" not in config.get("auth", {}):
        raise UserError("Is missing", where="auth.ssh_user", hint="name the user that ssh logs in as")


def _check_aws(config: dict) -> None:
    provider = config["provider"]
    _required(provider, {"region": str}, "provider")
    if not PLACE.fullmatch(provider["region"]) and not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", provider["region"]):
        raise UserError(f"{provider['region']!r} is no region", where="provider.region", expected="such as us-west-2")
    for where, node in _node_configs(config):
        _required(node, {"InstanceType": str}, where)
        if not PLACE.fullmatch(node["InstanceType"]) and "." not in node["InstanceType"]:
            raise UserError(
                f"{node['InstanceType']!r} is no instance type",
                where=f"{where}.InstanceType",
                expected="such as g6.2xlarge",
            )
        for device in node.get("BlockDeviceMappings", []):
            _at_least_gib(device.get("Ebs", {}).get("VolumeSize"), f"{where}.BlockDeviceMappings.Ebs.VolumeSize")


def _check_gcp(config: dict) -> None:
    provider = config["provider"]
    _required(provider, {"region": str, "availability_zone": str, "project_id": str}, "provider")
    region, zone = provider["region"], provider["availability_zone"]
    if not PLACE.fullmatch(region) and not PLACE.fullmatch(zone) and not zone.startswith(f"{region}-"):
        raise UserError(f"{zone} is not in {region}", where="provider.availability_zone", expected=f"{region}-a, ...")
    for where, node in _node_configs(config):
        _required(node, {"machineType": str, "disks": list}, where)
        if not any(isinstance(disk, dict) and disk.get("boot") for disk in node["disks"]):
            raise UserError("No disk has boot: true", where=f"{where}.disks")
        for disk in node["disks"]:
            start = disk.get("initializeParams", {})
            _required(start, {"sourceImage": str}, f"{where}.disks.initializeParams")
            _at_least_gib(start.get("diskSizeGb"), f"{where}.disks.initializeParams.diskSizeGb")


def _check_start_commands(commands: Any, where: str) -> None:
    """Ray's defaults open the dashboard to every address and know no token: a file brings its own."""
    starts = [c for c in commands or [] if isinstance(c, str) and re.search(r"\bray start\b", c)]
    if not starts:
        raise UserError("No command starts Ray", where=where, hint="copy them from cluster/manifests")
    for start in starts:
        words = shlex.split(start)
        if "RAY_AUTH_MODE=token" not in words:
            raise UserError(
                "Ray starts without token authentication: who reaches its ports runs code there",
                where=where,
                hint="put RAY_AUTH_MODE=token before `ray start`",
            )
        hosts = [w.partition("=")[2] for w in words if w.startswith("--dashboard-host=")]
        if any(host not in ("127.0.0.1", "localhost", "::1") for host in hosts):
            raise UserError(
                f"The dashboard listens on {hosts[0]}",
                where=where,
                expected="127.0.0.1 (reach it with `ray dashboard`)",
            )


def check_rayjob(manifest: dict) -> None:
    """A RayJob for KubeRay."""
    for name, wanted in (("apiVersion", "ray.io/v1"), ("kind", "RayJob")):
        if manifest.get(name) != wanted:
            raise UserError(f"{manifest.get(name)!r} is not known", where=name, expected=wanted)
    _required(manifest, {"metadata": dict, "spec": dict}, "")
    name = manifest["metadata"].get("name", "")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", str(name)):
        raise UserError(
            f"{name!r} cannot be a name",
            where="metadata.name",
            expected="up to 47 small letters, digits and hyphens",
        )
    spec = manifest["spec"]
    _required(spec, RAYJOB_SPEC, "spec")
    _only(spec, RAYJOB_SPEC.keys() | RAYJOB_SPEC_MORE, "spec")
    try:
        command = shlex.split(spec["entrypoint"])
    except ValueError as error:
        raise UserError(f"Cannot be split into words ({error})", where="spec.entrypoint") from error
    if command[:1] != ["dbd"]:
        raise UserError(f"{spec['entrypoint']!r} does not run dbd", where="spec.entrypoint", expected="dbd COMMAND ...")
    if not spec[SHUTDOWN_FIELD] and spec["ttlSecondsAfterFinished"]:
        raise UserError(
            "Has no effect on a cluster that is kept",
            where="spec.ttlSecondsAfterFinished",
            hint=f"set {SHUTDOWN_FIELD}: true",
        )
    if spec["ttlSecondsAfterFinished"] < 0 or spec["backoffLimit"] < 0:
        raise UserError("Is negative", where="spec.ttlSecondsAfterFinished or spec.backoffLimit", expected="0 or more")
    try:
        runtime_env = yaml.safe_load(spec["runtimeEnvYAML"])
    except yaml.YAMLError as error:
        raise UserError(f"Is not YAML ({' '.join(str(error).split())})", where="spec.runtimeEnvYAML") from error
    if runtime_env is not None and not isinstance(runtime_env, dict):
        raise UserError("Holds no mapping", where="spec.runtimeEnvYAML")
    _check_raycluster(spec["rayClusterSpec"], "spec.rayClusterSpec")


def _check_raycluster(spec: dict, where: str) -> None:
    _required(spec, RAYCLUSTER_SPEC, where)
    _only(spec, RAYCLUSTER_SPEC.keys() | RAYCLUSTER_SPEC_MORE, where)
    installed = importlib.metadata.version("ray")
    if spec["rayVersion"] != installed:
        raise UserError(
            f"{spec['rayVersion']} is not the version that this project runs on",
            where=f"{where}.rayVersion",
            expected=installed,
        )
    if spec["authOptions"].get("mode") != "token":
        raise UserError(
            f"{spec['authOptions'].get('mode')!r} leaves the cluster open to every pod",
            where=f"{where}.authOptions.mode",
            expected="token",
        )
    _check_pod(spec["headGroupSpec"], f"{where}.headGroupSpec")
    names = []
    for number, group in enumerate(spec["workerGroupSpecs"]):
        at = f"{where}.workerGroupSpecs[{number}]"
        _required(group, {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}, at)
        low, now, high = group["minReplicas"], group["replicas"], group["maxReplicas"]
        if not 0 <= low <= now <= high:
            raise UserError(
                f"minReplicas {low}, replicas {now}, maxReplicas {high}",
                where=at,
                expected="0 <= min <= replicas <= max",
            )
        if group["groupName"] in names:
            raise UserError(f"{group['groupName']!r} is used twice", where=f"{at}.groupName")
        names.append(group["groupName"])
        _check_pod(group, at)


def _check_pod(group: Any, where: str) -> None:
    _required(group, {"template": dict}, where)
    pod = group["template"].get("spec")
    _required(pod, {"containers": list}, f"{where}.template.spec")
    if not pod["containers"]:
        raise UserError("Is empty", where=f"{where}.template.spec.containers")
    volumes = {volume.get("name") for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        at = f"{where}.template.spec.containers"
        _required(container, {"name": str, "image": str, "resources": dict}, at)
        for mount in container.get("volumeMounts", []):
            if mount.get("name") not in volumes:
                raise UserError(
                    f"Mounts {mount.get('name')!r}, which is no volume",
                    where=at,
                    expected=f"{sorted(volumes)}",
                )


def _node_configs(config: dict) -> Iterator[tuple[str, dict]]:
    types = config.get("available_node_types")
    if not types:
        raise UserError("Is missing", where="available_node_types", hint="copy it from cluster/manifests")
    for name, node_type in types.items():
        yield f"available_node_types.{name}.node_config", node_type["node_config"]


def _required(found: Any, fields: dict[str, type], where: str) -> None:
    if not isinstance(found, dict):
        raise UserError("Is missing, or no mapping", where=where)
    for name, kind in fields.items():
        at = f"{where}.{name}".lstrip(".")
        if found.get(name) is None:
            raise UserError("Is missing", where=at, expected=f"a value of type {kind.__name__}")
        if not isinstance(found[name], kind) or (kind is int and isinstance(found[name], bool)):
            raise UserError(f"{found[name]!r} is no {kind.__name__}", where=at)


def _only(found: dict, known: set[str], where: str) -> None:
    for name in found:
        if name not in known:
            raise UserError(f"{name!r} is not known", where=where, expected=", ".join(sorted(known)))


def _check_address(address: Any, where: str) -> None:
    if not isinstance(address, str):
        raise UserError(f"{address!r} is no address", where=where)
    if PLACE.fullmatch(address):
        return
    if re.fullmatch(r"[\d.]+|[\da-fA-F:]*:[\da-fA-F:]*", address):
        try:
            ipaddress.ip_address(address)
            return
        except ValueError:
            pass
    elif re.fullmatch(r"(?!-)[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", address):
        return
    raise UserError(f"{address!r} is no address", where=where, expected="an IP address or a host name")


def _at_least_gib(size: Any, where: str, *, least: int = 30) -> None:
    """The installed project takes 6 GB, beside the system and its driver."""
    if size is not None and (not isinstance(size, int) or size < least):
        raise UserError(f"{size!r} GiB of disk", where=where, expected=f"{least} or more")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


if __name__ == "__main__":
    sys.exit(main())
