"""Train image classifiers on data that may be poisoned: Backdoor Defense via Decoupling, distributed.

from data_prep import BadNets, ImageFolder, PrepareConfig
from dbd_dist import prepare, train, evaluate, report, open_run

dataset = prepare(PrepareConfig(source=ImageFolder(root=Path("images")), attack=BadNets()))
run = train("cifar10_cpu", data=dataset.folder, settings={"simclr.epochs": 20})
print(run.result["clean_acc"], run.result["asr"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.pipeline import prepare
    from dbd_dist.api import evaluate, open_run, report, train

__version__ = "0.2.0"
__all__ = ["__version__", "evaluate", "open_run", "prepare", "report", "train"]


def __getattr__(name: str) -> Any:
    # on demand: importing a part of the package must neither load torch nor bring the truth within reach
    if name == "prepare":
        from data_prep.pipeline import prepare

        return prepare
    if name in __all__:
        from dbd_dist import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
