"""The rules of docs/design.md about who may import what, read from the source: nothing is executed to find out.

Imports inside functions count like any other, and so does a module that is reached through others.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.dataset.manifest import open_dataset
from data_prep.dataset.truth import read_truth
from dbd_dist.data.loaders import ResidentImages, StreamedImages

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_prep", "cluster", "dbd_dist", "tune_spaces")

BELOW = {
    "data_prep": set(),
    "cluster": set(),
    "dbd_dist": {"data_prep", "cluster"},
    "tune_spaces": {"data_prep", "cluster", "dbd_dist"},
}
"""Which packages a package may import, besides itself."""

SHARED = ("data_prep.errors",)
"""Leaves of the leaves: what every package may import."""

ONLY_IN = {
    "ray": ("dbd_dist.launch.ray_train", "dbd_dist.launch.worker", "tune_spaces", "cluster"),
    "torch.distributed": ("dbd_dist.distributed",),
    "ffcv": ("data_prep.beton.ffcv",),
    "data_prep.dataset.truth": (
        "dbd_dist.evaluation.evaluator",
        "dbd_dist.reporting",
        "data_prep.pipeline",
        "data_prep.dataset.verify",
    ),
    "data_prep.dataset.verify": ("dbd_dist.commands.doctor",),  # it hands the truth to nobody, and nobody may ask it
    "pickle": (),
}
"""What may be imported in a few modules (or packages) only."""

TRUTH = "data_prep.dataset.truth"
TRAINING = (
    "dbd_dist.stages",
    "dbd_dist.methods",
    "dbd_dist.fields",
    "dbd_dist.data.augment",
    "dbd_dist.runtime.checkpoint",
    "dbd_dist.config",
    "dbd_dist.craft",
    "dbd_dist.data.loaders",
    "dbd_dist.losses",
    "dbd_dist.models",
    "dbd_dist.optim",
    "dbd_dist.runtime.progress",
    "dbd_dist.data.sampling",
    "dbd_dist.seeds",
    "dbd_dist.distributed.world",
)
"""What learns, or what learning is made of: it must not reach the truth on any path."""


@dataclass(frozen=True)
class Module:
    """A file of the project."""

    source: str
    is_package: bool = False


def within(name: str, parents: Iterable[str]) -> bool:
    """Is a module one of `parents`, or inside one?"""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def read_project() -> dict[str, Module]:
    """Every module of the project by its dotted name."""
    modules = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            modules[".".join(parts[:-1] if is_package else parts)] = Module(path.read_text(), is_package)
    return modules


@functools.cache
def imported(name: str, module: Module) -> frozenset[str]:
    """All dotted names that a module may be importing: ``from a import b`` names both a and a.b."""
    found: set[str] = set()
    for node in walk(ast.parse(module.source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")
                up = parents[: len(parents) - node.level + (1 if module.is_package else 0)]
                base = ".".join([*up, *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
        elif isinstance(node, ast.Attribute):  # torch.distributed.barrier() after a plain `import torch`
            chain: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                chain.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in ("torch", *PACKAGES):
                found.add(".".join([inner.id, *reversed(chain)]))
    for given in found & on_demand().keys():  # what a package hands out on demand, to those who name it
        found.add(on_demand()[given])
    return frozenset(found)


def walk(tree: ast.AST) -> Iterable[ast.AST]:
    """All nodes but those of blocks for type checkers only."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        typing_only = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        stack += node.orelse if typing_only else list(ast.iter_child_nodes(node))


@functools.cache
def on_demand() -> dict[str, str]:
    """Public names of the packages that are loaded when they are asked for: dotted name -> the module that has it."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        tree = ast.parse((ROOT / package / "__init__.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ON_DEMAND":
                found |= {f"{package}.{name}": module for name, module in ast.literal_eval(node.value).items()}
    return found


def loaded(name: str, modules: Mapping[str, Module]) -> set[str]:
    """The project's modules that importing `name` runs itself: those it names, and the packages that hold them."""
    found = set()
    for dotted in {*imported(name, modules[name]), name}:
        parts = dotted.split(".")
        found |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)} & modules.keys()
    return found - {name}


