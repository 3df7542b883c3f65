"""Defences and baselines, one a file: each a list of stages. A new one is a file here and a line below."""

from data_prep.registry import Registry
from dbd_dist.methods.abl import AntiBackdoorLearning
from dbd_dist.methods.activation_clustering import ActivationClustering
from dbd_dist.methods.dbd import DBD
from dbd_dist.methods.dbd_no_ssl import DBDNoSSL
from dbd_dist.methods.dbd_robust import RobustDBD
from dbd_dist.methods.dpsgd import DPSGD
from dbd_dist.methods.method import Method
from dbd_dist.methods.nad import NAD
from dbd_dist.methods.nc import NeuralCleanse
from dbd_dist.methods.none import NoDefense
from dbd_dist.methods.shrinkpad import ShrinkPad
from dbd_dist.methods.spectral import SpectralSignatures
from dbd_dist.methods.ssl_ce import SSLWithCE
from dbd_dist.methods.ssl_sce import SSLWithSCE
from dbd_dist.methods.ssl_sce_tuned import SSLWithSCETuned

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
            NAD,
            DPSGD,
            ShrinkPad,
            DBDNoSSL,
            SSLWithCE,
            SSLWithSCE,
            SSLWithSCETuned,
        )
    },
    base=Method,
    needs=("name", "title", "stages"),
)

__all__ = ["DBD", "METHODS", "Method", "NoDefense", "RobustDBD"]
