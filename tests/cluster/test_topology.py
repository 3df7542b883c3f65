import pickle
from types import SimpleNamespace

import pytest

from cluster.topology import Node, Topology, check_alone, from_ray_nodes, interface_env, worker_resources
from data_prep.errors import UserError


def nodes(*sizes: tuple[int, int]) -> Topology:
    return Topology(tuple(Node(host=f"n{i}", address=f"10.0.0.{i}", cpus=c, gpus=g) for i, (c, g) in enumerate(sizes)))


@pytest.mark.parametrize(
    ("sizes", "asked", "got"),
    [
        ([(2, 0)], {}, (1, 2, False)),  # one process uses all cores
        ([(2, 0)], {"workers": 2}, (2, 1, False)),
        ([(8, 0), (4, 0)], {}, (2, 4, False)),
        ([(8, 0), (4, 0)], {"workers": 3}, (3, 4, False)),
        ([(5, 0), (5, 0)], {"workers": 3}, (3, 2, False)),  # 3 CPUs would fit once a node
        ([(16, 4)], {}, (4, 4, True)),
        ([(16, 4), (8, 0)], {}, (4, 4, True)),  # a node without a GPU holds no GPU worker
        ([(2, 4)], {}, (2, 1, True)),  # fewer CPUs than GPUs
        ([(16, 4)], {"use_gpu": False, "workers": 4}, (4, 4, False)),
        ([(16, 4)], {"runs": 2}, (2, 4, True)),
        ([(4, 0)], {"runs": 2, "workers": 1}, (1, 2, False)),
    ],
)
def test_share(sizes, asked, got):
    found = worker_resources(nodes(*sizes), **asked)
    assert (found.workers, found.cpus_per_worker, found.use_gpu) == got


def test_share_is_what_ray_takes():
    assert worker_resources(nodes((8, 2))).resources == {"CPU": 4.0, "GPU": 1.0}
    assert worker_resources(nodes((8, 0))).resources == {"CPU": 8.0}


@pytest.mark.parametrize(
    ("sizes", "asked", "words"),
    [
        ([(2, 0)], {"workers": 3}, ["3 workers", "2 CPUs", "1 to 2 workers"]),
        ([(16, 2)], {"workers": 3}, ["3 workers", "1 GPU", "1 node, 16 CPUs, 2 GPUs", "1 to 2 workers"]),
        ([(2, 0)], {"workers": 0}, ["0 workers", "1 to 2 workers"]),
        ([(4, 0), (4, 0)], {"workers": 2, "cpus_per_worker": 5}, ["5 CPUs", "none fits"]),
        ([(4, 0)], {"use_gpu": True}, ["no", "0 GPUs"]),
        ([(4, 0)], {"workers": 3, "runs": 2}, ["each of 2 runs", "1 to 2 workers"]),
        ([(0, 0)], {}, ["no CPU"]),
    ],
)
def test_too_much_is_refused_in_numbers(sizes, asked, words):
    with pytest.raises(UserError) as caught:
        worker_resources(nodes(*sizes), **asked)
    assert [word for word in words if word not in str(caught.value)] == []


def test_dead_nodes_do_not_count():
    node = {"NodeManagerHostname": "a", "NodeManagerAddress": "10.0.0.1", "NodeID": "x", "Alive": True}
    found = from_ray_nodes(
        [
            node | {"Resources": {"CPU": 4.0, "memory": 1e9}},
            node | {"NodeID": "y", "Alive": False, "Resources": {"CPU": 9.0}},
        ]
    )
    assert (len(found.nodes), found.cpus, found.gpus) == (1, 4, 0)


def test_interfaces_are_bound_by_exact_name():
    assert interface_env("ib0, ib1", present=["lo", "ib0", "ib1"]) == {
        "GLOO_SOCKET_IFNAME": "ib0,ib1",
        "NCCL_SOCKET_IFNAME": "=ib0,ib1",
    }
    with pytest.raises(UserError, match=r"'eth9'.*Expected: eth0, lo"):
        interface_env("eth9", present=["lo", "eth0"])
    assert interface_env("lo")["GLOO_SOCKET_IFNAME"] == "lo"


def test_error_survives_the_trip_from_a_worker():
    error = pickle.loads(pickle.dumps(UserError("bad", where="w", expected="a", hint="f")))
    assert str(error) == "w: bad. Expected: a. Hint: f."


def test_a_run_staged_on_this_node_refuses_others(monkeypatch):
    import ray

    both = [Node(host=name, address=name, cpus=2, gpus=0, node_id=name) for name in ("here", "there")]
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    check_alone(Topology(tuple(both[:1])), "DBD_STAGING")
    for others in (both, both[1:]):
        with pytest.raises(UserError, match=r"do not see \(there\).*DBD_STAGING"):
            check_alone(Topology(tuple(others)), "DBD_STAGING")
