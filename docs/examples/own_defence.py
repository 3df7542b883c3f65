"""My own defence: ShrinkPad (Li et al. 2021, arXiv 2104.02361) as a method, compared with training without defence.

A method is a frozen dataclass whose fields are its stages. This one trains as usual, and shrinks and pads every image
at test time, so that a trigger is not where the model learned it. docs/extending.md adds a stage of its own too.
The preset "smoke" learns nothing: for results take "demo" or another preset.
"""

# %%
from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from dbd_dist import report, train
from dbd_dist.methods import METHODS, Method
from dbd_dist.stages import Supervised


# %%
class Shrunk(nn.Module):
    """A classifier that sees every image smaller, with a border of the mean colour."""

    def __init__(self, model: nn.Module, border_px: int):
        super().__init__()
        self.model, self.border_px = model, border_px

    def forward(self, images_BCHW: Tensor) -> Tensor:
        side = images_BCHW.shape[-1] - 2 * self.border_px
        small = F.interpolate(images_BCHW, size=(side, side), mode="bilinear", antialias=True)
        return self.model(F.pad(small, [self.border_px] * 4))


@dataclass(frozen=True, kw_only=True)
class ShrinkPad(Method):
    """Plain training; images shrunk and padded at test time."""

    name: ClassVar[str] = "shrink-pad"
    title: ClassVar[str] = "ShrinkPad"

    supervised: Supervised = field(default_factory=Supervised)

    def at_test_time(self, model: nn.Module) -> nn.Module:
        return Shrunk(model, border_px=2)


# %% known by its name from here on; a package of yours names it as an entry point instead
METHODS.add(ShrinkPad.name, ShrinkPad)

# %% the preset has its own data set, digits under BadNets, and the settings of the stage
settings = {"compute.workers": None, "compute.threads": 1}
runs = [train("smoke", method=name, settings=settings) for name in ("none", ShrinkPad.name)]

# %%
print(report(runs, out="report.html"))
