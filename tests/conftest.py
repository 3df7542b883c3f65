"""What tests of several packages share."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, and inherited by every process that a test starts: tests measure nothing, and small
# tensors are slower on many threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would wait for whatever else runs
os.environ["RAY_ADDRESS"] = "local"  # a Ray that runs here, of other tests or of anybody else, is not theirs

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

# A shell without job control has SIGINT ignored for what it runs with "&", and every child inherits it: the commands
# that tests interrupt would not notice.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def starts_ray(nodeid: str) -> bool:
    """By its name: whoever hands out tests to processes knows nothing else of them."""
    return re.search(r"/(cluster/test_jobs|test_(launch|sweep|soak))\.py|_ray_", nodeid) is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `make test`, in two processes, runs where: all that starts a Ray in one of them, since it would start in
    both at once; the tests of any other file together, since they share fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if starts_ray(nodeid) else nodeid.partition("::")[0]

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what two ranks make slow; hold the marker against the name; put Ray's tests, which take longest, first,
    those that share one together."""
    for item in items:
        if "two_ranks" in getattr(item, "fixturenames", ()):  # which take many seconds to start, on both cores
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("ray") and not starts_ray(item.nodeid):
            raise pytest.UsageError(f"{item.nodeid} starts a Ray, and its name does not say so (see starts_ray)")
    items.sort(key=lambda item: 0 if shares_ray(item) else 1 if starts_ray(item.nodeid) else 2)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where tests run in several processes, each has a core: a run that takes all of them, as by default, is several
    times slower there, since every step waits for the thread whose core another test holds. Ray's tests have them all.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and CORES:
        os.sched_setaffinity(0, CORES if starts_ray(item.nodeid) else {CORES[int(worker[2:]) % len(CORES)]})


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported stays to the end: the collector need not go through it again and again."""
    gc.freeze()


def shares_ray(item: pytest.Item | None) -> bool:
    return "ray_here" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes that tests keep stay among the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder: 240 training and 50 test images of digits, 16 px, 24 of them poisoned. Not to be changed."""
    from data_prep.attacks import BadNets
    from data_prep.config import PrepareConfig
    from data_prep.pipeline import prepare
    from data_prep.sources import Digits

    config = PrepareConfig(
        source=Digits(train_per_class=24, test_per_class=5),
        attack=BadNets(),
        rate=0.1,
        datasets=tmp_path_factory.mktemp("datasets"),
        workers=1,
    )
    return prepare(config, progress=False).folder


@pytest.fixture(scope="session")
def with_holdout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `digits`, with 20 of 260 training images set aside clean. Not to be changed."""
    from data_prep.attacks import BadNets
    from data_prep.config import PrepareConfig
    from data_prep.pipeline import prepare
    from data_prep.sources import Digits

    config = PrepareConfig(
        source=Digits(train_per_class=26, test_per_class=5),
        attack=BadNets(),
        rate=0.1,
        holdout_clean=0.077,
        datasets=tmp_path_factory.mktemp("datasets"),
        workers=1,
    )
    return prepare(config, progress=False).folder


@pytest.fixture
def digits_copy(digits: Path, tmp_path: Path) -> Path:
    """The same folder, free to be damaged."""
    return Path(shutil.copytree(digits, tmp_path / "digits"))


@pytest.fixture(scope="session")
def smoke_config(digits: Path) -> Any:
    """The smoke preset on `digits`, one worker and one thread, batches that fit the smaller data set."""
    return _smoke("dbd", digits)


@pytest.fixture(scope="session")
def smoke_none(digits: Path) -> Any:
    """The same without a defence."""
    return _smoke("none", digits)


def _smoke(method: str, data: Path) -> Any:
    from dbd_dist.presets import preset

    smoke = preset("smoke").change(simclr={"batch": 60}, warmup={"batch": 60}, supervised={"batch": 60})
    compute = replace(smoke.compute, workers=1, threads=1, precision="fp32")
    return replace(smoke.config(method), data=data, compute=compute)


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Change fields of a JSON file in place."""

    def edit(path: Path, **fields: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


@pytest.fixture
def edit_sealed() -> Callable[..., None]:
    """The same as a careful forger would, with a checksum that fits."""
    from data_prep.io.hashes import sha256_json

    def edit(path: Path, **fields: Any) -> None:
        content = json.loads(path.read_text()) | fields
        content.pop("checksum")
        path.write_text(json.dumps(content | {"checksum": sha256_json(content)}))

    return edit


class SharedRay:
    """A Ray of two CPUs with a dashboard: started for the first test that needs one, stopped after the last."""

    def __init__(self) -> None:
        self._running = ExitStack()

    def start(self, home: Path) -> str:
        """Returns its address.

        Args:
            home: an empty folder, in whose place Ray would write a token.
        """
        import ray

        from cluster import own_ray, session

        patch = self._running.enter_context(pytest.MonkeyPatch.context())
        for name in own_ray.AUTH_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # jobs find `dbd`
        with pytest.MonkeyPatch.context() as while_starting:
            while_starting.setenv("HOME", str(home))
            assert not self._running.enter_context(session.connect(num_cpus=2, dashboard=True))
        assert list(home.iterdir()) == []
        return ray.get_runtime_context().gcs_address

    def stop(self) -> None:
        import ray

        self._running.close()
        assert not ray.is_initialized()
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert "RAY_AUTH_MODE" not in os.environ


SHARED_RAY = SharedRay()


@pytest.fixture(scope="session")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a Ray that all tests which need one share, and that this process is connected to."""
    return SHARED_RAY.start(tmp_path_factory.mktemp("home"))


@pytest.hookimpl(trylast=True)  # when the fixtures of the last test that shares it are gone
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop it before tests that must find no Ray."""
    if shares_ray(item) and not shares_ray(nextitem):
        SHARED_RAY.stop()
