"""Images in, dataset folder out: poisoned where an attack says so, in the format that FFCV reads.

from data_prep import BadNets, ImageFolder, PrepareConfig, prepare

dataset = prepare(PrepareConfig(source=ImageFolder(root=Path("images")), attack=BadNets()))
print(dataset.folder, dataset.manifest.poisoned)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.attacks import ATTACKS, Attack
    from data_prep.config import PrepareConfig
    from data_prep.dataset.manifest import open_dataset
    from data_prep.errors import UserError
    from data_prep.pipeline import prepare
    from data_prep.sources import SOURCES, Source

__all__ = ["ATTACKS", "SOURCES", "Attack", "PrepareConfig", "Source", "UserError", "open_dataset", "prepare"]

ON_DEMAND = {
    "ATTACKS": "data_prep.attacks",
    "Attack": "data_prep.attacks",
    "PrepareConfig": "data_prep.config",
    "SOURCES": "data_prep.sources",
    "Source": "data_prep.sources",
    "UserError": "data_prep.errors",
    "open_dataset": "data_prep.dataset.manifest",
    "prepare": "data_prep.pipeline",
}
"""Where the public names are; loaded when they are asked for, so that importing a part of the package stays light."""
_PARTS = ("data_prep.attacks", "data_prep.sources")
"""Their public names are public here too: every attack and source."""


def __getattr__(name: str) -> Any:
    if name in ON_DEMAND:
        return getattr(importlib.import_module(ON_DEMAND[name]), name)
    for package in _PARTS if name[:1].isupper() else ():
        module = importlib.import_module(package)
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