def path_to(
    start: str, goal: str, modules: Mapping[str, Module], known: dict[str, set[str]] | None = None
) -> list[str] | None:
    """A chain of imports from one module to another, or None.

    Args:
        known: what modules load, which is filled; for several searches among the same modules.
    """
    paths, seen, known = [[start]], {start}, {} if known is None else known
    for path in paths:  # grows while it is walked: breadth first
        if path[-1] == goal:
            return path
        if path[-1] not in known:
            known[path[-1]] = loaded(path[-1], modules)
        for following in sorted(known[path[-1]] - seen):
            seen.add(following)
            paths.append([*path, following])
    return None


def violations(modules: Mapping[str, Module]) -> list[str]:
    """What breaks the rules, a line each."""
    found, known = [], {}
    for name, module in modules.items():
        mine, names = name.split(".")[0], imported(name, module)
        for other in sorted(
            {n.split(".")[0] for n in names if not within(n, SHARED)} & set(PACKAGES) - {mine} - BELOW[mine]
        ):
            found.append(f"{name} imports {other}, which is not below it")
        for restricted, where in ONLY_IN.items():
            if any(within(n, [restricted]) for n in names) and not within(name, where) and name != restricted:
                found.append(f"{name} imports {restricted}")
        if within(name, TRAINING):
            path = path_to(name, TRUTH, modules, known)
            if path is not None:
                found.append(f"{name} reaches the truth: {' -> '.join(path)}")
            if '"truth.parquet"' in module.source:
                found.append(f"{name} names the file of the truth")
    return found


def test_project_keeps_the_rules():
    modules = read_project()
    assert len(modules) > 50  # the files were found
    assert all(any(within(name, [root]) for name in modules) for root in TRAINING)
    assert violations(modules) == []


def test_paths_are_followed_through_the_real_project():
    """The search finds the way that is allowed, so that its finding none elsewhere says something."""
    modules = read_project()
    assert path_to("dbd_dist.runtime.runner", TRUTH, modules) == [
        "dbd_dist.runtime.runner",
        "dbd_dist.evaluation.evaluator",
        TRUTH,
    ]
    assert path_to("tune_spaces.cli", TRUTH, modules) is not None
    assert path_to("dbd_dist.stages.mixmatch", "dbd_dist.stages.warmup", modules) is not None
    assert path_to("data_prep.dataset.manifest", "dbd_dist.config", modules) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "line", "expected"),
    [
        (
            "dbd_dist.stages.simclr",
            "from data_prep.dataset.truth import read_truth",
            "dbd_dist.stages.simclr imports data_prep",
        ),
        ("dbd_dist.stages.split", "import data_prep.dataset.truth as t", "dbd_dist.stages.split reaches the truth"),
        ("dbd_dist.losses", "from data_prep.dataset import truth", "dbd_dist.losses imports data_prep.dataset.truth"),
        (
            "dbd_dist.losses",
            "def f():\n    from data_prep.dataset import truth",
            "dbd_dist.stages.simclr reaches the truth",
        ),
        (
            "dbd_dist.data.loaders",
            "from dbd_dist.evaluation import evaluator",
            "dbd_dist.stages.context reaches the truth",
        ),
        ("dbd_dist.seeds", "from . import api", "dbd_dist.data.sampling reaches the truth"),
        (
            "dbd_dist.stages",
            "import dbd_dist.evaluation.evaluator",
            "dbd_dist.stages.warmup reaches the truth",
        ),  # the __init__
        (
            "dbd_dist.models.resnet",
            'importlib.import_module("data_prep.dataset.truth")',
            "dbd_dist.models.resnet reaches the truth",
        ),
        ("dbd_dist.data.loaders", 'x = "truth.parquet"', "dbd_dist.data.loaders names the file of the truth"),
        ("dbd_dist.losses", "from dbd_dist import prepare", "dbd_dist.losses reaches the truth"),
        ("dbd_dist.losses", "import dbd_dist\nx = dbd_dist.train", "dbd_dist.losses reaches the truth"),
        ("dbd_dist.runtime.runner", "def f():\n    import ray.train", "dbd_dist.runtime.runner imports ray"),
        ("dbd_dist.losses", "import torch.distributed as dist", "dbd_dist.losses imports torch.distributed"),
        ("dbd_dist.losses", "from torch import distributed", "dbd_dist.losses imports torch.distributed"),
        (
            "dbd_dist.data.loaders",
            "import data_prep.dataset.verify",
            "dbd_dist.data.loaders imports data_prep.dataset.verify",
        ),
        (
            "dbd_dist.data.loaders",
            "from data_prep.dataset.verify import read_truth",
            "dbd_dist.stages.simclr reaches the truth",
        ),
        ("data_prep.artefacts", "import pickle", "data_prep.artefacts imports pickle"),
        ("dbd_dist.losses", "torch.distributed.barrier()", "dbd_dist.losses imports torch.distributed"),
        ("dbd_dist.data.loaders", "from ffcv.loader import Loader", "dbd_dist.data.loaders imports ffcv"),
        ("data_prep.images", "from dbd_dist.config import digest", "data_prep.images imports dbd_dist"),
        ("cluster.check", "from data_prep.images import probe", "cluster.check imports data_prep"),
        ("dbd_dist.launch.ray_train", "import tune_spaces.sweep", "dbd_dist.launch.ray_train imports tune_spaces"),
    ],
)
def test_planted_violations_are_caught(where, line, expected):
    modules = read_project()
    if where == "dbd_dist.seeds":  # seeds is a root itself: only those that import it show that paths are followed
        modules["dbd_dist.data.sampling"] = Module(
            modules["dbd_dist.data.sampling"].source + "\nfrom dbd_dist import seeds\n"
        )
    modules[where] = Module(f"{modules[where].source}\n{line}\n", modules[where].is_package)
    assert any(found.startswith(expected) for found in violations(modules)), violations(modules)


