"""Defences and baselines, one a file: each a list of stages. A new one is a file here and a line below."""

from data_prep.registry import Registry
from dbd_dist.methods.abl import AntiBackdoorLearning
from dbd_dist.methods.activation_clustering import ActivationClustering
from dbd_dist.methods.dbd import DBD
from dbd_dist.methods.method import Method
from dbd_dist.methods.nc import NeuralCleanse
from dbd_dist.methods.none import NoDefense
from dbd_dist.methods.robust import RobustDBD
from dbd_dist.methods.spectral import SpectralSignatures

METHODS: Registry[type[Method]] = Registry(
    "methods",
    {
        method.name: method
        for method in (
            DBD,
            NoDefense,
            SpectralSignatures,
            ActivationClustering,
            AntiBackdoorLearning,
            NeuralCleanse,
            RobustDBD,
        )
    },
    base=Method,
    needs=("name", "title", "stages"),
)

__all__ = ["DBD", "METHODS", "Method", "NoDefense", "RobustDBD"]
