"""Networks of PyTorch Image Models (timm, Wightman 2019), an optional extra: ``pip install 'dbd-dist[timm]'``."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import UserError

WHERE = "model.backbone"


@dataclass(frozen=True, kw_only=True)
class Timm:
    """Any network of timm by its name there, randomly initialised, with its head replaced by average pooling.

    Weights come from a file (``--model.weights``); nothing is downloaded.
    """

    variant: str
    """timm's name of the network."""

    def __post_init__(self):
        timm = _timm()
        if not timm.is_model(self.variant):  # a name with a prefix such as hf-hub: is none, so nothing is downloaded
            near = difflib.get_close_matches(self.variant, timm.list_models(), n=3)
            raise UserError(
                f"timm has no network {self.variant!r}",
                where=WHERE,
                expected="timm:NAME, with a name of timm.list_models()",
                hint=f"did you mean {' or '.join(near)}" if near else None,
            )

    @property
    def feature_dim(self) -> int:
        return _sizes(self.variant)[0]

    @property
    def min_image_px(self) -> int:
        return _sizes(self.variant)[1]

    @property
    def max_image_px(self) -> int | None:
        """Networks with embeddings of positions take images of one size; None for all others."""
        return _sizes(self.variant)[2]

    def build(self) -> nn.Module:
        try:
            network = _timm().create_model(self.variant, pretrained=False, num_classes=0, global_pool="avg")
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"timm cannot build {self.variant} with average pooling ({reason})", where=WHERE) from error
        _separate_activations(network)
        return network


def _timm() -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError("timm is not installed", where=WHERE, hint="pip install 'dbd-dist[timm]'") from error
    return timm


@functools.cache
def _sizes(variant: str) -> tuple[int, int, int | None]:
    """Dimensions of the features, and the smallest and the largest image side, in px."""
    with torch.device("meta"):
        network: Any = Timm(variant=variant).build().eval()
        usual = network.pretrained_cfg["input_size"][-1]
        shape = network(torch.empty(1, 3, usual, usual)).shape
    if len(shape) != 2:
        raise UserError(f"the features of timm's {variant} have shape {tuple(shape)}", where=WHERE, expected="(B, D)")
    if network.pretrained_cfg.get("fixed_input_size"):
        return shape[1], usual, usual
    stages = getattr(network, "feature_info", None)
    return shape[1], 2 * stages[-1]["reduction"] if stages else usual, None


def _separate_activations(network: nn.Module) -> None:
    """Replace timm's batch norms that hold an activation: made synchronous, such a one would lose it."""
    from timm.layers.norm_act import BatchNormAct2d

    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNormAct2d):
                setattr(parent, name, _NormAct(child))


class _NormAct(nn.Module):
    """`BatchNormAct2d` in parts; its weights keep their names in state dicts."""

    def __init__(self, whole: Any):
        super().__init__()
        self.norm = nn.BatchNorm2d(
            whole.num_features, whole.eps, whole.momentum, whole.affine, whole.track_running_stats, device="meta"
        )
        self.norm.load_state_dict(whole.state_dict(), strict=False, assign=True)
        self.drop, self.act = whole.drop, whole.act
        self.register_state_dict_post_hook(self._shorten)
        self.register_load_state_dict_pre_hook(self._lengthen)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.norm(x)))

    @staticmethod
    def _shorten(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}norm.")]:
            state[prefix + name.removeprefix(f"{prefix}norm.")] = state.pop(name)

    @staticmethod
    def _lengthen(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if prefix + name in state:
                state[f"{prefix}norm.{name}"] = state.pop(prefix + name)
