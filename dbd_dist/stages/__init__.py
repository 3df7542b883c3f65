"""Parts of training, one a file: settings and loop together. A new one is a file here and a line below."""

from data_prep.registry import Registry
from dbd_dist.stages.clustering import Clustering
from dbd_dist.stages.distillation import Distillation
from dbd_dist.stages.dpsgd import DPSGD
from dbd_dist.stages.finetuning import Finetuning
from dbd_dist.stages.inversion import Inversion
from dbd_dist.stages.isolation import Isolation
from dbd_dist.stages.mixmatch import MixMatch
from dbd_dist.stages.patching import Patching
from dbd_dist.stages.retrain import Retrain
from dbd_dist.stages.shrink import Shrink
from dbd_dist.stages.simclr import SimCLR
from dbd_dist.stages.spectral import Spectral
from dbd_dist.stages.split import Split
from dbd_dist.stages.stage import Stage
from dbd_dist.stages.supervised import Supervised
from dbd_dist.stages.teacher import Teacher
from dbd_dist.stages.tune import TuneHead
from dbd_dist.stages.uat import UniversalTraining
from dbd_dist.stages.unlearning import Unlearning
from dbd_dist.stages.warmup import SupervisedWarmup, Warmup

STAGES: Registry[type[Stage]] = Registry(
    "stages",
    {
        stage.name: stage
        for stage in (
            SimCLR,
            Warmup,
            Split,
            MixMatch,
            Supervised,
            Spectral,
            Clustering,
            Retrain,
            Isolation,
            Finetuning,
            Unlearning,
            Inversion,
            Patching,
            UniversalTraining,
            TuneHead,
            DPSGD,
            Shrink,
            Teacher,
            Distillation,
        )
    },
    base=Stage,
    needs=("name", "title", "gives"),
)

__all__ = [
    "DPSGD",
    "STAGES",
    "Clustering",
    "Distillation",
    "Finetuning",
    "Inversion",
    "Isolation",
    "MixMatch",
    "Patching",
    "Retrain",
    "Shrink",
    "SimCLR",
    "Spectral",
    "Split",
    "Stage",
    "Supervised",
    "SupervisedWarmup",
    "Teacher",
    "TuneHead",
    "UniversalTraining",
    "Unlearning",
    "Warmup",
]
