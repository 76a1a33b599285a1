"""SimMIM: loss, targets, any number of channels, rectangular images, and equality with transformers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from swinscale.data import MaskConfig, mask_for_sample
from swinscale.diagnose.pictures import denormalise_locally
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.tasks import SimMIM, SimMIMConfig, normalise_locally
from swinscale.tasks.neighbours import paint_from_neighbours


def task(version: int = 2, chans: int = 3, size: int | tuple[int, int] = 32, **options) -> SimMIM:
    config = SwinConfig(
        version=version, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, img_size=size, patch_size=2,
        in_chans=chans, num_classes=0, drop_path_rate=0.0,
    )  # fmt: skip
    return SimMIM(SwinTransformer(config), SimMIMConfig(mask_patch=4, **options))


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)


def random_mask(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, height, width) < 0.6


@pytest.mark.parametrize("version", [1, 2])
def test_loss_is_the_mean_error_of_masked_pixels(version):
    """The published loss: L1 summed over masked pixels, over their number and the channels."""
    simmim = task(version)
    randomise(simmim)
    images, mask = torch.randn(2, 3, 32, 32), random_mask(2, 16, 16)
    loss, prediction, pixels = simmim.reconstruct(images, mask)
    errors = [
        (prediction[b, c, y, x] - images[b, c, y, x]).abs()
        for b in range(2)
        for y in range(32)
        for x in range(32)
        for c in range(3)
        if mask[b, y // 2, x // 2]
    ]
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert pixels.shape == (2, 1, 32, 32)


def test_masked_pixels_do_not_reach_the_encoder():
    simmim = task()
    randomise(simmim)
    images, mask = torch.randn(1, 3, 32, 32), random_mask(1, 16, 16)
    hidden = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    changed = torch.where(hidden, torch.randn_like(images), images)
    assert torch.equal(simmim.predict(images, mask), simmim.predict(changed, mask))
    assert not torch.allclose(simmim.predict(images, mask), simmim.predict(images + 1, mask))


@pytest.mark.parametrize("chans", [1, 4, 13])
@pytest.mark.parametrize("version", [1, 2])
def test_any_number_of_channels_learns(chans, version):
    """R-MIM-2: decoder, target and mask follow the channels; 20 steps lower the loss."""
    simmim = task(version, chans)
    images, mask = torch.randn(4, chans, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3), random_mask(4, 16, 16)
    optimizer = torch.optim.AdamW(simmim.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss, _ = simmim({"image": images, "mask": mask})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_rectangular_images_and_sizes_that_the_stride_does_not_divide():
    """R-MIM-1."""
    simmim = task(size=(32, 64))
    assert simmim.predict(torch.randn(1, 3, 32, 64), random_mask(1, 16, 32)).shape == (1, 3, 32, 64)
    assert simmim.predict(torch.randn(1, 3, 30, 42), random_mask(1, 15, 21)).shape == (1, 3, 30, 42)


def test_local_normalisation_against_plain_loops():
    """The target of the published V2 models: unbiased variance over the pixels that exist."""
    images, side = torch.randn(1, 2, 7, 9), 5
    expected = torch.empty_like(images)
    for c in range(2):
        for y in range(7):
            for x in range(9):
                patch = images[0, c, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
                expected[0, c, y, x] = (images[0, c, y, x] - patch.mean()) / (patch.var() + 1e-6).sqrt()
    assert torch.allclose(normalise_locally(images, side), expected, atol=1e-4)


def test_options_change_the_loss_as_they_say():
    images, mask = torch.randn(2, 3, 32, 32), random_mask(2, 16, 16)
    torch.manual_seed(0)
    simmim = task(loss="l2", masked_only=False)
    assert simmim.reconstruct(images, mask).loss.item() == pytest.approx(
        F.mse_loss(simmim.predict(images, mask), images).item(), rel=1e-5
    )
    normal = task(norm_target=5)
    assert torch.equal(normal.target(images), normalise_locally(images, 5))


def test_mean_predictor_is_reported():
    """R-MIM-6: the line that learning has to beat."""
    simmim = task()
    metrics = simmim.new_metrics()
    images, mask = torch.full((2, 3, 32, 32), 0.7), random_mask(2, 16, 16)
    simmim.update_metrics(metrics, {"image": images, "mask": mask})
    assert metrics["mean_predictor_loss"].compute().item() == pytest.approx(0.0, abs=1e-6)
    assert metrics["loss"].compute().item() > 0.1


def test_what_does_not_fit_is_said():
    with pytest.raises(UsageError, match="norm_target=4"):
        task(norm_target=4)
    with pytest.raises(UsageError, match="num_classes=3"):
        SimMIM(SwinTransformer(SwinConfig(embed_dim=16, depths=(1,), num_heads=(1,), num_classes=3)))
    with pytest.raises(UsageError, match=r"\(1, 8, 8\).*\(1, 16, 16\)"):
        task().predict(torch.randn(1, 3, 32, 32), random_mask(1, 8, 8))


@pytest.mark.parametrize("version", [1, 2])
def test_loss_equals_transformers(version):
    """Copied weights and mask: the loss of transformers' Swin(v2)ForMaskedImageModeling, ≤ 1e-5 relative."""
    import transformers

    from swinscale.weights import convert_state_dict

    name = "Swin" if version == 1 else "Swinv2"
    peer_config = getattr(transformers, f"{name}Config")(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, encoder_stride=4,
        drop_path_rate=0.0,
    )  # fmt: skip
    peer = getattr(transformers, f"{name}ForMaskedImageModeling")(peer_config).eval()
    randomise(peer)
    simmim = task(version).eval()
    simmim.load_state_dict(convert_state_dict(peer.state_dict(), to="swinscale-simmim"), strict=True)
    images, mask = torch.randn(2, 3, 32, 32), random_mask(2, 16, 16)
    with torch.no_grad():
        theirs = peer(images, bool_masked_pos=mask.flatten(1))
        ours = simmim.reconstruct(images, mask)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert torch.allclose(ours.prediction, theirs.reconstruction, atol=1e-4)


