import ctypes
import importlib.metadata
import shutil
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import check, machine, ports, storage
from cluster.machine import Finding
from data_prep.errors import UserError


def test_this_machine_is_fit(tmp_path, capsys):
    assert check.main(["--storage", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("Fit to run.\n")
    assert all(name in printed for name in ("python", "torchvision", "ffcv", "turbojpeg", "clock"))
    assert not (tmp_path / "runs").exists()


def test_a_failed_check_exits_with_1_and_names_itself(capsys):
    assert check.main(["--storage", "/proc/runs"]) == 1
    printed = capsys.readouterr().out
    assert "cannot be written" in printed
    assert "-> choose another folder" in printed
    assert printed.endswith("storage)\n")


def test_an_object_store_is_a_finding():
    failed = [f for f in machine.examine("s3://bucket/x") if f.status == "fail"]
    assert [f.name for f in failed] == ["storage"]
    assert "not a folder" in failed[0].detail


@pytest.mark.parametrize(
    ("torch", "wanted", "status"),
    [
        ("2.14.1+cu130", "torch==2.14.1", "ok"),
        ("2.13.0", "torch==2.14.1", "fail"),
        ("2.9.0", "torch (>=2.14.0)", "fail"),  # as the metadata of some builds has it
        ("2.14.1+cpu", "torch (>=2.14.0)", "ok"),
        ("2.13.0", "torch", "ok"),
        ("2.13.0", "torchvision-extra==9", "ok"),
    ],
)
def test_pair(torch, wanted, status):
    assert machine.pair(torch, "0.29.1", ["numpy", wanted]).status == status


@pytest.mark.parametrize(
    ("finding", "status"),
    [
        (machine.check_python((3, 10, 4)), "fail"),
        (machine.check_python((3, 13, 0)), "ok"),
        (machine.check_shared_memory("/nowhere"), "fail"),
        (machine.check_open_files((1024, 512)), "fail"),
        (machine.check_open_files((1024, 4096)), "warn"),
        (machine.check_open_files((1024, 65536)), "ok"),
        (machine.check_open_files((1024, -1)), "ok"),  # unlimited
        (machine.check_clock(0.0), "fail"),
        (check.clock_offset(-0.3), "ok"),
        (check.clock_offset(-5.0), "warn"),
        (check.clock_offset(90.0), "fail"),
        (check.check_name("127.0.1.1", {}), "warn"),
        (check.check_name("127.0.1.1", {"GLOO_SOCKET_IFNAME": "eth0"}), "ok"),
        (check.check_name("10.0.0.1", {}), "ok"),
    ],
)
def test_statuses(finding, status):
    assert finding.status == status
    assert finding.status == "ok" or finding.remedy


def test_a_check_that_raises_is_a_failed_one():
    def check_broken() -> Finding:
        raise RuntimeError("operator torchvision::nms does not exist")

    found = machine.guarded("torch", check_broken)
    assert (found.name, found.status) == ("torch", "fail")
    assert "nms" in found.detail


def test_the_odd_node_out_fails():
    same = [Finding("python", "ok", "3.11.7"), Finding("cpus", "ok", "2")]
    odd = [Finding("python", "ok", "3.12.1"), Finding("cpus", "ok", "8")]
    found = check.compare({"a": same, "b": odd, "c": same})
    assert found["a"] == found["c"] == same
    assert [(f.name, f.status) for f in found["b"]] == [("python", "fail"), ("cpus", "ok")]
    assert "3.12.1; other nodes: 3.11.7" in found["b"][0].detail


def test_the_table_shows_a_remedy_only_where_one_is_needed():
    rows = [Finding("a", "ok", "fine", "unused"), Finding("long name", "warn", "bad", "mend it")]
    assert check.table(rows, title="node").splitlines() == [
        "node",
        "  ok    a          fine",
        "  warn  long name  bad",
        "                   -> mend it",
    ]


def test_no_cluster(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    start = time.monotonic()
    with pytest.raises(UserError, match="no Ray cluster here"):
        check.examine_cluster(str(tmp_path))
    assert time.monotonic() - start < 30  # nothing was started or waited for


# -- a fault planted for each check: found, in one line, with what to do


def failed(findings: list[Finding]) -> dict[str, Finding]:
    return {f.name: f for f in findings if f.status == "fail"}


def missing_library(patch, folder: Path) -> list[Finding]:
    ask = importlib.metadata.version

    def version(name: str) -> str:
        if name == "tensorboard":
            raise importlib.metadata.PackageNotFoundError(name)
        return ask(name)

    patch.setattr(importlib.metadata, "version", version)
    return [machine.check_libraries(["tensorboard>=2.19,<3", "numpy>=2.0"])]


def old_library(patch, folder: Path) -> list[Finding]:
    return [machine.check_libraries(["numpy>=99", "wandb>=1; extra == 'wandb'"])]


def version_skew(patch, folder: Path) -> list[Finding]:
    rows = {w: [Finding("ray", "ok", v)] for w, v in (("a", "2.60.0"), ("b", "2.60.0"), ("c", "2.59.0"))}
    return check.compare(rows)["c"]


def storage_not_shared(patch, folder: Path) -> list[Finding]:
    mark = storage.leave_mark(folder / "here")
    patch.setattr(check, "examine", lambda storage: [])
    elsewhere = storage.Mark(folder / "there", mark.name, mark.content, folder)
    return [Finding(*row) for row in check._examine_node(str(folder / "there"), elsewhere, 1, 0)]


def no_space(patch, folder: Path) -> list[Finding]:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=2**20))
    return [machine.check_disk(str(folder))]


def closed_port(patch, folder: Path) -> list[Finding]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [Finding(*ports.reach([("n2 (127.0.0.1)", "127.0.0.1", port)]))]


def too_few_gpus(patch, folder: Path) -> list[Finding]:
    return check.enough_gpus(1, 8)


def a_gpu_that_torch_cannot_use(patch, folder: Path) -> list[Finding]:
    return [check.check_gpus_of_ray(2, 0)]


def clock(patch, folder: Path) -> list[Finding]:
    return [check.clock_offset(-90.0)]


def no_opencv(patch, folder: Path) -> list[Finding]:
    patch.setitem(sys.modules, "cv2", None)
    return machine.examine(str(folder))


def _no_library(patch, name: str) -> None:
    load = ctypes.CDLL

    def refuse(path: str, *rest: object) -> object:
        if name in str(path):
            raise OSError(f"{path}: cannot open shared object file")
        return load(path, *rest)  # type: ignore[arg-type]

    patch.setattr(ctypes, "CDLL", refuse)


def no_turbojpeg(patch, folder: Path) -> list[Finding]:
    _no_library(patch, "turbojpeg")
    return machine.examine(str(folder))


def ffcv_does_not_load(patch, folder: Path) -> list[Finding]:
    _no_library(patch, "_libffcv")
    return machine.examine(str(folder))


def small_shared_memory(patch, folder: Path) -> list[Finding]:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20, free=64 << 20))
    return [machine.check_shared_memory()]


