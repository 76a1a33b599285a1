"""Augmentation of images with label maps: both stay together, and the numbers are the published ones (R-DOWN-2)."""

from __future__ import annotations

import colorsys
from typing import Any

import pytest
import torch
from torch import Tensor

from swinscale.data import segment_transforms
from swinscale.data.segment_transforms import (
    distort,
    nearest,
    saturate,
    segment_eval_transform,
    segment_train_transform,
)
from swinscale.data.segments import IGNORED
from swinscale.errors import UsageError

NONE = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def training(augment: Any = "light", **changes: Any) -> Any:
    settings = {"crop": (48, 64), "short": 60, "long": 240, "ratio": (0.5, 2.0), "max_share": 0.75}
    return segment_train_transform(**NONE, augment=augment, **(settings | changes))


def quarters(height: int = 80, width: int = 100) -> dict[str, Tensor]:
    """Four classes in the quarters, whose grey values tell them."""
    target = torch.zeros(height, width, dtype=torch.int64)
    target[height // 2 :] += 2
    target[:, width // 2 :] += 1
    return {"image": (target * 60 + 30).to(torch.uint8).expand(3, -1, -1).contiguous(), "target": target}


def test_image_and_map_stay_together():
    sample, agree, flips = quarters(), [], set()
    for seed in range(40):
        torch.manual_seed(seed)
        made = training()(sample)
        assert made["image"].shape == (3, 48, 64) and made["target"].shape == (48, 64)
        counted = made["target"] != IGNORED
        seen = ((made["image"][0] * 255 - 30) / 60).round().long()
        agree.append((seen == made["target"])[counted].float().mean())
        rows, columns = counted.any(1).sum(), counted.any(0).sum()
        assert counted[:rows, :columns].all() and counted.sum() == rows * columns  # padding at the right and bottom
        assert not made["image"][:, ~counted].any()
        flips.add(bool(made["target"][0, 0] % 2))
    assert min(agree) > 0.95  # all but the smoothed edges
    assert flips == {True, False}


def test_a_map_takes_the_pixel_whose_centre_is_nearest():
    target = torch.arange(12).reshape(3, 4)
    assert torch.equal(nearest(target, (3, 4)), target)
    assert torch.equal(nearest(target, (6, 8)), target.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert nearest(target, (1, 1)).item() == 6
    big = torch.randint(0, 9, (37, 53), generator=torch.Generator().manual_seed(0))
    for size in ((80, 31), (20, 100)):
        expected = torch.nn.functional.interpolate(big[None, None].double(), size=size, mode="nearest-exact")
        assert torch.equal(nearest(big, size), expected[0, 0].long())
        assert torch.equal(nearest(big, size, (5, 7, 10, 20)), nearest(big, size)[5:15, 7:27])


@pytest.mark.parametrize("shape", [(80, 100), (100, 80)])
def test_the_scale_is_drawn_from_the_ratio(shape):
    """A picture is fitted into short × long times the factor; the crop is so large that all of it is seen."""
    sides = []
    for seed in range(60):
        torch.manual_seed(seed)
        target = training(crop=(300, 300))(quarters(*shape))["target"] != IGNORED
        rows, columns = int(target.any(1).sum()), int(target.any(0).sum())
        assert abs(rows / columns - shape[0] / shape[1]) < 0.05
        sides.append(min(rows, columns))
    assert 30 <= min(sides) <= 36 and 108 <= max(sides) <= 120
    wide = {"image": torch.zeros(3, 20, 200, dtype=torch.uint8), "target": torch.zeros(20, 200, dtype=torch.int64)}
    made = training(crop=(300, 300), short=60, long=100, ratio=(1, 1))(wide)["target"] != IGNORED
    assert int(made.any(0).sum()) == 100 and int(made.any(1).sum()) == 10  # the long side decides


def test_crops_are_drawn_again_while_one_class_fills_them():
    target = torch.zeros(200, 200, dtype=torch.int64)
    target[:, :50] = 1
    sample = {"image": torch.zeros(3, 200, 200, dtype=torch.uint8), "target": target}

    def mixed(share: float) -> float:
        """How many of 100 crops hold two classes, the larger in at most 3/4."""
        found = 0
        for seed in range(100):
            torch.manual_seed(seed)
            made = training(crop=(60, 60), short=200, long=200, ratio=(1, 1), max_share=share)(sample)["target"]
            found += 0.25 <= float((made == 1).float().mean()) <= 0.75
        return found / 100

    assert mixed(1) < 0.4 and mixed(0.75) > 0.9


def test_ignored_pixels_are_no_class_in_the_shares():
    """Half void, the rest nearly all one class: such a crop is drawn again; with equal classes the first one is taken."""
    made = segment_train_transform(**NONE, augment="light", crop=(10, 10))
    target = torch.full((10, 10), IGNORED)
    target[:5], target[0, 0] = 3, 1
    assert not made._mixed(target)
    target[:2] = 1
    assert made._mixed(target)
    assert not made._mixed(torch.full((10, 10), IGNORED))
    assert not made._mixed(torch.full((10, 10), 4))


def test_a_picture_of_one_class_does_not_wait_for_another(monkeypatch):
    """At most 10 further crops are drawn, none if the picture has no room for another."""
    drawn = []
    monkeypatch.setattr(segment_transforms, "nearest", lambda *args: (drawn.append(args), nearest(*args))[1])
    sample = {"image": torch.zeros(3, 60, 60, dtype=torch.uint8), "target": torch.zeros(60, 60, dtype=torch.int64)}
    training(crop=(20, 20), ratio=(1, 1))(sample)
    assert len(drawn) == 11
    training(crop=(60, 60), ratio=(1, 1))(sample)
    assert len(drawn) == 12


def test_none_only_resizes_and_eval_only_normalises():
    sample = quarters(80, 100)
    made = training("none")(sample)
    assert made["image"].shape == (3, 60, 75) and made["target"].shape == (60, 75)
    torch.manual_seed(7)
    assert torch.equal(training("none")(sample)["image"], made["image"])
    plain = segment_eval_transform((0.1, 0.2, 0.3), (0.5, 0.5, 2))(sample)
    assert torch.equal(plain["target"], sample["target"]) and plain["image"].dtype == torch.float32
    expected = (sample["image"].float() / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor(
        [0.5, 0.5, 2]
    )[:, None, None]
    assert torch.allclose(plain["image"], expected, atol=1e-6)


def test_distortion_changes_colours_within_the_published_limits():
    """On grey, saturation and hue do nothing: what remains is brightness ±32 and contrast 0.5 … 1.5."""
    grey, seen = torch.full((3, 4, 4), 100, dtype=torch.uint8), []
    for seed in range(400):
        torch.manual_seed(seed)
        made = distort(grey) * 255
        assert made.dtype == torch.float32 and float(made.max() - made.min()) < 1e-2
        seen.append(float(made.mean()))
    values = torch.tensor(seen)
    assert 0.18 < float((values.sub(100).abs() < 1e-3).float().mean()) < 0.32  # neither, one time in four
    assert float(values.min()) >= 68 * 0.5 - 1e-3 and float(values.max()) <= 132 * 1.5 + 1e-3
    assert float(values.min()) < 45 and float(values.max()) > 165


def test_saturation_is_that_of_hue_saturation_value():
    image = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0))
    for factor in (0.5, 1.5, 30.0):
        made = saturate(image, factor)
        for pixel, changed in zip(image.flatten(1).T.tolist(), made.flatten(1).T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
            assert changed == pytest.approx(expected, abs=1e-5)
    grey = torch.full((3, 2, 2), 0.0)
    assert torch.equal(saturate(grey, 1.5), grey)


def test_hue_turns_by_a_tenth_of_the_circle_at_most():
    red = torch.tensor([90, 20, 20], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    hues = []  # of a red so dark that nothing is clipped
    for seed in range(200):
        torch.manual_seed(seed)
        hue = colorsys.rgb_to_hsv(*distort(red)[:, 0, 0].tolist())[0]
        hues.append((hue + 0.5) % 1 - 0.5)
    assert -0.1001 <= min(hues) < -0.07 and 0.07 < max(hues) <= 0.1001
    assert 0.35 < sum(abs(hue) < 1e-3 for hue in hues) / 200 < 0.65


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_other_pixels_keep_their_scale(channels):
    """Heights, radiances: brightness follows their range, nothing is clipped, and channels are no colours."""
    image = 1000 + 50 * torch.rand(channels, 8, 8, generator=torch.Generator().manual_seed(0))
    ratios = set()
    for seed in range(40):
        torch.manual_seed(seed)
        made = distort(image)
        slope = float((made[0, 0, 0] - made[0, 0, 1]) / (image[0, 0, 0] - image[0, 0, 1]))
        shift = float(made[0, 0, 0] / slope - image[0, 0, 0])
        assert torch.allclose(made, (image + shift) * slope, rtol=1e-4)  # the same for all channels
        assert 0.49 < slope < 1.51 and abs(shift) < 50 * 1.5 * 32 / 255 / slope + 0.1
        ratios.add(round(slope, 3))
    assert len(ratios) > 5
    sample = {"image": image, "target": torch.zeros(8, 8, dtype=torch.int64)}
    settings: dict[str, Any] = {"augment": "published", "crop": (16, 16), "short": 8, "long": 8}
    out = segment_train_transform((0,) * channels, (1,) * channels, **settings)(sample)
    assert out["image"].shape == (channels, 16, 16) and out["image"].max() > 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "pubished"}, "augment='pubished' is unknown. Did you mean 'published'"),
        ({"crop": (0, 5)}, "crop="),
        ({"short": 0}, "short=0"),
        ({"short": 100, "long": 50}, "long not less than short"),
        ({"ratio": (2.0, 0.5)}, "ratio="),
        ({"ratio": (0.0, 0.5)}, "ratio="),
        ({"max_share": 0.0}, "max_share=0.0"),
        ({"max_share": 1.5}, "max_share=1.5"),
    ],
)
def test_values_that_make_no_image_are_refused(changes, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        training(**changes)
