"""Augmentation of clips: what is drawn is drawn once, so that time stays consistent (R-DOWN-6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swinscale.data.clip_transforms import clip_eval_transform, clip_train_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ALL: dict[str, Any] = {"jitter": 0.4, "randaugment": (4, 7), "erase": 1.0}


def still(frames: int = 6, size: tuple[int, int] = (40, 56)) -> Tensor:
    """(frames, 3, height, width) uint8: the same noisy picture in all frames."""
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    return picture.expand(frames, -1, -1, -1).contiguous()


def applied(transform: Any, clip: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    result: Tensor = transform(clip)
    return result


@pytest.mark.parametrize(
    "how", [{}, {"flip": 0.5}, {"jitter": 0.4}, {"randaugment": (4, 7)}, {"randaugment": (2, 10)}, {"erase": 1.0}, ALL]
)
def test_a_film_in_which_nothing_moves_stays_still(how: dict[str, Any]):
    """Under every augmentation, for 40 draws; which differ from each other."""
    clip, transform, seen = still(), clip_train_transform((32, 24), MEAN, STD, **how), []
    for seed in range(40):
        result = applied(transform, clip, seed)
        assert result.shape == (6, 3, 32, 24) and result.dtype == torch.float32 and result.isfinite().all()
        assert (result == result[:1]).all(), seed
        seen.append(result[0])
    assert sum(torch.equal(seen[0], other) for other in seen) == 1


def test_the_same_seed_gives_the_same_clip():
    transform = clip_train_transform((32, 24), MEAN, STD, **ALL)
    assert torch.equal(applied(transform, still(), 3), applied(transform, still(), 3))


def test_a_clip_is_mirrored_as_a_whole_or_not_at_all():
    """Bright squares that move stay on their side of the picture in all frames."""
    clip = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
    for frame in range(8):
        clip[frame, :, 4 * frame : 4 * frame + 4, :8] = 255
    mirror = clip_train_transform((32, 32), (0.0,), (1.0,), area=(1.0, 1.0), flip=0.5)
    whole = clip_train_transform((32, 32), (0.0,), (1.0,), area=(1.0, 1.0), flip=0.0)
    sides = set()
    for seed in range(20):
        left = applied(mirror, clip, seed)[..., :16].flatten(1).sum(1) > 0
        sides.add(tuple(left.tolist()))
        assert (applied(whole, clip, seed)[..., :16].flatten(1).sum(1) > 0).all()
    assert sides == {(True,) * 8, (False,) * 8}


def test_motion_survives_a_crop():
    """A bar that moves by as much from frame to frame does so afterwards: the crop does not wander."""
    clip = torch.zeros(6, 3, 48, 64, dtype=torch.uint8)
    for frame in range(6):
        clip[frame, :, :, 20 + 4 * frame : 22 + 4 * frame] = 255
    transform = clip_train_transform((48, 64), (0.0,) * 3, (1.0,) * 3, area=(0.7, 1.0), flip=0.0)
    for seed in range(10):
        profile = applied(transform, clip, seed).mean((1, 2))
        places = (profile * torch.arange(64)).sum(1) / profile.sum(1)
        steps = places.diff()[1:-1]  # at the border a bar may be cut
        assert (steps - steps.mean()).abs().max() < 0.5 and steps.mean() > 3


def test_crops_have_the_share_that_is_asked_for():
    """A picture of two halves: at 8 % to 100 % a crop may lie in one of them, at 90 % it never does."""
    clip = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    clip[..., 32:] = 255
    small, large = (clip_train_transform((16, 16), (0.0,), (1.0,), area=area) for area in ((0.08, 1.0), (0.9, 1.0)))
    means = [[applied(t, clip, seed).mean().item() for seed in range(60)] for t in (small, large)]
    assert min(means[0]) == 0 and max(means[0]) == 1 and min(means[1]) > 0.3 and max(means[1]) < 0.7


def test_erasing_hides_the_same_rectangle_in_all_frames():
    clip = torch.full((5, 3, 32, 32), 128, dtype=torch.uint8)
    plain, erased = (
        applied(clip_train_transform((32, 32), (0.5,) * 3, (0.5,) * 3, area=(1.0, 1.0), flip=0.0, erase=e), clip, 1)
        for e in (0.0, 1.0)
    )
    changed = (plain != erased).any(1)
    assert (changed == changed[:1]).all() and 0 < changed[0].float().mean() < 0.5


def test_other_numbers_of_channels():
    """Grey clips take all operations that there are for them; jitter and RandAugment are left out where there are none."""
    for channels in (1, 2, 5):
        clip = still()[:, :1].repeat(1, channels, 1, 1)
        transform = clip_train_transform((24, 24), (0.5,) * channels, (0.5,) * channels, **ALL)
        for seed in range(15):
            result = applied(transform, clip, seed)
            assert result.shape == (6, channels, 24, 24) and (result == result[:1]).all()


def test_evaluation_normalises_and_cuts_the_centre():
    clip = still(3, (20, 30))
    whole, centre = clip_eval_transform(MEAN, STD)(clip), clip_eval_transform(MEAN, STD, (16, 12))(clip)
    by_hand = (clip / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.allclose(whole, by_hand, atol=1e-6) and torch.equal(centre, whole[..., 2:18, 9:21])
