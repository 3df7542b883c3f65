"""Measuring a model and a split against the truth. Training code cannot import this module; only results flow out
of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.beton import read_beton
from data_prep.dataset.manifest import Dataset
from data_prep.dataset.truth import FILE as TRUTH_FILE
from data_prep.dataset.truth import read_truth
from data_prep.errors import UserError
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import rank_slice
from dbd_dist.distributed.world import World
from dbd_dist.evaluation.quality import auroc, feature_quality, most_suspect, share, split_quality
from dbd_dist.runtime.watchdog import beat
from dbd_dist.stages.flagged import Flagged

FORWARD_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """How a model does on the test images; shares in 0-1.

    ``asr`` (attack success rate) and ``robust_acc`` are taken over the triggered test images of the classes other
    than the target (all of them where every class aims at the next): the share that is called what the attacker wants,
    and the share that is still called what it is. ``asr_untriggered`` is what an attack success would be if the trigger
    did nothing: the share of the *clean* test images of those classes that is called what the attacker wants, by the
    mistakes that any model makes. None without an attack.
    """

    clean_acc: float
    per_class_acc: list[float]
    asr: float | None
    robust_acc: float | None
    asr_untriggered: float | None


class Evaluator:
    """Holds the test images and the truth of one data set, and examines models with them. Every rank takes part."""

    def __init__(self, dataset: Dataset, world: World, normalise: AugmentConfig, *, bf16: bool):
        self._world, self._normalise, self._bf16 = world, normalise, bf16
        manifest = dataset.manifest
        self._classes = manifest.num_classes
        self._manifest = manifest
        self._clean = self._read(dataset, "test")
        self._triggered = None if dataset.test_triggered is None else self._read(dataset, "test_triggered")
        self._poisoned = self._true = None
        if TRUTH_FILE in manifest.files:
            truth = read_truth(dataset.folder, sum(dataset.manifest.counts.values()))["train"]
            self._poisoned, self._true = (torch.from_numpy(v.copy()) for v in (truth.poisoned, truth.true_label))

    @property
    def knows_truth(self) -> bool:
        """Whether the data set says which samples are poisoned."""
        return self._poisoned is not None

    def _read(self, dataset: Dataset, split: str) -> tuple[Tensor, Tensor]:
        manifest, world = dataset.manifest, self._world
        images, labels, _ = read_beton(
            getattr(dataset, split), expect_count=manifest.counts[split], expect_px=manifest.image_px
        )
        mine = rank_slice(len(labels), world.rank, world.size)
        return torch.from_numpy(images[mine]).to(world.device), torch.from_numpy(labels[mine]).to(world.device)

    @torch.no_grad()
    def _predict(self, model: nn.Module, images_NHWC: Tensor) -> Tensor:
        """int64 (n,): the class of each image; -1 where a logit is not finite."""
        predictions = []
        for chunk in images_NHWC.split(FORWARD_BATCH):
            beat()
            with torch.autocast(chunk.device.type, dtype=torch.bfloat16, enabled=self._bf16):
                logits = model(augment.normalise(self._normalise, chunk.permute(0, 3, 1, 2)))
            predictions.append(logits.argmax(dim=1).where(logits.isfinite().all(dim=1), -1))
        return torch.cat(predictions) if predictions else torch.empty(0, dtype=torch.int64)

    def measure(self, model: nn.Module) -> EvalResult:
        """Examine `model` (images -> logits); its parts are left in the modes that they came in.

        Raises:
            UserError: a logit is not finite.
        """
        modes = [(part, part.training) for part in model.modules()]  # a frozen backbone is in eval mode by itself
        model.eval()
        images, labels = self._clean
        predictions = self._predict(model, images)
        right = torch.bincount(labels[predictions == labels], minlength=self._classes)
        of = torch.bincount(labels, minlength=self._classes)
        none = torch.bincount(labels[predictions < 0], minlength=self._classes)
        counts = self._world.sum(torch.stack([right, of, none]).double())
        asr = robust = untriggered = None
        if self._triggered is not None:
            wanted = self._manifest.attack_labels(labels)
            mistaken = (predictions == wanted) & (labels != wanted)
            images, labels = self._triggered
            attack_labels = self._manifest.attack_labels(labels)
            others = labels != attack_labels
            predictions = self._predict(model, images)
            hit, kept = (predictions == attack_labels) & others, (predictions == labels) & others
            # the same images with and without the trigger: one total
            hits = torch.stack([hit.sum(), kept.sum(), mistaken.sum(), others.sum(), (predictions < 0).sum()])
            success, correct, mistakes, total, lost = self._world.sum(hits.double()).tolist()
            counts[2] += lost
            asr, robust, untriggered = success / total, correct / total, mistakes / total
        for part, training in modes:
            part.training = training
        if counts[2].any():
            raise UserError(
                "gives figures that are not finite for test images, and so no class",
                where="the model",
                hint="its weights have diverged: train again with lower learning rates, or in fp32",
            )
        right, of, _ = counts.tolist()
        return EvalResult(
            clean_acc=sum(right) / sum(of),
            per_class_acc=[r / n if n else 0.0 for r, n in zip(right, of, strict=True)],
            asr=asr,
            robust_acc=robust,
            asr_untriggered=untriggered,
        )

    def count_kept(self, kept_N: Tensor) -> dict[str, int | None]:
        """How many samples a split kept, and how many poisoned ones among them (None where the truth is not known)."""
        if self._poisoned is None:
            return {"kept": int(kept_N.sum()), "kept_poisoned": None, "poisoned": None}
        return {
            "kept": int(kept_N.sum()),
            "kept_poisoned": int((kept_N & self._poisoned).sum()),
            "poisoned": int(self._poisoned.sum()),
        }

    def judge_split(self, split: dict[str, Tensor], labels_N: Tensor) -> dict[str, Any] | None:
        """How well the first and the last split find poisoned samples (`quality.split_quality`); None where the truth
        is not known.

        Args:
            split: losses and who is kept, as MixMatch gives them.
            labels_N: the given labels of the training samples.
        """
        if self._poisoned is None:
            return None
        return {
            name: split_quality(split[f"{before}loss"], split[f"{before}kept"], self._poisoned, labels_N)
            for name, before in (("first", "first_"), ("last", ""))
            if f"{before}loss" in split
        }

    def judge_features(self, backbone: nn.Module, features_nD: Tensor, positions: Tensor, given_N: Tensor) -> Any:
        """How features group images (`quality.feature_quality`); None where the truth is not known. Every rank.

        Args:
            features_nD: of the training samples at `positions` (n,).
            given_N: the given labels of all training samples.
        """
        images, labels = self._clean
        test = pooled_features(backbone, images.permute(0, 3, 1, 2), self._normalise)
        test, labels = self._world.gather(test.to(self._world.device)), self._world.gather(labels)
        if self._poisoned is None or self._true is None:
            return None
        given, true, poisoned = (values[positions] for values in (given_N, self._true, self._poisoned))
        return feature_quality(features_nD, given, true, poisoned, test.cpu(), labels.cpu())

    def count_flagged(self, flagged: Flagged, labels_N: Tensor) -> dict[str, Any]:
        """What a detector flagged, and how much of it rightly where the truth is known.

        Args:
            labels_N: the given labels of the training samples.

        Returns:
            ``samples``: how many were flagged; ``tpr`` and ``fpr``: the share of the poisoned and of the other samples
            among them; ``auroc`` and ``most_suspect`` (`quality.most_suspect`) of its scores. ``classes``: those it
            flagged; ``class_scores``; ``class_tpr`` and ``class_fpr``: the share of the classes that poisoned samples
            are given, and of the others. None where the detector says nothing of it, the truth is not known, or there
            is nothing to take a share of.
        """
        samples, scores, classes = flagged["samples"], flagged["scores"], flagged["classes"]
        found: dict[str, Any] = dict.fromkeys(("tpr", "fpr", "auroc", "most_suspect", "class_tpr", "class_fpr"))
        found["samples"] = None if samples is None else int(samples.sum())
        found["classes"] = None if classes is None else classes.tolist()
        class_scores = flagged["class_scores"]
        found["class_scores"] = None if class_scores is None else class_scores.tolist()
        poisoned = self._poisoned
        if poisoned is None:
            return found
        if samples is not None:
            found |= {"tpr": share(samples[poisoned]), "fpr": share(samples[~poisoned])}
        if scores is not None and poisoned.any() and not poisoned.all():
            found |= {"auroc": auroc(poisoned, scores), "most_suspect": most_suspect(scores, poisoned, labels_N)}
        if classes is not None:
            targets, alarms = torch.zeros(2, self._classes, dtype=torch.bool)
            targets[labels_N[poisoned]] = True
            alarms[classes] = True
            found |= {"class_tpr": share(alarms[targets]), "class_fpr": share(alarms[~targets])}
        return found


@torch.no_grad()
def pooled_features(backbone: nn.Module, images_BCHW: Tensor, normalise: AugmentConfig) -> Tensor:
    """Penultimate features of un-augmented images: float32 (n, feature_dim) on the CPU; rank 0 alone may ask for
    them."""
    was_training = backbone.training
    backbone.eval()
    features = []
    for chunk in images_BCHW.split(FORWARD_BATCH):
        features.append(backbone(augment.normalise(normalise, chunk)).float().cpu())
        beat()  # a whole test set may take longer than the watchdog allows
    backbone.train(was_training)
    return torch.cat(features)
