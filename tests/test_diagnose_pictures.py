"""Pictures: un-normalisation, bands, reconstructions with composites, grids and annotations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swinscale.diagnose.pictures import (
    MASKED,
    Panels,
    annotated,
    denormalise_locally,
    grid,
    reconstruction_panels,
    to_picture,
)
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.tasks.simmim import SimMIM, SimMIMConfig, normalise_locally

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def simmim(chans: int = 3, **options) -> SimMIM:
    torch.manual_seed(0)
    config = SwinConfig(
        embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4, img_size=32, patch_size=2, in_chans=chans,
        num_classes=0,
    )  # fmt: skip
    preprocessing = {"mean": [0.5] * chans, "std": [0.25] * chans}
    return SimMIM(SwinTransformer(config), SimMIMConfig(mask_patch=4, **options), preprocessing)


def pixels(*shape: int) -> torch.Tensor:
    """Values that uint8 holds exactly, in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, generator=generator) / 255


def test_normalisation_is_undone_exactly():
    """Every uint8 value survives normalisation and back."""
    image = (torch.arange(256) / 255).reshape(1, 16, 16).repeat(3, 1, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    picture = to_picture((image - mean) / std, MEAN, STD)
    assert picture.dtype == np.uint8 and picture.shape == (16, 16, 3)
    assert (picture == np.arange(256, dtype=np.uint8).reshape(16, 16, 1)).all()


def test_values_outside_the_range_are_clipped_and_nan_is_black():
    image = torch.tensor([-9.0, 9.0, float("nan"), float("inf")]).reshape(1, 2, 2)
    assert to_picture(image, [0.5], [0.5])[..., 0].tolist() == [[0, 255], [0, 255]]


@pytest.mark.parametrize(
    ("channels", "bands", "shown"),
    [
        (1, None, (0, 0, 0)),
        (2, None, (0, 1, 1)),
        (3, None, (0, 1, 2)),
        (13, None, (0, 1, 2)),
        (13, (11, 3, 0), (11, 3, 0)),
    ],
)
def test_any_number_of_bands_is_shown(channels, bands, shown):
    """R-MIM-4, R-CHAN: grey is grey, and any three bands of many can be chosen, each with its own normalisation."""
    image = pixels(channels, 4, 5)
    mean, std = torch.linspace(0.1, 0.6, channels), torch.linspace(0.2, 0.4, channels)
    normalised = (image - mean[:, None, None]) / std[:, None, None]
    picture = to_picture(normalised, mean.tolist(), std.tolist(), bands)
    assert (picture == (image * 255).round().byte()[list(shown)].movedim(0, -1).numpy()).all()


@pytest.mark.parametrize("bands", [(0, 1), (0, 1, 3), (-1, 0, 1)])
def test_bands_that_do_not_exist_are_refused(bands):
    with pytest.raises(UsageError, match="channels 0 to 2"):
        to_picture(pixels(3, 4, 4), MEAN, STD, bands)


def test_wrong_normalisation_is_refused():
    with pytest.raises(UsageError, match=r"3 channels.*1 and 1"):
        to_picture(pixels(3, 4, 4), [0.5], [0.5])


@pytest.mark.parametrize("side", [3, 7, 47])
def test_local_normalisation_round_trip(side):
    """R-MIM-4: a perfect prediction of the normalised target shows the image itself, at borders too."""
    images = torch.randn(2, 3, 20, 33)
    images[0, :, :8] = 0.7  # constant regions have no variance to divide by
    back = denormalise_locally(normalise_locally(images, side), images, side)
    torch.testing.assert_close(back, images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_target", [0, 5])
def test_panels_of_a_perfect_model_show_the_input(norm_target, monkeypatch):
    """With the target itself as prediction every panel but the masked one is the input (R-MIM-4)."""
    task = simmim(norm_target=norm_target)
    images = (pixels(2, 3, 32, 32) - 0.5) / 0.25
    monkeypatch.setattr(task, "predict", lambda images, mask: task.target(images))
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, :8] = True
    for image, panels in zip(images, reconstruction_panels(task, images, mask), strict=True):
        expected = to_picture(image, [0.5] * 3, [0.25] * 3)
        for name in ("input", "reconstruction", "composite"):
            assert np.abs(getattr(panels, name).astype(int) - expected).max() <= (1 if norm_target else 0), name


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_composite_takes_each_pixel_from_where_it_should(channels):
    """Visible pixels of the input, predicted ones where it was masked (R-MIM-2, R-MIM-4)."""
    task = simmim(channels).train()
    images = (pixels(2, channels, 32, 32) - 0.5) / 0.25
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, 3, 5] = True  # pixels 6, 7 × 10, 11
    first, second = reconstruction_panels(task, images, mask)
    assert task.training, "the mode of the model is left as it was"
    hidden = np.zeros((32, 32), dtype=bool)
    hidden[6:8, 10:12] = True
    assert (first.input == to_picture(images[0], [0.5] * channels, [0.25] * channels)).all()
    assert (first.masked[hidden] == MASKED).all() and (first.masked[~hidden] == first.input[~hidden]).all()
    assert (first.composite[hidden] == first.reconstruction[hidden]).all()
    assert (first.composite[~hidden] == first.input[~hidden]).all()
    assert (first.reconstruction != first.input).any()
    assert (second.composite == second.input).all() and (second.masked == second.input).all()


