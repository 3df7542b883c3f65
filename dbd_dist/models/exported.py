"""Networks that runs export: weights, and what is needed to rebuild the network and to normalise its input.

A run folder has model.safetensors with model.json, a classifier, and where the method is dbd backbone.safetensors with
backbone.json, the self-supervised backbone. The description holds size and sha256 of the weights, and a checksum over
itself.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_prep.dataset.manifest import FileRecord
from data_prep.errors import UserError
from data_prep.io.hashes import sha256_file, sha256_json
from data_prep.io.json import read_json
from dbd_dist.fields import from_dict
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import Classifier

_FIELDS = {"network", "image_px", "input", "mean", "std"}
_SEALS = {"weights", "checksum"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The description of an exported network; its weights are read by `build`."""

    weights: Path
    sha256: str
    """Of the weights' file."""
    sealed: bool
    """The description holds the weights' sha256, and they have it. Those of early versions do not say."""
    network: ModelConfig
    class_names: tuple[str, ...] | None
    """None for a backbone."""
    image_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of the channels, for pixels in 0-1."""

    def build(self, device: torch.device) -> nn.Module:
        """The network in eval mode, its weights frozen: a Classifier, or a backbone where there are no classes.

        Raises:
            UserError: the weights are damaged, not finite, or another network's.
        """
        try:
            # copies: a view of a file that is truncated while it is in use would end the process
            state = {name: value.clone() for name, value in load_file(str(self.weights)).items()}
            with torch.device("meta"):  # takes no memory: a description can ask for any size, the file cannot
                if self.class_names is None:
                    model: nn.Module = self.network.build_backbone()
                else:
                    model = Classifier(self.network, len(self.class_names))
            for name, wanted in model.state_dict().items():
                if name in state and state[name].dtype != wanted.dtype:
                    raise RuntimeError(f"{name} is {state[name].dtype}, not {wanted.dtype}")
            model.load_state_dict(state, assign=True)
        except (SafetensorError, RuntimeError, OSError, ValueError, MemoryError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"not the weights of this network ({reason})", where=self.weights) from error
        for name, values in state.items():
            if values.is_floating_point() and not values.isfinite().all():
                raise UserError(f"the weights {name} are not finite", where=self.weights)
        model.requires_grad_(False).eval()
        return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def inputs(self, grey_BCHW: Tensor) -> Tensor:
        """Network inputs of float images in grey levels 0-255, as in training; gradients flow through."""
        mean, std = (torch.tensor(v, device=grey_BCHW.device)[:, None, None] for v in (self.mean, self.std))
        return (grey_BCHW / 255 - mean) / std


def read_exported(weights: Path) -> Exported:
    """Read the description beside a file of weights, X.json beside X.safetensors, and hold the weights against it.

    A description of an early version has no sha256 to hold them against; a line on stderr says so.

    Raises:
        UserError: one of the files is missing, the description is none or was edited, the weights are not those that
            it describes.
    """
    description = weights.with_suffix(".json")
    for path in (description, weights):
        if not path.is_file():
            raise UserError("there is no such file", where=path, expected="a network that a finished run exported")
    try:
        content = read_json(description)
        if not isinstance(content, dict) or set(content) - {"class_names"} - _SEALS != _FIELDS:
            raise ValueError(f"its fields are not {', '.join(sorted(_FIELDS))}")
        if set(content) & _SEALS not in (set(), _SEALS):
            raise ValueError("it has one of weights and checksum, not both")
        record = _unseal(content)
        names = content.get("class_names")
        if names is not None and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            raise TypeError("class_names is no list of strings")
        if not isinstance(content["image_px"], int) or not 1 <= content["image_px"] <= 65535:
            raise ValueError(f"image_px is {content['image_px']!r}, and has to be a whole number from 1 to 65535")
        network = from_dict(ModelConfig, content["network"], where=f"{description}: network")
        mean, std = _rgb(content["mean"]), _std(content["std"])
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=description) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"not the description of a network ({error})", where=description) from error
    return Exported(
        weights=weights,
        sha256=_check(weights, record),
        sealed=record is not None,
        network=network,
        class_names=None if names is None else tuple(names),
        image_px=content["image_px"],
        mean=mean,
        std=std,
    )


def _unseal(content: dict[str, Any]) -> FileRecord | None:
    """What the description says of the weights' file; None where it is too old to say."""
    if "checksum" not in content:
        return None
    checksum = content.pop("checksum")
    if sha256_json(content) != checksum:
        raise ValueError("edited since it was written: the checksum differs")
    record = FileRecord(**content["weights"])
    if not isinstance(record.bytes, int) or not isinstance(record.sha256, str):
        raise TypeError("weights: expected bytes (a number) and sha256 (text)")
    return record


def _check(weights: Path, record: FileRecord | None) -> str:
    """The file's sha256, which is that of the record."""
    again = "train again, or copy the run folder again"
    try:
        size, found = weights.stat().st_size, sha256_file(weights)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=weights) from error
    if record is None:
        old = UserError(
            "nothing vouches for these weights: their description is of an early version and holds no sha256 of them",
            where=weights,
        )
        print(f"note: {old}", file=sys.stderr)
    elif size != record.bytes:
        raise UserError(f"{size} bytes, the description says {record.bytes}: truncated", where=weights, hint=again)
    elif found != record.sha256:
        raise UserError("damaged: the sha256 is not that of the description", where=weights, hint=again)
    return found


def _rgb(values: list[float]) -> tuple[float, float, float]:
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise TypeError(f"expected a list of numbers, got {values!r}")
    red, green, blue = (float(v) for v in values)
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError(f"expected finite numbers, got {values}")
    return red, green, blue


def _std(values: list[float]) -> tuple[float, float, float]:
    if min(_rgb(values)) <= 0:
        raise ValueError(f"std is {values}, and has to be above 0")
    return _rgb(values)
