"""Parts of training, one a file: settings and loop together. A new one is a file here and a line below."""

from data_prep.registry import Registry
from dbd_dist.stages.mixmatch import MixMatch
from dbd_dist.stages.simclr import SimCLR
from dbd_dist.stages.split import Split
from dbd_dist.stages.stage import Stage
from dbd_dist.stages.supervised import Supervised
from dbd_dist.stages.warmup import Warmup

STAGES: Registry[type[Stage]] = Registry(
    "stages",
    {stage.name: stage for stage in (SimCLR, Warmup, Split, MixMatch, Supervised)},
    base=Stage,
    needs=("name", "title", "gives"),
)

__all__ = ["STAGES", "MixMatch", "SimCLR", "Split", "Stage", "Supervised", "Warmup"]
