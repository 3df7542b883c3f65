"""Where images and labels come from. One source a file; a new one is one more line here."""

from data_prep.registry import Registry
from data_prep.sources.cifar10 import Cifar10
from data_prep.sources.digits import Digits
from data_prep.sources.hf import HuggingFace
from data_prep.sources.imagefolder import ImageFolder
from data_prep.sources.parquet import Parquet
from data_prep.sources.source import OpenSource, Source
from data_prep.sources.split import Split, in_memory

SOURCES: Registry[type[Source]] = Registry(
    "sources",
    {
        "digits": Digits,
        "cifar10": Cifar10,
        "imagefolder": ImageFolder,
        "parquet": Parquet,
        "hf": HuggingFace,
    },
    base=Source,
    needs=("name",),
)
"""Name -> class, as `dbd prepare NAME` has it."""

__all__ = [
    "SOURCES",
    "Cifar10",
    "Digits",
    "HuggingFace",
    "ImageFolder",
    "OpenSource",
    "Parquet",
    "Source",
    "Split",
    "in_memory",
]
