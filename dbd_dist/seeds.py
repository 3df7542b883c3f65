"""Every random draw of a run, named: a generator is a pure function of the run's seed and what it is for."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for one purpose, e.g. ``generator(seed, "simclr", epoch, "augment")``.

    The same arguments give the same stream on every rank, machine and day, so an epoch can be replayed from its
    number alone; only checkpoints inside an epoch hold the state of a generator.
    """
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
