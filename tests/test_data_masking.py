"""Masks of masked image modelling: how much they hide, and that they depend on (seed, epoch, index) alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swinscale.data import MaskConfig, mask_for_sample
from swinscale.errors import UsageError

DRAWN = {
    "random": ["#####.##", ".#.##.##", "....#.##", "#..##.##"],
    "block": ["###.....", "########", "########", "...#...."],
}
"""Squares of 8 pixels that are hidden in 32×64 for seed 1, epoch 2, index 3, as before masks knew of clips."""


@pytest.mark.parametrize(("size", "masked", "cells"), [(192, 22, 36), (224, 30, 49), (256, 39, 64)])
def test_published_mask_counts(size, masked, cells):
    config = MaskConfig((size, size), 32, (4, 4), 0.6)
    mask = mask_for_sample(config, 0, 0, 0)
    assert mask.shape == (size // 4, size // 4)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == masked * 64
    assert math.prod(config.cells) == cells


@pytest.mark.parametrize("mode", ["random", "block"])
def test_masks_are_whole_cells_in_rectangles_too(mode):
    config = MaskConfig((64, 128), 16, (4, 2), 0.5, mode)
    for index in range(20):
        mask = mask_for_sample(config, 0, 0, index)
        assert mask.shape == (16, 64)
        cells = mask.view(4, 4, 8, 8).permute(0, 2, 1, 3).flatten(2)
        assert torch.equal(cells.all(-1), cells.any(-1))
        assert int(cells.any(-1).sum()) == 16
    assert not torch.equal(mask_for_sample(config, 0, 0, 1), mask_for_sample(config, 0, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((100, 96), 32, (4, 4)), "img_size=100 is not a multiple of mask_patch=32. Set img_size=96 or mask_patch="),
        (((96, 96), 30, (4, 4)), "mask_patch=30 is not a multiple of the model's patch_size=4. Set it to 32"),
        (((96, 96), 32, (4, 4), 1.5), "mask_ratio=1.5"),
        (((96, 96), 0, (4, 4)), "mask_patch=0 is not a multiple of the model's patch_size=4. Set it to 4"),
    ],
)
def test_masks_that_do_not_fit_say_what_does(arguments, words):
    with pytest.raises(UsageError) as error:
        MaskConfig(*arguments)
    assert words in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    time=st.integers(0, 6),
    ratio=st.floats(0.01, 0.95),
    mode=st.sampled_from(["random", "block", "tube"]),
    index=st.integers(0, 10**9),
)
def test_the_number_of_masked_cells_is_exact_in_images_and_clips(cells, time, ratio, mode, index):
    """Of squares in images and tubes, else of squares in each token of time; ``time`` 0 stands for images."""
    assume(time or mode != "tube")
    axis = (time,) if time else ()
    frames = tuple(max(1, 3 * t - index % 3) for t in axis)  # a clip may end within a token
    config = MaskConfig((*frames, *(8 * c for c in cells)), 8, (*(3 for _ in axis), 4, 4), ratio, mode)
    mask = mask_for_sample(config, 1, 2, index)
    assert mask.shape == (*axis, *(2 * c for c in cells))
    of, each = (math.prod(cells), 4 * time) if mode == "tube" else (math.prod((*axis, *cells)), 4)
    assert int(mask.sum()) == math.ceil(ratio * of) * each


def test_masks_and_images_use_different_random_numbers():
    """Neighbouring seeds, epochs and indices share nothing: every cell is masked equally often."""
    config = MaskConfig((32, 32), 8, (4, 4), 0.5)
    masks = torch.stack([mask_for_sample(config, s, e, i) for s in range(10) for e in range(10) for i in range(10)])
    share = masks[:, ::2, ::2].float().mean(0)
    assert (share - 0.5).abs().max() < 0.08  # five standard deviations of 1000 draws
    assert len({tuple(m.flatten().tolist()) for m in masks}) > 900


@pytest.mark.parametrize("mode", ["random", "block"])
def test_masks_stay_what_they_were_and_a_resumed_run_goes_on_with_them(mode):
    """R-MIM-5: stored masks of an earlier version."""
    mask = mask_for_sample(MaskConfig((32, 64), 8, (4, 4), 0.6, mode), 1, 2, 3)
    expected = torch.tensor([[square == "#" for square in row] for row in DRAWN[mode]])
    assert torch.equal(mask, expected.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_tubes_hide_in_every_frame_the_squares_that_an_image_would_hide():
    """R-MIM-5, R-DOWN-6."""
    image, clip = MaskConfig((64, 96), 16, (4, 8)), MaskConfig((7, 64, 96), 16, (2, 4, 8), mode="tube")
    assert clip.cells == (1, 4, 6) and clip.masked_cells == image.masked_cells == 15
    masks = [mask_for_sample(clip, 3, 1, index) for index in range(20)]
    for index, mask in enumerate(masks):
        assert mask.shape == (4, 16, 12) and mask.dtype == torch.bool
        assert (mask == mask_for_sample(image, 3, 1, index)).all()
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 20


@pytest.mark.parametrize("mode", ["random", "block"])
def test_other_masks_of_clips_change_with_time_by_whole_squares(mode):
    config = MaskConfig((6, 32, 64), 16, (2, 4, 4), 0.5, mode)
    assert config.cells == (3, 2, 4) and config.tokens_per_cell == (1, 4, 4)
    masks = torch.stack([mask_for_sample(config, 0, 0, index) for index in range(20)])
    cells = masks.view(20, 3, 2, 4, 4, 4).permute(0, 1, 2, 4, 3, 5).flatten(4)
    assert torch.equal(cells.all(-1), cells.any(-1))
    assert (masks[:, 0] != masks[:, 1]).any() and (masks[:, 1] != masks[:, 2]).any()


def test_tubes_in_images_say_what_to_choose():
    with pytest.raises(UsageError, match=r"mask_mode='tube'.*\(32, 32\) is an image: choose 'random' or 'block'"):
        MaskConfig((32, 32), 8, (4, 4), mode="tube")
    with pytest.raises(UsageError, match="same number of axes"):
        MaskConfig((8, 32, 32), 8, (4, 4), mode="tube")
    with pytest.raises(UsageError, match="img_size=36 is not a multiple of mask_patch=8"):
        MaskConfig((8, 32, 36), 8, (2, 4, 4), mode="tube")
