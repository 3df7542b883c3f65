"""Changing single fields of frozen configurations by dotted names, as a search does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_prep.errors import UserError
from dbd_dist.config import TrainConfig, from_dict, to_dict


def override(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`config` with some fields replaced: ``override(config, {"split.keep": 0.4})``. Checked like any configuration.

    Raises:
        UserError: there is no such field, or the value is not allowed.
    """
    backbone = values.get("model.backbone")
    if isinstance(backbone, str):  # a preset's depths are those of its own backbone
        config = dataclasses.replace(config, model=config.model.with_backbone(backbone))
    content = to_dict(config, every_field=True)
    for dotted, value in values.items():
        place = content
        *parents, last = dotted.split(".")
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise UserError(
                "there is no such field",
                where=dotted,
                expected=", ".join(field.name for field in dataclasses.fields(config)) + ", each with its own fields",
            )
        place[last] = value
    return from_dict(TrainConfig, content)
