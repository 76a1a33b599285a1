"""What speaks for a class: maps that find what they should, and the check that tells them from chance."""

from __future__ import annotations

import pytest
import torch
from tests.random_models import VARIETY, model_and_input
from torch import Tensor

from swinscale.diagnose.explain import (
    attention,
    cam,
    deletion,
    integrated_gradients,
    intermediates,
)
from swinscale.diagnose.explain_maps import evaluating
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.tasks import Classify


def blobs(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """64-pixel noise with a dark (0) or bright (1) square of 16 pixels; labels, and each square's first row and column."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 64, 64, generator=generator) * 0.3
    places = torch.randint(0, 49, (count, 2), generator=generator)
    labels = torch.arange(count) % 2
    for image, (row, column), label in zip(images, places.tolist(), labels.tolist(), strict=True):
        image[0, row : row + 16, column : column + 16] += 4.0 * label - 2
    return images, labels, places


@pytest.fixture(scope="module", params=[1, 2])
def detector(request: pytest.FixtureRequest) -> SwinTransformer:
    """A Swin that has learnt to tell dark squares from bright ones, with windows too small to spread the news."""
    torch.manual_seed(0)
    config = SwinConfig(
        version=request.param, img_size=64, patch_size=4, in_chans=1, num_classes=2, embed_dim=16, depths=(1, 1),
        num_heads=(1, 2), window_size=((4, 4), (2, 2)), drop_path_rate=0.0,
    )  # fmt: skip
    model = SwinTransformer(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        images, labels, _ = blobs(step, 32)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def test_the_peak_of_a_class_map_is_inside_the_blob(detector: SwinTransformer):
    images, labels, places = blobs(1000, 32)
    assert (detector(images).argmax(1) == labels).sum() >= 30
    maps = cam(detector, images, labels)
    assert maps.shape == (32, 64, 64)
    peaks = maps.flatten(1).argmax(1)
    found = torch.stack((peaks // 64, peaks % 64), 1)
    # A token has 8 pixels: its centre may lie half a token beside the square it belongs to.
    assert ((found >= places - 4) & (found < places + 20)).all()


def test_deletion_tells_a_class_map_from_a_random_order(detector: SwinTransformer):
    images, labels, _ = blobs(2000, 8)
    maps = cam(detector, images, labels)
    found = deletion(detector, images, maps, labels)
    assert found.share[0] == 0
    assert found.share[-1] == 1
    assert found.probability.shape == (8, 17)
    assert found.random.shape == (8, 8, 17)
    truth = detector(images).softmax(1)[torch.arange(8), labels].detach()
    torch.testing.assert_close(found.probability[:, 0], truth)
    # Everything is gone at the end, in whatever order.
    torch.testing.assert_close(found.random[:, :, -1], found.probability[:, -1].expand(8, -1))
    by_map, chance = found.auc, found.random_auc
    assert (by_map < chance.amin(0)).all()
    assert (deletion(detector, images, -maps, labels, repeats=1).auc > by_map).all()
    again = deletion(detector, images, maps, labels, repeats=1)
    assert again.probability.equal(found.probability)
    assert deletion(detector, images, maps, labels, repeats=1).random.equal(again.random)
    assert not deletion(detector, images, maps, labels, repeats=1, seed=1).random.equal(again.random)


@pytest.mark.parametrize("name", VARIETY)
def test_the_exact_map_sums_to_the_logit(name: str):
    model, x = model_and_input(name)
    maps = cam(model, x, [3, 1], method="exact", upsample=False)
    logits = model(x).detach()[torch.arange(2), torch.tensor([3, 1])] - model.head.bias.detach()[[3, 1]]
    torch.testing.assert_close(maps.flatten(1).sum(1), logits, rtol=1e-4, atol=1e-5)
    # The classifier is linear, so that Grad-CAM at the map it reads gives the same numbers.
    same = cam(model, x, [3, 1], method="grad-cam", point="pre_pool", upsample=False)
    torch.testing.assert_close(same, maps, rtol=1e-4, atol=1e-6)
    predicted = model(x).argmax(1)
    found = cam(model, x)
    assert found.equal(cam(model, x, predicted))
    assert found.shape == (2, *x.shape[2:])


@pytest.mark.parametrize("name", VARIETY)
def test_grad_cam_in_window_order_is_that_of_the_map(name: str):
    """Against the article's formula, with the rest of the network run on the map in raster order."""
    model, x = model_and_input(name)
    features = intermediates(model, x, "layers.1", "NHWC")["layers.1"].detach().requires_grad_()
    model.head(model.norm(features).flatten(1, -2).mean(1))[:, 2].sum().backward()
    weights = features.grad.flatten(1, -2).mean(1)
    expected = torch.stack([f @ w for f, w in zip(features.detach(), weights, strict=True)])
    for point in ("layers.1.blocks.1", None):  # in window order, and the default
        found = cam(model, x, 2, method="grad-cam", point=point, upsample=False)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["V1", "clips"])
def test_integrated_gradients_are_complete(name: str):
    model, x = model_and_input(name)
    values = integrated_gradients(model, x, 1, baseline=torch.zeros(()), steps=64)
    difference = (model(x) - model(torch.zeros_like(x)))[:, 1].detach()
    assert values.shape == (2, *x.shape[2:])
    torch.testing.assert_close(values.flatten(1).sum(1), difference, rtol=0.03, atol=0.01)


def test_nothing_about_the_model_changes():
    """Its mode, its gradients, its checkpointing; and a task, frozen weights and inference mode are as good."""
    model, x = model_and_input("V2")
    model.set_grad_checkpointing("block")
    model.train()
    task = Classify(model, 5)
    expected = cam(task, x, 1, method="grad-cam")
    assert model.training
    assert model.layers[0].blocks[0].checkpointing == "block"
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    with torch.inference_mode():
        torch.testing.assert_close(cam(task, x.clone(), 1, method="grad-cam"), expected)
        attention(task, x, 0, 0, (0, 0))
        integrated_gradients(task, x.clone(), 1, steps=2)
    model.layers[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.layers[0].training
    assert not model.layers[1].training
