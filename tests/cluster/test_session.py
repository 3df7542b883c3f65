import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from cluster import address, guard, own_ray, session
from data_prep.errors import UserError


def test_a_token_is_made_unless_the_user_has_one():
    first, second = own_ray.token_env({}), own_ray.token_env({"RAY_AUTH_MODE": "token"})
    assert first.keys() == second.keys() == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert own_ray.token_env({"RAY_AUTH_TOKEN": "t"}) == {"RAY_AUTH_MODE": "token"}
    assert own_ray.token_env({"RAY_AUTH_TOKEN_PATH": "p"}) == {"RAY_AUTH_MODE": "token"}
    assert own_ray.token_env({"RAY_AUTH_MODE": "disabled"}) == {}
    with pytest.raises(UserError, match=r"'off'.*Expected: token, disabled"):
        own_ray.token_env({"RAY_AUTH_MODE": "off"})


def test_telemetry_is_off_unless_wanted():
    assert session.quiet_env({})["RAY_USAGE_STATS_ENABLED"] == "0"
    assert "RAY_USAGE_STATS_ENABLED" not in session.quiet_env({"RAY_USAGE_STATS_ENABLED": "1"})


def test_the_cluster_is_found_by_address_or_note(tmp_path):
    assert address.cluster_address({"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    here = {"RAY_TMPDIR": str(tmp_path)}
    assert address.cluster_address(here) is None
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(place)
        assert address.cluster_address(here) == place
        assert address.cluster_address(here | {"RAY_ADDRESS": "local"}) is None
    assert address.cluster_address(here) is None  # the cluster was killed, its note is still there


def test_ends_of_processes_in_words():
    assert guard.how_it_ended(-9) == "was ended by SIGKILL"
    assert guard.how_it_ended(-200) == "was ended by signal 200"
    assert guard.how_it_ended(3) == "ended with exit code 3"


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


GET = """
import encodings.idna, json, os, sys, urllib.error, urllib.request  # all before the folders of another user close
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
found = {}
for url in json.loads(sys.argv[1]):
    try:
        found[url] = urllib.request.urlopen(url, timeout=20).status
    except urllib.error.HTTPError as error:
        found[url] = error.code
    except Exception:
        found[url] = None
print(json.dumps(found))
"""
"""Asks as another user, without a token."""


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_of_our_own_is_on_the_loopback_address_alone(ray_here):
    import psutil
    import ray
    from ray._private import worker

    ray.get(ray.remote(lambda: None).remote())  # workers listen too
    me = psutil.Process()
    addresses: dict[str, set[int]] = {}
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # an idle worker may end at any time
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    addresses.setdefault(connection.laddr.ip.removeprefix("::ffff:"), set()).add(connection.laddr.port)
    assert addresses.keys() == {own_ray.LOOPBACK}
    ports = addresses[own_ray.LOOPBACK]
    assert len(ports) > 5

    paths = ("metrics", "api/jobs/", "api/actors", "api/v0/logs/file?filename=raylet.out")
    urls = [f"http://127.0.0.1:{port}/{path}" for port in sorted(ports) for path in paths]
    done = subprocess.run([sys.executable, "-c", GET, json.dumps(urls)], capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout)
    assert {url: status for url, status in answers.items() if status is not None and status < 400} == {}
    assert 401 in answers.values()  # the dashboard was among them

    folder = Path(worker._global_node.get_temp_dir_path()).parent  # type: ignore[union-attr]
    assert folder.stat().st_mode & 0o777 == 0o700
