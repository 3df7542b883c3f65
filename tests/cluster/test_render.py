"""Rendered files: current, valid, and what a user cannot slip into them."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest
import yaml

from cluster import render, validate
from cluster.gauges import GAUGES
from cluster.render import TARGETS, Cluster
from data_prep.errors import UserError
from dbd_dist.cli import main


@pytest.mark.parametrize("target", TARGETS)
def test_the_examples_are_what_the_defaults_give(target):
    assert (validate.MANIFESTS / TARGETS[target]).read_text() == render.render(target)


OTHERS = Cluster(
    workers=3, gpus=0, cpus=16, memory_gib=64, name="lab", command="train cifar10_badnets --data '/mnt/a b'",
    storage="/mnt/other", image="registry.example/dbd:1@sha256:0", claim="runs", namespace="ml", pull_secret="pull",
    node_selector=("disk=nvme", "zone=1"), region="eu-west-1", head_type="m7i.large",
    worker_type="c7i.4xlarge", spot=True,
)  # fmt: skip


@pytest.mark.parametrize("cluster", [Cluster(), OTHERS], ids=["defaults", "others"])
@pytest.mark.parametrize("target", ["aws", "gcp", "onprem", "kuberay-rayjob", "kuberay-raycluster"])
def test_what_is_rendered_is_valid(target, cluster, tmp_path):
    path = tmp_path / TARGETS[target]
    path.write_text(render.render(target, cluster))
    validate.validate(path)


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in ("slurm", "grafana")])
def test_settings_reach_the_file(target):
    text = render.render(target, OTHERS)
    assert isinstance(yaml.safe_load(text), dict)
    assert "/mnt/other" in text or target in ("onprem", "anyscale")
    assert "lab" in text


def test_pods():
    spec = yaml.safe_load(render.render("kuberay-rayjob", OTHERS))["spec"]
    assert shlex.split(spec["entrypoint"]) == [
        "dbd", "train", "cifar10_badnets", "--data", "/mnt/a b", "--storage", "/mnt/other",
    ]  # fmt: skip
    head, worker = (
        group["template"]["spec"]
        for group in (spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"][0])
    )
    assert worker["nodeSelector"] == {"disk": "nvme", "zone": "1"}
    assert "tolerations" not in worker  # no GPUs
    assert "nodeSelector" not in head
    with_gpus = yaml.safe_load(render.render("kuberay-rayjob"))["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert with_gpus["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    for pod in (head, worker):
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["containers"][0]["startupProbe"]["exec"]["command"][:2] == ["dbd", "doctor"]
        assert pod["imagePullSecrets"] == [{"name": "pull"}]


def test_a_command_with_spaces_stays_words_in_slurm(tmp_path):
    script = tmp_path / "slurm.sh"
    script.write_text(render.render("slurm", OTHERS))
    subprocess.run(["bash", "-n", script], check=True)
    (line,) = (line for line in script.read_text().splitlines() if line.startswith("command="))
    assert "train cifar10_badnets --data '/mnt/a b' --storage" in line
    assert "--gpus-per-node" not in script.read_text()


def test_the_dashboard_shows_every_gauge():
    board = json.loads(render.render("grafana"))
    shown = [panel["targets"][0]["expr"] for panel in board["panels"]]
    assert [next(s for s in shown if f"ray_dbd_{field}{{" in s) for field in GAUGES] == shown


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no target is named"),
        (["kubray"], "did you mean"),
        (["aws", "--workers", "0"], "--workers: 0 is not allowed"),
        (["aws", "--name", "A b"], "--name: 'A b' is not allowed"),
        (["slurm", "--command", "train 'x"], "--command"),
        (["slurm", "--command", "dbd train demo"], "what follows dbd"),
        (["slurm", "--command", "train demo --storage /x"], "added from --storage"),
        (["slurm", "--storage", "/mnt/$(id)"], "--storage"),
        (["slurm", "--command", "train\ndemo"], "one line"),
        (["kuberay-rayjob", "--node-selector", "gpu"], "LABEL=VALUE"),
        (["slurm", "--out", "/nowhere/x"], "cannot be written"),
    ],
)
def test_mistakes_are_one_message(argv, words, capsys):
    assert main(["cluster", "render", *argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("value", ["a: b", "x # y", '"', "{{ 7 }}", "- z", "yes", "12", "&a", "*a", "!!python/name:x"])
def test_a_value_stays_a_value(value):
    text = render.render("anyscale", Cluster(image=value, worker_type=value))
    found = yaml.safe_load(text)
    assert found["image_uri"] == value
    assert found["compute_config"]["worker_nodes"][0]["instance_type"] == value


def test_a_file_is_written_once(tmp_path, capsys):
    out = tmp_path / "job.sh"
    assert main(["cluster", "render", "slurm", "--workers", "4", "--out", str(out)]) == 0
    assert "#SBATCH --nodes=4" in out.read_text()
    assert main(["cluster", "render", "slurm", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_an_unknown_subcommand(capsys):
    assert main(["cluster", "rendr"]) == 2
    assert "did you mean 'render'" in capsys.readouterr().err


def test_bad_targets_from_python():
    with pytest.raises(UserError, match="did you mean 'slurm'"):
        render.render("slum")
