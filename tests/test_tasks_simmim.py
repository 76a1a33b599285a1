"""SimMIM: loss, targets, any number of channels, rectangular images, and equality with transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.tasks import SimMIM, SimMIMConfig, normalise_locally


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