def wrong_interface(patch, folder: Path) -> list[Finding]:
    return [machine.check_interfaces({"GLOO_SOCKET_IFNAME": "eth9"}, ["lo", "eth0"])]


def read_only_storage(patch, folder: Path) -> list[Finding]:
    return [machine.guarded("storage", lambda: machine.check_storage("/proc/runs"))]


FAULTS = {
    missing_library: ("libraries", "tensorboard is missing"),
    old_library: ("libraries", "numpy is "),
    version_skew: ("ray", "2.59.0; other nodes: 2.60.0"),
    storage_not_shared: ("shared storage", "is not the same here"),
    no_space: ("disk", "0.0 GiB free"),
    closed_port: ("ports", "cannot connect to n2"),
    too_few_gpus: ("enough gpus", "1 of 8"),
    a_gpu_that_torch_cannot_use: ("gpus of ray", "Ray offers 2, torch can use 0"),
    clock: ("clock offset", "-90.0 s"),
    no_opencv: ("opencv", "cv2"),
    no_turbojpeg: ("turbojpeg", "cannot open"),
    ffcv_does_not_load: ("ffcv", "cannot open"),
    small_shared_memory: ("shared memory", "0.1 GiB"),
    wrong_interface: ("interfaces", "GLOO_SOCKET_IFNAME names eth9"),
    read_only_storage: ("storage", "cannot be written"),
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant, monkeypatch, tmp_path):
    name, words = FAULTS[plant]
    found = failed(plant(monkeypatch, tmp_path))
    assert list(found) == [name]  # and nothing else is blamed
    assert words in found[name].detail
    assert "\n" not in found[name].detail
    assert found[name].remedy


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({}, "ok"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "ok"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "fail"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, "ok"),  # NCCL takes prefixes
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "fail"),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, "ok"),
    ],
)
def test_interfaces(environ, status):
    assert machine.check_interfaces(environ, ["lo", "eth0", "ib0"]).status == status


def test_ports_that_answer():
    listener = ports.Listener()
    assert ports.reach([("n2", "127.0.0.1", listener.port())])[:2] == ("ports", "ok")
