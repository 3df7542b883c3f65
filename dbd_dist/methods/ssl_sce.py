"""Self-supervised backbone and a head trained with SCE on everything: an ablation of Huang et al. (ICLR 2022, arXiv
2202.03423, sec. 5.3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from data_prep.errors import UserError
from dbd_dist.methods.method import Method
from dbd_dist.stages import SimCLR, Warmup


@dataclass(frozen=True, kw_only=True)
class SSLWithSCE(Method):
    """The first two stages of DBD: decoupling alone, with the loss that is robust to noise."""

    name: ClassVar[str] = "ssl-sce"
    title: ClassVar[str] = "SSL + SCE"

    simclr: SimCLR = field(default_factory=SimCLR)
    warmup: Warmup = field(default_factory=Warmup)

    def __post_init__(self):
        super().__post_init__()
        check_loss(self.warmup, "sce", self.name)


def check_loss(warmup: Warmup, loss: str, method: str) -> None:
    """Refuse the loss of another ablation.

    Raises:
        UserError
    """
    if warmup.loss != loss:
        raise UserError(f"{method} trains the head with {loss}, not {warmup.loss}", where="warmup.loss", expected=loss)