def pixels_of(mask: torch.Tensor) -> torch.Tensor:
    return mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]


@pytest.mark.parametrize("size", [(32, 32), (31, 57), (1, 9)])
def test_neighbours_are_exact_on_constants_and_keep_what_is_visible(size):
    images = torch.randn(3, 2, 1, 1).expand(3, 2, *size)
    hidden = torch.rand(3, 1, *size) < 0.8
    hidden[:, :, 0, 0] = False
    assert torch.allclose(paint_from_neighbours(images, hidden), images, atol=1e-6)
    images = torch.randn(3, 2, *size)
    painted = paint_from_neighbours(images, hidden)
    assert torch.equal(painted.masked_fill(hidden, 0), images.masked_fill(hidden, 0))
    changed = torch.where(hidden, torch.randn_like(images), images)
    assert torch.equal(paint_from_neighbours(changed, hidden), painted), "hidden pixels do not matter"


def test_neighbours_are_close_on_smooth_images():
    """A quarter of the mean predictor's error is left at most."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    images = torch.stack([x + y, (3 * x).sin() * y])[None]
    hidden = pixels_of((torch.rand(1, 8, 8) < 0.6).repeat_interleave(4, 1).repeat_interleave(4, 2))
    error = (paint_from_neighbours(images, hidden) - images).abs()[hidden.expand_as(images)].mean()
    mean = images.masked_fill(hidden, 0).sum((2, 3), keepdim=True) / (~hidden).sum()
    assert error < 0.25 * (mean - images).abs()[hidden.expand_as(images)].mean()


def test_an_image_without_visible_pixels_is_painted_zero_and_does_not_touch_others():
    images, hidden = torch.randn(2, 1, 16, 16), torch.ones(2, 1, 16, 16, dtype=torch.bool)
    hidden[1, :, :, ::2] = False
    painted = paint_from_neighbours(images, hidden)
    assert not painted[0].any()
    assert torch.equal(painted[1], paint_from_neighbours(images[1:], hidden[1:])[0])


def measured(simmim: SimMIM, *batches: dict[str, torch.Tensor]) -> dict[str, float]:
    metrics = simmim.new_metrics()
    for batch in batches:
        simmim.update_metrics(metrics, batch)
    return {name: metric.compute().item() for name, metric in metrics.items()}


@pytest.mark.parametrize("norm_target", [0, 5])
def test_psnr_is_that_of_masked_pixels_as_they_are_seen(norm_target, monkeypatch):
    """R-MIM-6: from pixels in [0, 1], with the viewer's own way back from local normalisation."""
    simmim = task(norm_target=norm_target)
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    simmim.preprocessing = {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
    images, mask = torch.randn(4, 3, 32, 32), random_mask(4, 16, 16)
    prediction = torch.randn_like(images)
    monkeypatch.setattr(simmim, "predict", lambda x, m: prediction[: len(x)])
    batch = {"image": images, "mask": mask}
    hidden = pixels_of(mask).expand_as(images)
    for name, predicted in (
        ("psnr", prediction),
        ("neighbour_psnr", paint_from_neighbours(simmim.target(images), pixels_of(mask))),
    ):
        seen = denormalise_locally(predicted, images, norm_target) if norm_target else predicted
        error = ((seen * std + mean) - (images * std + mean))[hidden]
        expected = 10 * math.log10(1 / error.square().mean().item())
        assert measured(simmim, batch)[name] == pytest.approx(expected, abs=1e-3)
    half = {"image": images[:2], "mask": mask[:2]}
    assert measured(simmim, half, half)["psnr"] == pytest.approx(measured(simmim, half)["psnr"], abs=1e-4)


def test_measures_know_a_good_prediction_from_baselines(monkeypatch):
    simmim = task()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    batch = {"image": torch.stack([x, y, x * y]).repeat(2, 1, 1, 1), "mask": random_mask(2, 16, 16)}
    assert "psnr" not in measured(simmim, batch), "without std there are no pixels to speak of"
    simmim.preprocessing = {"mean": [0.5] * 3, "std": [0.25] * 3}
    monkeypatch.setattr(simmim, "predict", lambda images, mask: images.clone())
    found = measured(simmim, batch)
    assert found["loss"] == 0 and found["psnr"] == pytest.approx(100.0)
    assert 0 < found["neighbour_loss"] < 0.3 * found["mean_predictor_loss"]
    assert 20 < found["neighbour_psnr"] < 60


STORED = {
    (1, 0): [1.0007231, 0.6436628, 0.5881970, 10.0881405, 15.3085651],
    (1, 5): [0.9894049, 0.5994391, 0.5548492, 14.5667028, 20.6128674],
    (2, 0): [1.1189681, 0.6436628, 0.5881970, 9.1083641, 15.3085651],
    (2, 5): [1.1058024, 0.5994391, 0.5548492, 13.5237684, 20.6128674],
}
"""By version and ``norm_target``, the measures of an earlier version of this library, which knew images alone."""


@pytest.mark.parametrize(("version", "norm_target"), STORED)
def test_measures_of_images_stay_what_they_were(version, norm_target):
    simmim = task(version, norm_target=norm_target)
    simmim.preprocessing = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    randomise(simmim)
    images = torch.arange(2 * 3 * 32 * 32).mul(0.37).sin().view(2, 3, 32, 32)
    masks = [mask_for_sample(MaskConfig((32, 64), 4, (2, 2)), 1, 2, index)[:, :16] for index in range(2)]
    found = measured(simmim, {"image": images, "mask": torch.stack(masks)})
    names = ("loss", "mean_predictor_loss", "neighbour_loss", "psnr", "neighbour_psnr")
    assert [found[name] for name in names] == pytest.approx(STORED[version, norm_target], rel=1e-4)


@pytest.mark.parametrize("stage", [0, -1])
def test_features_are_means_over_the_map_of_a_stage(stage):
    simmim = task().eval()
    randomise(simmim)
    images = torch.randn(2, 3, 32, 32)
    maps = simmim.encoder.forward_intermediates(images, norm=True, intermediates_only=True)
    assert torch.allclose(simmim.features(images, stage), maps[stage].mean((2, 3)), atol=1e-5)
    with pytest.raises(UsageError, match="stages 0 to 1"):
        simmim.features(images, 2)
