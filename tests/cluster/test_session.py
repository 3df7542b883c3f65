import os
import socket
import stat

import pytest

from cluster import session
from data_prep.errors import UserError


def test_a_token_is_made_unless_the_user_has_one(tmp_path):
    path = tmp_path / "token"
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    assert session.token_env({}, path) == ours
    assert session.token_env({"RAY_AUTH_MODE": "token"}, path) == ours
    assert session.token_env({"RAY_AUTH_TOKEN": "t"}, path) == {"RAY_AUTH_MODE": "token"}
    assert session.token_env({"RAY_AUTH_TOKEN_PATH": "p"}, path) == {"RAY_AUTH_MODE": "token"}
    assert session.token_env({"RAY_AUTH_MODE": "disabled"}, path) == {}
    with pytest.raises(UserError, match=r"'off'.*Expected: token, disabled"):
        session.token_env({"RAY_AUTH_MODE": "off"}, path)


def test_the_token_is_private(tmp_path):
    path = tmp_path / "token"
    session._write_token(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) == 64


def test_telemetry_is_off_unless_wanted():
    assert session.quiet_env({})["RAY_USAGE_STATS_ENABLED"] == "0"
    assert "RAY_USAGE_STATS_ENABLED" not in session.quiet_env({"RAY_USAGE_STATS_ENABLED": "1"})


def test_the_cluster_is_found_by_address_or_note(tmp_path):
    assert session.cluster_address({"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    here = {"RAY_TMPDIR": str(tmp_path)}
    assert session.cluster_address(here) is None
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert session.cluster_address(here) == address
        assert session.cluster_address(here | {"RAY_ADDRESS": "local"}) is None
    assert session.cluster_address(here) is None  # the cluster was killed, its note is still there


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_of_our_own(tmp_path, monkeypatch):
    """One start for all that needs one: token, topology, the doctor on every node, nothing left behind."""
    import ray

    from cluster import check, topology

    for name in ("RAY_ADDRESS", *session.AUTH_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray would put a token of its own
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with session.connect(num_cpus=2, dashboard=True) as is_cluster:
        assert not is_cluster
        token = os.environ["RAY_AUTH_TOKEN_PATH"]
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert topology.current().cpus == 2
        with session.connect() as inner:  # uses, and leaves open, what is there
            assert inner
        assert ray.is_initialized()
        assert session.Watch().lost() is None
        (findings,) = check.examine_cluster(str(tmp_path / "runs")).values()
        assert {f.name for f in findings} >= {"python", "storage", "clock offset"}
        assert [f for f in findings if f.verdict == "fail"] == []
        dashboard = ray._private.worker.global_worker.node.address_info["webui_url"]
        assert dashboard.startswith("127.0.0.1:")
        assert _status(dashboard, {}) == 401
        with open(token) as file:
            assert _status(dashboard, {"Authorization": f"Bearer {file.read()}"}) == 200
    assert not ray.is_initialized()
    assert not os.path.exists(token)
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert not (tmp_path / ".ray").exists()
    assert not (tmp_path / "runs").exists()


def _status(dashboard: str, headers: dict[str, str]) -> int:
    import urllib.error
    import urllib.request

    try:
        return urllib.request.urlopen(
            urllib.request.Request(f"http://{dashboard}/api/jobs/", headers=headers), timeout=20
        ).status
    except urllib.error.HTTPError as error:
        return error.code
