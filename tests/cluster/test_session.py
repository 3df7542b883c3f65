import os
import socket

import pytest

from cluster import session
from data_prep.errors import UserError


def test_a_token_is_made_unless_the_user_has_one():
    first, second = session.token_env({}), session.token_env({"RAY_AUTH_MODE": "token"})
    assert first.keys() == second.keys() == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert session.token_env({"RAY_AUTH_TOKEN": "t"}) == {"RAY_AUTH_MODE": "token"}
    assert session.token_env({"RAY_AUTH_TOKEN_PATH": "p"}) == {"RAY_AUTH_MODE": "token"}
    assert session.token_env({"RAY_AUTH_MODE": "disabled"}) == {}
    with pytest.raises(UserError, match=r"'off'.*Expected: token, disabled"):
        session.token_env({"RAY_AUTH_MODE": "off"})


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


def test_ends_of_processes_in_words():
    assert session.how_it_ended(-9) == "was ended by SIGKILL"
    assert session.how_it_ended(-200) == "was ended by signal 200"
    assert session.how_it_ended(3) == "ended with exit code 3"


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_of_our_own(tmp_path, ray_here):
    """Token, topology, the doctor on every node. What it leaves is checked where it is stopped, in conftest.py."""
    import ray

    from cluster import check, topology

    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert topology.current().cpus == 2
    with session.connect() as inner:  # uses, and leaves open, what is there
        assert inner
    assert ray.is_initialized()
    assert session.Watch().lost() is None
    (findings,) = check.examine_cluster(str(tmp_path / "runs")).values()
    assert {f.name for f in findings} >= {"python", "storage", "clock offset"}
    assert [f for f in findings if f.status == "fail"] == []
    assert not (tmp_path / "runs").exists()