def test_panels_show_the_prediction_of_the_model():
    task = simmim().eval()
    images, mask = torch.randn(1, 3, 32, 32), torch.rand(1, 16, 16) < 0.5
    [panels] = reconstruction_panels(task, images, mask, bands=(2, 1, 0))
    with torch.no_grad():
        prediction = task.predict(images, mask)[0]
    assert (panels.reconstruction == to_picture(prediction, [0.5] * 3, [0.25] * 3, (2, 1, 0))).all()


def test_images_that_are_not_a_multiple_of_the_stride():
    task = simmim(norm_target=3)
    [panels] = reconstruction_panels(task, torch.randn(1, 3, 31, 21), torch.ones(1, 16, 11, dtype=torch.bool))
    assert all(panel.shape == (31, 21, 3) for panel in panels)
    assert (panels.masked == MASKED).all() and (panels.composite == panels.reconstruction).all()


def test_a_model_without_normalisation_is_refused():
    task = simmim()
    task.preprocessing = {}
    with pytest.raises(UsageError, match="normalised"):
        reconstruction_panels(task, torch.randn(1, 3, 32, 32), torch.zeros(1, 16, 16, dtype=torch.bool))


def test_grid_enlarges_small_pictures_pixel_by_pixel():
    """A 32-pixel picture becomes 128 pixels, each pixel a square of 4."""
    picture = (pixels(32, 32, 3) * 255).byte().numpy()
    dark = np.zeros_like(picture)
    canvas = np.asarray(
        grid([[picture, dark], [dark, picture]], ["input", "a very long title for so narrow a column"], gap=6)
    )
    head = canvas.shape[0] - 2 * (128 + 6)
    assert canvas.shape[1] == 2 * 128 + 3 * 6
    large = picture.repeat(4, 0).repeat(4, 1)
    assert (canvas[head : head + 128, 6 : 6 + 128] == large).all()
    assert (canvas[head + 134 : head + 262, 140 : 140 + 128] == large).all()
    assert (canvas[head : head + 128, 140 : 140 + 128] == 0).all()
    title = canvas[:head]
    assert (title < 128).any(), "there is a title"
    assert (title[:, :6] == 255).all() and (title[:, 134:140] == 255).all() and (title[:, -6:] == 255).all(), (
        "no overflow"
    )


def test_grid_of_panels_at_a_chosen_scale():
    picture = np.zeros((100, 200, 3), np.uint8)
    row = Panels(picture, picture, picture, picture)
    assert grid([row], Panels._fields).width == 4 * 200 + 5 * 8
    assert grid([row], Panels._fields, scale=2).width == 4 * 400 + 5 * 8


@pytest.mark.parametrize("rows", [[], [[np.zeros((4, 4, 3), np.uint8)]]])
def test_a_grid_with_missing_pictures_is_refused(rows):
    with pytest.raises(UsageError, match="titles"):
        grid(rows, ["input", "masked"])


def coloured(canvas: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Number of pixels of ``colour`` in each row."""
    return (canvas == np.array(colour)).all(-1).sum(1)


def test_annotation_has_bars_as_long_as_the_probabilities():
    picture = np.full((32, 32, 3), 77, np.uint8)
    canvas = np.asarray(annotated(picture, [("cat", 0.75), ("dog <b>", 0.25), ("x" * 200, 0.0)], truth="dog <b>"))
    blue, green = coloured(canvas, (0, 0x72, 0xB2)), coloured(canvas, (0, 0x9E, 0x73))
    assert coloured(canvas, (77, 77, 77)).max() == 320, "the picture is enlarged to ten times its size"
    assert blue.max() == 0.75 * 320 + 1 and green.max() == 0.25 * 320 + 1
    assert blue.argmax() < green.argmax(), "the most probable class comes first"
    side = 18 * 3 // 4
    margins = np.concatenate([canvas[:, :side], canvas[:, -side + 1 :]], 1)
    assert (margins > 240).all(), "long labels are cut"


def test_annotation_without_truth_is_blue_alone_and_large_pictures_shrink():
    canvas = annotated(np.zeros((1500, 3000, 3), np.uint8), [("cat", 0.9)])
    assert 768 < canvas.width < 900
    assert coloured(np.asarray(canvas), (0, 0x9E, 0x73)).max() == 0
    assert canvas.height > annotated(np.zeros((1500, 3000, 3), np.uint8), []).height
