"""Networks that runs export: weights, and what is needed to rebuild the network and to normalise its input.

A run folder has model.safetensors with model.json, a classifier, and where the method is dbd backbone.safetensors with
backbone.json, the self-supervised backbone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.hashes import sha256_file
from dbd_dist.config import from_dict
from dbd_dist.models import Backbone, Classifier, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The description of an exported network; its weights are read by `build`."""

    weights: Path
    sha256: str
    """Of the weights' file."""
    network: ModelConfig
    class_names: tuple[str, ...] | None
    """None for a backbone."""
    image_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of the channels, for pixels in 0-1."""

    def build(self, device: torch.device) -> nn.Module:
        """The network in eval mode, its weights frozen: a Classifier, or a Backbone where there are no classes.

        Raises:
            UserError: the weights are damaged, or another network's.
        """
        if self.class_names is None:
            model: nn.Module = Backbone(self.network)
        else:
            model = Classifier(self.network, len(self.class_names))
        try:
            model.load_state_dict(load_file(str(self.weights)))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise UserError(
                f"not the weights of this network ({str(error).splitlines()[0]})", where=self.weights
            ) from error
        model.requires_grad_(False).eval()
        return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def inputs(self, grey_BCHW: Tensor) -> Tensor:
        """Network inputs of float images in grey levels 0-255, as in training; gradients flow through."""
        mean, std = (torch.tensor(v, device=grey_BCHW.device)[:, None, None] for v in (self.mean, self.std))
        return (grey_BCHW / 255 - mean) / std


def read_exported(weights: Path) -> Exported:
    """Read the description beside a file of weights: X.json beside X.safetensors.

    Raises:
        UserError: one of the files is missing, or the description is none.
    """
    description = weights.with_suffix(".json")
    for path in (description, weights):
        if not path.is_file():
            raise UserError("there is no such file", where=path, allowed="a network that a finished run exported")
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        names = content.get("class_names")
        return Exported(
            weights=weights,
            sha256=sha256_file(weights),
            network=from_dict(ModelConfig, content["network"], where=f"{description}: network"),
            class_names=None if names is None else tuple(str(name) for name in names),
            image_px=int(content["image_px"]),
            mean=_rgb(content["mean"]),
            std=_rgb(content["std"]),
        )
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=description) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"not the description of a network ({error})", where=description) from error


def _rgb(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue
