"""Quirks of the article's released code that flags can switch on, one a row: what each of them costs.

Facts about the code from docs/method.md, which also lists the quirks that no flag switches on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PRETRAINING: Mapping[str, tuple[str, ...]] = {
    # epoch 100 of a schedule of 1000: the learning rate is hardly annealed
    "cut-schedule": ("--simclr.schedule-epochs", "1000"),
    "one-sided-loss": ("--simclr.symmetric", "False"),
    "unbounded-blur": ("--simclr.augment.blur-p", "0.5", "--simclr.augment.blur-kernel", "full"),
}
_LATER: Mapping[str, tuple[str, ...]] = {
    "drifting-batch-norm": ("--warmup.freeze-batch-norm", "False"),
    "constant-rate": ("--mixmatch.lr-schedule", "constant"),
    "continued-adam": ("--mixmatch.continue-optimizer", "True"),
}
_ALL = tuple(flag for flags in (*_PRETRAINING.values(), *_LATER.values()) for flag in flags)

# on w workers the released gradient is that of the whole batch over w, which for SGD is a w-th of the rate with w times
# the weight decay: here of the presets' 0.4 and 1e-4
_TWO_WORKERS = ("--simclr.lr", "0.2", "--simclr.weight-decay", "2e-4")


def _row(name: str, flags: tuple[str, ...], method: str = "dbd") -> dict[str, Any]:
    return {"name": name, "method": method, "flags": list(flags)}


ROWS: tuple[str | Mapping[str, Any], ...] = (
    "none",
    _row("black-padding", ("--supervised.augment.padding", "zeros"), "none"),
    "dbd",
    _row("cut-schedule", _PRETRAINING["cut-schedule"]),
    _row("one-sided-loss", _PRETRAINING["one-sided-loss"]),
    # the digits' preset has no blur: SimCLR's own tells what the missing bound does from what blurring does
    _row("simclr-blur", ("--simclr.augment.blur-p", "0.5")),
    _row("unbounded-blur", _PRETRAINING["unbounded-blur"]),
    _row("gradient-of-two-workers", _TWO_WORKERS),
    *(_row(name, flags) for name, flags in _LATER.items()),
    _row("all", _ALL),
)
"""Methods of the table, as a table file has them; `all` is what a single worker of the released code does."""

CASES = ("badnets", "badnets-coin", "blended")
"""The coin for each image is a quirk too, of the data set."""
