"""Defences and baselines, one a file: each a list of stages. A new one is a file here and a line below."""

from data_prep.registry import Registry
from dbd_dist.methods.dbd import DBD
from dbd_dist.methods.method import Method
from dbd_dist.methods.none import NoDefense

METHODS: Registry[type[Method]] = Registry(
    "methods",
    {method.name: method for method in (DBD, NoDefense)},
    base=Method,
    needs=("name", "title", "stages"),
)

__all__ = ["DBD", "METHODS", "Method", "NoDefense"]
