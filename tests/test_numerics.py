"""The table of largest differences in docs/method.md: all components, and nothing worse than it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import numerics

PAGE = Path(__file__).resolve().parents[1] / "docs" / "method.md"


def stated() -> dict[tuple[str, str], float]:
    """The largest difference by component and reference, as the page has it."""
    table = PAGE.read_text(encoding="utf-8").split("\n## Numerics\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == ["component", "reference", "largest difference"]
    return {(component, reference): float(difference.split()[0]) for component, reference, difference in rows[1:]}


def test_the_table_has_every_component():
    assert list(stated()) == [(component, reference) for component, reference, _, _ in numerics.MEASURED]


@pytest.mark.slow
@pytest.mark.parametrize("row", numerics.MEASURED, ids=lambda row: row[0])
def test_no_component_differs_more_than_is_stated(row):
    """Twice that, as other processors sum in another order; nothing where it says 0."""
    component, reference, measure, _ = row
    assert measure() <= 2 * stated()[component, reference]
