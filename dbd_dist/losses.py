"""The losses: pure functions of tensors (and, for the contrastive one, of the world that they are spread over)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dbd_dist.distributed.world import World


def nt_xent(first_BD: Tensor, second_BD: Tensor, temperature: float, world: World, *, symmetric: bool = True) -> Tensor:
    """NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020, arXiv 2002.05709, eq. 1), over the global batch.

    Args:
        first_BD, second_BD: this rank's projections of the two views, (B, D) each; normalised here.
        temperature: divides the cosine similarities.
        world: the ranks that the batch is spread over. Each scores its own anchors against everybody's projections;
            the mean over ranks (which data parallelism takes of the gradients) is the loss of the whole batch.
        symmetric: anchors from both views, as the paper has it; False takes the first view only.

    Returns:
        Scalar, the mean over this rank's anchors.
    """
    rank_batch = len(first_BD)
    views = torch.stack([F.normalize(first_BD.float()), F.normalize(second_BD.float())], dim=1)  # (B, 2, D)
    everybody = world.gather_with_grad(views).transpose(0, 1).flatten(0, 1)  # (2G, D): all first views, then all second
    global_batch = rank_batch * world.size
    anchors = views.transpose(0, 1)[: 2 if symmetric else 1].flatten(0, 1)
    similarity = anchors @ everybody.T / temperature

    mine = torch.arange(rank_batch, device=similarity.device) + world.rank * rank_batch
    own_column = torch.cat([mine, mine + global_batch])[: len(anchors)]
    positive = torch.cat([mine + global_batch, mine])[: len(anchors)]
    similarity = similarity.scatter(1, own_column[:, None], float("-inf"))  # an image is no negative of itself
    return F.cross_entropy(similarity, positive)


def symmetric_cross_entropy(
    logits_BK: Tensor, labels_B: Tensor, alpha: float, beta: float, clamp: float = 1e-4
) -> Tensor:
    """alpha * CE + beta * reverse CE per sample (Wang et al. 2019, arXiv 1908.06112, eq. 7).

    The softmax is clamped to [1e-7, 1] and the one-hot label to [clamp, 1]; 1e-4 is the value that DBD uses.

    Returns:
        float32 (B,).
    """
    log_p = F.log_softmax(logits_BK.float(), dim=1)
    ce = F.nll_loss(log_p, labels_B, reduction="none")
    p = log_p.exp().clamp(1e-7, 1.0)
    log_label = F.one_hot(labels_B, logits_BK.shape[1]).to(p.dtype).clamp(clamp, 1.0).log()
    reverse = -(p * log_label).sum(dim=1)
    return alpha * ce + beta * reverse


def soft_cross_entropy(logits_BK: Tensor, target_BK: Tensor) -> Tensor:
    """Cross-entropy against soft labels, mean over the batch (MixMatch, Berthelot et al. 2019, arXiv 1905.02249,
    eq. 3)."""
    return -(F.log_softmax(logits_BK.float(), dim=1) * target_BK).sum(dim=1).mean()


def probability_mse(logits_BK: Tensor, target_BK: Tensor) -> Tensor:
    """Squared difference of probabilities, mean over batch and classes (MixMatch, eq. 4)."""
    return (F.softmax(logits_BK.float(), dim=1) - target_BK).square().mean()


def attention(features_BCHW: Tensor, power: float = 2.0) -> Tensor:
    """Where a layer looks: |activations|^p summed over channels, of length 1 (Zagoruyko & Komodakis 2017, arXiv
    1612.03928, sec. 3.1; A_sum^p of Li et al. 2021, arXiv 2101.05930, eq. 2).

    Returns:
        float32 (B, H * W).
    """
    return F.normalize(features_BCHW.float().abs().pow(power).sum(dim=1).flatten(1), dim=1)


def attention_distance(student_BCHW: Tensor, teacher_BCHW: Tensor, power: float = 2.0) -> Tensor:
    """Squared difference of two attention maps, mean over batch and places: the distance of Neural Attention
    Distillation (Li et al. 2021, eq. 3) as its authors' code takes it, which the usual weights are for."""
    return F.mse_loss(attention(student_BCHW, power), attention(teacher_BCHW, power))


def sharpen(p_BK: Tensor, temperature: float) -> Tensor:
    """p^(1/T), normalised again (MixMatch, eq. 7)."""
    p = p_BK.pow(1.0 / temperature)
    return p / p.sum(dim=1, keepdim=True)
