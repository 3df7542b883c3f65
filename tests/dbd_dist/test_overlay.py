"""Another image over each view of SimCLR."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dbd_dist.stages import simclr
from tests.dbd_dist import tiny


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_views_are_blended_with_others_of_their_half_by_at_most_the_share():
    """Image i is i everywhere, in tenths: what is blended over it is told from its value."""
    views = torch.arange(12.0)[:, None, None, None].expand(12, 3, 2, 2)
    found = simclr.overlay_views(views, 0.4, 6, slice(0, 6), generator())
    draws = generator()
    shares = torch.rand(2, 6, generator=draws) * 0.4
    shifts = torch.randint(1, 6, (2,), generator=draws).tolist()
    for half in (0, 1):
        for i in range(6):
            own, other = 6 * half + i, 6 * half + (i - shifts[half]) % 6
            assert other != own
            expected = (1 - shares[half, i]) * own + shares[half, i] * other
            torch.testing.assert_close(found[own], expected.expand(3, 2, 2))


def test_ranks_draw_the_shares_of_their_part():
    views = torch.rand(12, 3, 2, 2, generator=generator(1))
    whole = torch.rand(2, 6, generator=generator()) * 0.4
    part = simclr.overlay_views(views[[3, 4, 5, 9, 10, 11]], 0.4, 6, slice(3, 6), generator())
    apart = (part - views[[3, 4, 5, 9, 10, 11]]).abs().amax(dim=(1, 2, 3))
    assert bool((apart <= whole[:, 3:].flatten() + 1e-6).all())
    assert float(apart.max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [0.0, 0.4])
def test_overlays_change_what_is_learnt_and_none_leaves_it(alone, overlay):
    weights = []
    for config in (tiny.SIMCLR, replace(tiny.SIMCLR, overlay=overlay)):
        context = tiny.make_context(alone, tiny.make_images())
        model = context.prepare(context.contrastive("simclr", "weights"))
        simclr.pretrain(config, model, context, None)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights) == (overlay == 0)
    assert all(bool(torch.isfinite(w).all()) for w in weights)
