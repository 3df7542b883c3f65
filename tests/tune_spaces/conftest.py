"""A small plan, and its book."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tune_spaces.book import Book
from tune_spaces.metrics import Metric
from tune_spaces.plan import Plan
from tune_spaces.space import choice, uniform

VARY = {"split.keep": uniform(0.2, 0.8), "warmup.sce_alpha": choice(0.1, 1.0)}


@pytest.fixture
def plan(smoke_config, digits, tmp_path) -> Plan:
    return Plan(
        space="mine", vary=VARY, fixed={}, base=replace(smoke_config, data=None), datas={0: digits}, search="grid",
        trials=10, metrics=(Metric("score", True),), storage=tmp_path / "runs", name="sweep",
    )  # fmt: skip


@pytest.fixture
def book_of() -> Callable[..., Book]:
    def make(plan: Plan) -> Book:
        return Book(plan.folder, plan.identity("data"), plan.metrics)

    return make
