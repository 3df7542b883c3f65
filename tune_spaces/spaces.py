"""Search spaces by name. A new one is a file beside this one and a line below."""

from __future__ import annotations

from dataclasses import replace

from data_prep.registry import Registry
from tune_spaces.filter import FILTER
from tune_spaces.sce import SCE
from tune_spaces.space import Space

SPACES: Registry[Space] = Registry(
    "spaces", {"sce": SCE, "filter": FILTER}, base=Space, needs=("grid", "shared_stage", "why")
)


def space(name: str, *, smoke: bool) -> Space:
    """The space of that name, or its smaller grid for a trial of the machinery.

    Raises:
        UserError: there is none.
    """
    found = SPACES.find(name, where="dbd tune")
    return replace(found, grid=found.smoke or found.grid) if smoke else found
