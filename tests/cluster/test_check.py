import time

import pytest

from cluster import check
from cluster.check import Finding
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
    failed = [f for f in check.examine("s3://bucket/x") if f.status == "fail"]
    assert [f.name for f in failed] == ["storage"]
    assert "not a folder" in failed[0].detail


@pytest.mark.parametrize(
    ("torch", "wanted", "status"),
    [("2.14.1+cu130", "torch==2.14.1", "ok"), ("2.13.0", "torch==2.14.1", "fail"), ("2.13.0", "torch", "ok")],
)
def test_pair(torch, wanted, status):
    assert check.pair(torch, "0.29.1", ["numpy", wanted]).status == status


@pytest.mark.parametrize(
    ("finding", "status"),
    [
        (check.check_python((3, 10, 4)), "fail"),
        (check.check_python((3, 13, 0)), "ok"),
        (check.check_shared_memory("/nowhere"), "fail"),
        (check.check_open_files((1024, 512)), "fail"),
        (check.check_open_files((1024, 4096)), "warn"),
        (check.check_open_files((1024, 65536)), "ok"),
        (check.check_open_files((1024, -1)), "ok"),  # unlimited
        (check.check_clock(0.0), "fail"),
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

    found = check._guarded("torch", check_broken)
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