def test_names_that_only_look_alike_are_no_violation():
    modules = read_project()
    modules["dbd_dist.losses"] = Module(modules["dbd_dist.losses"].source + "\nimport rayleigh, data_preparation\n")
    assert violations(modules) == []


# -- the objects that training holds


def held(thing: object, seen: set[int]) -> Iterable[np.ndarray]:
    """Every tensor and array that an object of ours holds, at any depth."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing.numpy()
    elif isinstance(thing, np.ndarray):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from held(value, seen)
    elif type(thing).__module__.split(".")[0] in PACKAGES:
        yield from held(vars(thing), seen)


@pytest.mark.parametrize("kind", [ResidentImages, StreamedImages])
def test_training_images_know_given_labels_only(kind, digits):
    dataset = open_dataset(digits)
    truth = read_truth(digits)["train"]
    images = (kind.read if kind is ResidentImages else kind.open)(dataset, torch.device("cpu"))
    assert {name for name in dir(images) if not name.startswith("_")} - {"read", "open"} == {"labels", "batches"}

    given = images.labels.numpy()
    assert truth.poisoned.sum() == 24
    assert (given[truth.poisoned] == dataset.manifest.target).all()
    assert not np.array_equal(given, truth.true_label)
    np.testing.assert_array_equal(given[~truth.poisoned], truth.true_label[~truth.poisoned])

    arrays = list(held(images, set()))
    assert any(np.array_equal(array, given) for array in arrays)
    for array in arrays:
        if array.shape == given.shape:
            assert not np.array_equal(array, truth.true_label)
            assert not np.array_equal(array.astype(bool), truth.poisoned)


# -- sizes and cycles


def test_no_cycle_between_files():
    modules = read_project()
    below = {name: (imported(name, modules[name]) & modules.keys()) - {name} for name in modules}

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        stack = [start]
        while stack:
            new = below[stack.pop()] - found
            found |= new
            stack += new
        return found

    assert [name for name in modules if name in reached(name)] == []


def test_files_and_functions_fit_on_a_few_screens():
    for name, module in read_project().items():
        assert module.source.count("\n") <= 400, name
        for node in ast.walk(ast.parse(module.source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"
