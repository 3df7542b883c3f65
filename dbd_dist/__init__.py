"""Train image classifiers on data that may be poisoned: Backdoor Defense via Decoupling, distributed.

from data_prep import BadNets, ImageFolder, PrepareConfig
from dbd_dist import prepare, train, evaluate, report, open_run

dataset = prepare(PrepareConfig(source=ImageFolder(root=Path("images")), attack=BadNets()))
run = train("cifar10_cpu", data=dataset.folder, settings={"simclr.epochs": 20})
print(run.result["clean_acc"], run.result["asr"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.pipeline import prepare
    from dbd_dist.api import evaluate, open_run, report, train

__version__ = "0.2.0"
__all__ = ["__version__", "evaluate", "open_run", "prepare", "report", "train"]


ON_DEMAND = {
    "prepare": "data_prep.pipeline",
    "train": "dbd_dist.api",
    "evaluate": "dbd_dist.api",
    "report": "dbd_dist.api",
    "open_run": "dbd_dist.api",
}
"""Where the public names are; loaded when they are asked for, so that importing a part of the package neither loads
torch nor brings the truth within reach."""


def __getattr__(name: str) -> Any:
    if name not in ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(ON_DEMAND[name]), name)
