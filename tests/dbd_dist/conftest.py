"""Two ranks, started once for all tests that need them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from two_ranks import TwoRanks

from dbd_dist.distributed.world import World

# the results of small networks are compared bit for bit; they may not depend on how work is spread over threads
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """Runs a function of (World, ...) on both ranks; gives the two results."""
    ranks = TwoRanks(tmp_path_factory.mktemp("gloo") / "store")
    yield ranks
    ranks.close()


@pytest.fixture
def alone() -> World:
    """A world of one."""
    return World()
