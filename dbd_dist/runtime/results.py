"""What a finished run leaves behind: its exports, tables and result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data_prep.dataset.manifest import Dataset
from dbd_dist import seeds
from dbd_dist.config import TrainConfig
from dbd_dist.data.sampling import rank_slice
from dbd_dist.evaluation.evaluator import FORWARD_BATCH, EvalResult, Evaluator, pooled_features
from dbd_dist.runtime.checkpoint import retry_on_oserror
from dbd_dist.runtime.keys import method_hash
from dbd_dist.runtime.machine import describe
from dbd_dist.runtime.run_folder import RunFolder
from dbd_dist.stages.context import Context
from dbd_dist.stages.flagged import Flagged
from dbd_dist.stages.mixmatch import renew
from dbd_dist.stages.split import Split
from dbd_dist.stages.warmup import Warmup

FEATURE_SAMPLES = 2000
NEIGHBOUR_SAMPLES = 20_000
"""Training images, drawn at random, among which neighbours are looked for."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Writes what a run leaves; rank 0 alone calls it, but for `measure`."""

    config: TrainConfig
    dataset: Dataset
    folder: RunFolder
    context: Context
    evaluator: Evaluator

    def write(self, write: Callable[[], None]) -> None:
        """Call `write`, again while the storage fails.

        Raises:
            UserError: see `retry_on_oserror`.
        """
        retry_on_oserror(write, self.folder.path, self.config.compute.patience_s)

    def backbone(self, state: dict[str, Any]) -> None:
        """Export the self-supervised backbone."""
        self.write(lambda: self.folder.write_backbone(state, self.config, self.dataset, self.config.normalise))

    def measure(self, given: dict[str, Any]) -> EvalResult:
        """Measure the finished model; every rank takes part."""
        model = self.context.classifier("result")
        model.load_state_dict(given["model"])
        model.to(self.context.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self.evaluator.measure(self.config.method.at_test_time(model))

    def judge_features(self, given: dict[str, Any]) -> dict[str, Any] | None:
        """How the features group images, of the self-supervised backbone where there is one, else of the model; every
        rank takes part. None where the truth is not known."""
        if not self.evaluator.knows_truth:
            return None
        world, images = self.context.world, self.context.images
        backbone, kind = self._feature_backbone(given)
        chosen = torch.randperm(len(images), generator=seeds.generator(self.config.seed, "neighbours"))
        positions = chosen[:NEIGHBOUR_SAMPLES].sort().values
        mine = positions[rank_slice(len(positions), world.rank, world.size)]
        parts = [
            pooled_features(backbone, pixels, self.config.normalise)
            for pixels in images.batches(mine.split(FORWARD_BATCH))
        ]
        features = world.gather(torch.cat(parts).to(world.device)).cpu()
        return {"kind": kind, **self.evaluator.judge_features(backbone, features, positions, images.labels.cpu())}

    def rank_samples(self, given: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """The split that the warm-up's loss would make, of methods that end with the warm-up and split nothing: the
        comparison of losses of Huang et al. (ICLR 2022, sec. 5.3). It is the first split that DBD with this warm-up
        makes. Every rank takes part. None of other methods."""
        last = self.config.method.trained()[-1]
        if not isinstance(last, Warmup) or "split" in given:
            return None
        model = self.context.classifier("result")
        model.load_state_dict(given["model"])
        model = self.context.prepare(model)
        return renew({}, Split(augment=last.augment), given["sample_loss"], model, self.context, 1)

    def _feature_backbone(self, given: dict[str, Any]) -> tuple[nn.Module, str]:
        """The network whose features are looked at, and its kind."""
        model = self.context.classifier("features")
        if "backbone" in given:
            model.backbone.load_state_dict(given["backbone"])
        else:
            model.load_state_dict(given["model"])
        model.to(self.context.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.backbone, "ssl" if "backbone" in given else "supervised"

    def finish(
        self,
        given: dict[str, Any],
        measured: EvalResult,
        features: dict[str, Any] | None,
        ranking: dict[str, torch.Tensor] | None,
    ) -> None:
        """Write the model, the tables and, last, the result.

        Args:
            given: what the stages gave, by name.
            features: how they group images, see `judge_features`.
            ranking: see `rank_samples`.
        """
        split = given.get("split")
        if split is not None:
            self.write(lambda: self.folder.write_split(split))
        if ranking is not None:
            self.write(lambda: self.folder.write_ranking(ranking))
        flagged = given.get("flagged")
        if flagged is not None:
            self.write(lambda: self.folder.write_flagged(flagged))
            if "triggers" in given:
                self.write(lambda: self.folder.write_triggers(given["triggers"], flagged))
        self._write_features(given)
        self.write(lambda: self.folder.write_model(given["model"], self.config, self.dataset, self.config.normalise))
        result = self._result(split, flagged, given.get("measures", {}), measured)
        result |= self._judged(split, features, ranking)
        self.write(self.folder.write_rows)
        self.folder.curve_of_result(result)
        self.write(lambda: self.folder.write_result(result))

    def _write_features(self, given: dict[str, Any]) -> None:
        """Penultimate features of some images: of the self-supervised backbone where there is one, else the model's."""
        images = self.context.images
        backbone, kind = self._feature_backbone(given)
        chosen = seeds.generator(self.config.seed, "features")
        positions = torch.randperm(len(images), generator=chosen)[:FEATURE_SAMPLES].sort().values
        pixels = next(iter(images.batches([positions])))
        pooled = pooled_features(backbone, pixels, self.config.normalise)
        self.write(lambda: self.folder.write_features(positions, pooled, kind))

    def _judged(
        self,
        split: dict[str, Any] | None,
        features: dict[str, Any] | None,
        ranking: dict[str, torch.Tensor] | None,
    ) -> dict[str, Any]:
        """What the truth says about the split, the features and the model after the warm-up."""
        found: dict[str, Any] = {}
        if split is None and ranking is not None and self.evaluator.knows_truth:
            split = {name: ranking[name] for name in ("first_loss", "first_kept")}  # there is no last one
        if split is not None:
            found["split_quality"] = self.evaluator.judge_split(split, self.context.images.labels.cpu())
        if features is not None:
            found["feature_quality"] = features
        after = [row for row in self.folder.rows(Warmup.name) if "clean_acc" in row]
        if after:
            found["after_warmup"] = {name: after[-1].get(name) for name in ("clean_acc", "asr", "robust_acc")}
        return found

    def _result(
        self,
        split: dict[str, Any] | None,
        flagged: Flagged | None,
        measures: dict[str, Any],
        measured: EvalResult,
    ) -> dict[str, Any]:
        config, manifest, images = self.config, self.dataset.manifest, self.context.images
        nothing = torch.zeros(len(images), dtype=torch.bool)
        counts = self.evaluator.count_kept(nothing if split is None else split["kept"])
        if split is None:
            counts |= {"kept": None, "kept_poisoned": None}
        stages = [stage.name for stage in config.method.trained()]
        return {
            "method": config.method.name,
            "defends": config.method.defends,
            "needs_clean": config.method.needs_clean,
            "changes_input": config.method.changes_input,
            "titles": config.method.titles(),
            "preset": config.preset,
            "dataset": manifest.name,
            "data_hash": manifest.data_hash,
            "attack": manifest.attack["kind"],
            "seed": config.seed,
            **dataclasses.asdict(measured),
            **counts,
            **({} if flagged is None else {"flagged": self.evaluator.count_flagged(flagged, images.labels.cpu())}),
            **({"measures": measures} if measures else {}),
            "train_size": len(images),
            "seconds": {s: round(sum(r["time_s"] for r in self.folder.rows(s)), 2) for s in stages},
            "images": {s: count for s in stages if (count := self._images(s))},
            "reused_stages": [s for s in stages if any(r.get("reused") for r in self.folder.rows(s))],
            "config_hash": method_hash(config),
            **describe(self.context.world, config, self.context.bf16),
        }

    def _images(self, stage: str) -> int:
        """How many images a stage trained on, each as often as it was drawn; 0 of stages that count none."""
        rows = self.folder.rows(stage)
        return round(sum(row["images_per_s"] * row["time_s"] for row in rows if "images_per_s" in row))
