"""Weights that a user gives: `ModelConfig.weights`, for the backbone to start from.

The file is safetensors, or what ``torch.save`` wrote of a state dict; it is read with ``weights_only``, so that nothing
in it runs. Which tensors count, and the hash over them, depend on names and values alone: the same weights in another
file, format or place give the same hash.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.io.limits import refuse_pipes
from dbd_dist.fields import digest, to_dict
from dbd_dist.models import OWN
from dbd_dist.models.config import ModelConfig

MAX_BYTES = 8 << 30
NAMED = 10
"""Tensors of each kind that a message names."""
WRAPPERS = ("state_dict", "model", "backbone")
"""Keys under which training programs keep a state dict."""
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.")
"""What DistributedDataParallel, torch.compile and self-supervised training put before the backbone's names."""
HEADS = ("fc", "head", "linear", "classifier", "projection", "projection_head", "projector")
"""First parts of the names of heads: what is not the backbone's, and may be left out."""


@dataclass(frozen=True, kw_only=True)
class GivenWeights:
    """A backbone's state dict."""

    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...]
    """Names of tensors in the file that belong to heads, or to parts beside the backbone."""


def read_given(config: ModelConfig) -> GivenWeights:
    """Read `config.weights` and hold them against the backbone.

    Raises:
        UserError: the file is none of weights, or of another backbone, or holds values that are not finite.
    """
    assert config.weights is not None
    path = config.weights
    with torch.device("meta"):
        wanted = config.build_backbone().state_dict()
    found, left_out = _select(_read(path), wanted.keys())
    _check_names(path, config.backbone, wanted, found)
    tensors = {}
    for name, like in wanted.items():
        if name not in found:  # counts of batches, which weights from before PyTorch 0.4.1 lack
            tensors[name] = torch.zeros(like.shape, dtype=like.dtype)
            continue
        value = found[name]
        if value.is_floating_point() != like.is_floating_point() or value.is_complex():
            raise UserError(f"{name} is {value.dtype}, and has to be {like.dtype}", where=path)
        tensors[name] = value.to(like.dtype).contiguous()
        if like.is_floating_point() and not tensors[name].isfinite().all():
            raise UserError(f"the weights {name} are not finite in {like.dtype}", where=path)
    return GivenWeights(tensors=tensors, left_out=left_out)


def load_backbone_weights(config: ModelConfig, backbone: nn.Module) -> None:
    """Give `backbone`, as `config` builds it, the weights of `config.weights`; nothing where none are given.

    Raises:
        UserError: as `read_given`.
    """
    if config.weights is not None:
        backbone.load_state_dict(dict(read_given(config).tensors))


def weights_digest(config: ModelConfig) -> str | None:
    """Hex sha256 over the given weights that the backbone takes; None where none are given.

    Raises:
        UserError: as `read_given`.
    """
    if config.weights is None:
        return None
    try:
        stat = config.weights.stat()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=config.weights) from error
    return _digest(config, stat.st_size, stat.st_mtime_ns)[0]


def check_weights(config: ModelConfig) -> None:
    """Refuse weights that do not fit, before anything else is done; a line on stderr names what is left out of them.

    Raises:
        UserError: as `read_given`.
    """
    if weights_digest(config) is not None:
        assert config.weights is not None
        stat = config.weights.stat()
        left_out = _digest(config, stat.st_size, stat.st_mtime_ns)[1]
        if left_out:
            what = UserError(f"left out {_names(left_out)}, not part of the backbone", where=config.weights)
            print(f"note: {what}", file=sys.stderr)


def model_key(config: ModelConfig) -> dict[str, Any]:
    """What results depend on: the network as plain values, the hash of given weights in place of their path, and for a
    backbone of another package, whose code changes by itself, names and shapes of its tensors."""
    values = network_values(config)
    if config.weights is not None:
        values["weights"] = weights_digest(config)
    name = config.backbone.partition(":")[0]
    return values if name in OWN and name != "timm" else {**values, "tensors": _tensors(config)}


@functools.lru_cache(maxsize=8)
def _tensors(config: ModelConfig) -> str:
    with torch.device("meta"):
        state = config.build_backbone().state_dict()
    return digest([[name, str(value.dtype), list(value.shape)] for name, value in state.items()])


def network_values(config: ModelConfig) -> dict[str, Any]:
    """The network alone as plain values: what is needed to build it."""
    return {name: value for name, value in to_dict(config).items() if name != "weights"}


@functools.lru_cache(maxsize=8)
def _digest(config: ModelConfig, size: int, changed_ns: int) -> tuple[str, tuple[str, ...]]:
    """The hash, and what is left out; read again when the file's size or time of change differ."""
    given, total = read_given(config), hashlib.sha256()
    for name, value in sorted(given.tensors.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest(), given.left_out


def _read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its name."""
    expected = "safetensors, or a state dict that torch.save wrote"
    try:
        refuse_pipes(path)
        if path.stat().st_size > MAX_BYTES:
            raise UserError("too large for weights", where=path, expected=f"at most {MAX_BYTES} bytes")
        with path.open("rb") as file:
            start = file.read(9)
        content: Any = load_file(str(path)) if start[8:] == b"{" else _unpickled(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=path, expected=expected) from error
    except SafetensorError as error:
        raise UserError(f"not safetensors ({error})", where=path, expected=expected) from error
    except Exception as error:  # whatever torch.load raises at a file that is none of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"expected weights, got something else ({reason})", where=path, expected=expected) from error
    while True:
        inner = [content[key] for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
        if not inner:
            break
        content = inner[0]
    tensors = content if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(name, str) and _is_plain(value) for name, value in tensors.items()):
        raise UserError("holds no state dict", where=path, expected="tensors by name")
    return tensors


def _unpickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:  # torch.save does not compress
                raise ValueError("compressed")
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def _select(content: Mapping[str, Tensor], wanted: Iterable[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The backbone's tensors without prefixes, and the names of those that belong to something else."""
    wanted, found, left_out = set(wanted), dict(content), []
    own = {name.partition(".")[0] for name in wanted}
    prefixes = [prefix for prefix in PREFIXES if prefix[:-1] not in own]
    while prefix := next((p for p in prefixes if any(name.startswith(p) for name in found)), None):
        left_out += [name for name in found if not name.startswith(prefix)]
        found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    heads = [name for name in found if name not in wanted and name.partition(".")[0] in set(HEADS) - own]
    return {name: value for name, value in found.items() if name not in heads}, tuple(left_out + heads)


def _check_names(path: Path, backbone: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in wanted]
    shapes = [
        f"{name} {tuple(found[name].shape)} in place of {tuple(like.shape)}"
        for name, like in wanted.items()
        if name in found and found[name].shape != like.shape
    ]
    parts = [
        f"{what} {_names(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if parts:
        raise UserError(
            f"these are not weights of the backbone {backbone}: {'; '.join(parts)}",
            where=path,
            hint="use the --model.backbone, --model.stem and so on that they were trained with",
        )


def _names(names: Iterable[str]) -> str:
    """How many, and the first of them."""
    names = list(names)
    return f"{len(names)}: {', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''}"
