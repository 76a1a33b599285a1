"""What a Swin looks at: exact attention maps and rollout, class maps that find what they should, pictures, and mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.random_models import random_swin
from torch import Tensor

from swinscale.cli import main
from swinscale.data import normalisation
from swinscale.diagnose.explain import (
    attention,
    attention_distance,
    cam,
    deletion,
    integrated_gradients,
    intermediate_names,
    intermediates,
    position_bias,
    rollout,
    temperatures,
)
from swinscale.diagnose.explain_maps import evaluating
from swinscale.diagnose.explain_pictures import (
    draw_attention_distance,
    draw_bias_curves,
    draw_position_bias,
    draw_temperatures,
)
from swinscale.diagnose.explain_position import log_offsets
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.tasks import Classify, SimMIM

CLIP = {"img_size": (4, 32, 32), "patch_size": (2, 4, 4), "window_size": (2, 4, 4)}
MODELS = {
    "V1": {"version": 1},
    "V2": {"version": 2},
    "padded to small maps": {"version": 2, "small_map": "pad", "window_size": 7},
    "sandwich": {"version": 1, "norm_placement": "sandwich"},
    "clips": {"version": 2, **CLIP},
}


def model_and_input(name: str) -> tuple[SwinTransformer, Tensor]:
    """37×22 pixels: 10×6 and 5×3 tokens, padded to windows of 4, and in the second stage smaller than one."""
    model = random_swin(**MODELS[name])
    size = (37, 22) if model.config.rank == 2 else (4, 37, 22)
    return model, torch.randn(2, 3, *size)


def dense_attention(model: SwinTransformer, x: Tensor, stage: int, block: int) -> Tensor:
    """(B, A, L, L) between tokens in raster order by the definition, from coordinates instead of layouts."""
    config = model.config
    size = config.stage_maps(tuple(x.shape[2:]))[stage]
    window = config.stage_windows[stage]
    shift = [w // 2 for w in window]
    if config.small_map == "shrink":
        shift = [s if n > w else 0 for s, n, w in zip(shift, size, window, strict=True)]
        window = tuple(map(min, window, size))
    axes = torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], -1)
    apart = torch.zeros(len(places), len(places), dtype=torch.bool)
    for axis, (w, s) in enumerate(zip(window, shift, strict=True)):
        cut = (places[:, axis] + (w - s if block % 2 and s else 0)) // w  # shifted windows begin s tokens earlier
        apart |= cut[:, None] != cut
    attn = model.layers[stage].blocks[block].attn
    names = (f"layers.{stage}.blocks.{block - 1}", "embed") if block else (f"layers.{stage - 1}", "embed")
    points = intermediates(model, x, names if stage or block else ["embed"], "NHWC")
    tokens = points["embed"] if not stage and not block else points[names[0]]
    if stage and not block:
        tokens = model.layers[stage - 1].downsample(tokens)
    tokens = tokens.flatten(1, -2)
    if config.norm_placement in ("pre", "sandwich"):
        tokens = model.layers[stage].blocks[block].norm1(tokens)
    bias = attn.qkv.bias if not attn.cosine else torch.cat((attn.q_bias, 0 * attn.q_bias, attn.v_bias))
    q, k, _ = (tokens @ attn.qkv.weight.t() + bias).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
    if attn.cosine:
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        scale = attn.logit_scale.clamp(max=np.log(100)).exp()
    else:
        scale = q.shape[-1] ** -0.5
    table = attn.bias(window).values  # over query minus key, the last axis fastest
    trained = attn.window if attn.position_bias == "table" else window
    offset = (places[:, None] - places + torch.tensor([t - 1 for t in trained])).clamp(min=0)
    index = torch.zeros(apart.shape, dtype=torch.int64)
    for axis, t in enumerate(trained):
        index = index * (2 * t - 1) + offset[..., axis].clamp(max=2 * t - 2)
    logits = torch.einsum("bnad,bmad->banm", q, k) * scale + table[:, index]
    return logits.masked_fill(apart, -torch.inf).softmax(-1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_attention_is_the_row_of_the_softmax(name: str):
    """For regular and shifted windows, padded, on maps smaller than a window; in raster order, and 0 where nothing is seen."""
    model, x = model_and_input(name)
    for stage in range(2):
        for block in range(2):
            expected = dense_attention(model, x, stage, block)
            sizes = model.config.stage_maps(tuple(x.shape[2:]))[stage]
            strides = model.config.stage_strides()[stage]
            for token in (0, expected.shape[-1] // 2 + 1, expected.shape[-1] - 1):
                place = np.unravel_index(token, sizes)
                query = [int(p * s) for p, s in zip(place, strides, strict=True)]
                found = attention(model, x, stage, block, query)
                assert found.shape[2:] == sizes
                torch.testing.assert_close(found.flatten(2), expected[:, :, token], rtol=1e-4, atol=1e-6)
                assert (found.flatten(2)[expected[:, :, token] == 0] == 0).all()
                torch.testing.assert_close(found.flatten(2).sum(-1), torch.ones(found.shape[:2]))


def test_every_pixel_of_a_token_has_its_attention_and_no_other():
    model, x = model_and_input("V2")
    found = [attention(model, x, 0, 1, query) for query in ((8, 4), (11, 7), (12, 7))]
    assert found[0].equal(found[1])
    assert not found[1].equal(found[2])


def test_legacy_padding_takes_attention_from_the_map():
    model = random_swin(version=1, pad="legacy")
    x = torch.randn(1, 3, 20, 20)  # 5×5 tokens: the last window has one real column
    within, beside = (attention(model, x, 0, 0, query).sum((2, 3)) for query in ((0, 0), (19, 19)))
    torch.testing.assert_close(within, torch.ones(1, 2))
    assert (beside < 0.9).all()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rollout_is_the_product_of_the_matrices(name: str):
    """And so it conserves what it hands on."""
    model, x = model_and_input(name)
    maps = model.config.stage_maps(tuple(x.shape[2:]))
    last = torch.eye(maps[-1][0] * maps[-1][1] * (maps[-1][2] if len(maps[-1]) > 2 else 1)).expand(2, -1, -1)
    for stage in (1, 0):
        for block in (1, 0):
            mean = dense_attention(model, x, stage, block).mean(1)
            last = last @ (0.5 * mean + 0.5 * torch.eye(mean.shape[-1]))
        if stage:
            places = torch.stack(torch.meshgrid(*[torch.arange(n) for n in maps[0]], indexing="ij"), -1).flatten(0, -2)
            places[:, -2:] //= 2
            parent = torch.from_numpy(np.ravel_multi_index(tuple(places.t().numpy()), maps[1]))
            merged = torch.nn.functional.one_hot(parent, last.shape[-1]).t().float()
            last = last @ (merged / merged.sum(1, keepdim=True))
    torch.testing.assert_close(rollout(model, x).flatten(1), last.mean(1), rtol=1e-4, atol=1e-6)
    corner = [s - 1 for s in x.shape[2:]]
    torch.testing.assert_close(rollout(model, x, corner).flatten(1), last[:, -1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rollout(model, x).flatten(1).sum(1), torch.ones(2))


def test_large_attention_is_taken_in_portions(monkeypatch: pytest.MonkeyPatch):
    model, x = model_and_input("V2")
    whole, distances = rollout(model, x), attention_distance(model, x)
    monkeypatch.setattr("swinscale.diagnose.explain_attention.ENTRIES", 1500)
    torch.testing.assert_close(rollout(model, x), whole)
    for name, values in attention_distance(model, x).items():
        torch.testing.assert_close(values, distances[name])


@pytest.mark.parametrize("name", ["V1", "V2", "padded to small maps"])
@torch.no_grad()
def test_attention_distance_is_in_pixels(name: str):
    model, x = model_and_input(name)
    found = attention_distance(model, x)
    assert list(found) == [f"layers.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]
    for stage, size in enumerate(model.config.stage_maps((37, 22))):
        places = torch.stack(torch.meshgrid(*[torch.arange(n) * 4.0 * 2**stage for n in size], indexing="ij"), -1)
        distances = torch.cdist(places.flatten(0, -2), places.flatten(0, -2))
        for block in range(2):
            expected = (dense_attention(model, x, stage, block) * distances).sum(-1).mean((0, 2))
            torch.testing.assert_close(found[f"layers.{stage}.blocks.{block}"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_intermediates_are_those_of_the_forward_pass(name: str):
    model, x = model_and_input(name)
    names = intermediate_names(model)
    assert [n for n in names if "norm" not in n] == [
        "embed", "layers.0.blocks.0", "layers.0.blocks.1", "layers.0", "layers.1.blocks.0", "layers.1.blocks.1",
        "layers.1", "pre_pool",
    ]  # fmt: skip
    found = intermediates(model, x, names)
    last, stages = model.forward_intermediates(x)
    for stage in range(2):
        torch.testing.assert_close(found[f"layers.{stage}"], stages[stage])
        torch.testing.assert_close(found[f"layers.{stage}.blocks.1"], stages[stage])
    torch.testing.assert_close(found["pre_pool"].movedim(1, -1), last)
    channels_last = intermediates(model, x, names, "NHWC")
    torch.testing.assert_close(channels_last["embed"], model.embed(x))
    for point, value in found.items():
        assert channels_last[point].equal(value.movedim(1, -1))
    if model.config.norm_placement == "pre":
        # What the second block adds to the first one's output, without its attention: the MLP of norm2.
        block = model.layers[0].blocks[1]
        added = block.mlp(channels_last["layers.0.blocks.1.norm2"])
        without = channels_last["layers.0.blocks.1"] - added
        torch.testing.assert_close(block.norm2(without), channels_last["layers.0.blocks.1.norm2"], rtol=1e-4, atol=1e-4)


def test_intermediates_carry_gradients_and_leave_no_hook():
    model, x = model_and_input("V1")
    intermediates(model, x, "layers.0.blocks.1")["layers.0.blocks.1"].sum().backward()
    assert model.patch_embed.proj.weight.grad is not None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(UsageError, match=r"'layers\.0\.block\.1'.*Did you mean"):
        intermediates(model, x, ["layers.0.block.1"])
    with pytest.raises(UsageError, match="NCHW"):
        intermediates(model, x, ["embed"], "NLC")


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


@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("version", [1, 2])
def test_position_bias_is_the_attention_of_equal_tokens(version: int):
    """With queries and keys of zero, attention is the softmax of the bias, and says where each key is."""
    model = random_swin(version=version, img_size=32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "qkv" in name or "q_bias" in name:
                p.zero_()
    found = attention(model, torch.randn(1, 3, 32, 32), 0, 0, (4, 8))[0]  # the token in row 1, column 2
    bias = position_bias(model, 0, 0)
    assert bias.shape == (2, 7, 7)
    expected = bias[:, 3 - 1 : 3 + 3, 3 - 2 : 3 + 2].flatten(1).softmax(1).unflatten(1, (4, 4))
    torch.testing.assert_close(found[:, :4, :4], expected, rtol=1e-4, atol=1e-6)


def test_log_offsets_and_temperatures():
    model = random_swin(version=2)
    rows, columns = log_offsets(model, 0)
    expected = torch.arange(-3, 4)
    expected = expected.sign() * torch.log2(1 + 8 * expected.abs() / 3) / 3
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(columns, expected)
    found = temperatures(model)
    assert list(found) == [f"layers.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]
    scale = model.layers[1].blocks[0].attn.logit_scale.detach().flatten()
    torch.testing.assert_close(found["layers.1.blocks.0"], scale.clamp(max=np.log(100)).exp())
    with pytest.raises(UsageError, match="V1"):
        temperatures(random_swin(version=1))


def test_weights_are_drawn(tmp_path: Path):
    model = random_swin(version=2, num_heads=(2, 8))
    drawings = {
        "bias": draw_position_bias(model, 1, 0),
        "few": draw_bias_curves(model, 0, 0),
        "many": draw_bias_curves(model, 1, 0),
        "temperatures": draw_temperatures(model),
        "distance": draw_attention_distance(attention_distance(model, torch.randn(1, 3, 32, 32))),
    }
    for name, drawing in drawings.items():
        drawing.save(tmp_path / name)
        assert Image.open(tmp_path / f"{name}.png").width > 500
    assert "8 maps" in drawings["bias"].description
    assert "head 1, columns" in (tmp_path / "few.svg").read_text()
    assert "20 heads" in drawings["temperatures"].description
    with pytest.raises(UsageError, match="three axes"):
        draw_position_bias(random_swin(**CLIP), 0, 0)


def test_mistakes_say_what_is_allowed():
    model, x = model_and_input("V1")
    for wrong, said in (
        (lambda: attention(model, x, 2, 0, (0, 0)), "stage=2 .*stages 0 to 1"),
        (lambda: attention(model, x, 1, 5, (0, 0)), "block=5 .*stage 1 .*blocks 0 to 1"),
        (lambda: attention(model, x, 0, 0, (37, 0)), "query=37,0 .*37×22.*row 0 to 36, column 0 to 21"),
        (lambda: attention(model, x, 0, 0, (0, 0, 0)), "query=0,0,0"),
        (lambda: attention(torch.nn.Linear(2, 2), x, 0, 0, (0, 0)), "Linear is not a Swin"),
        (lambda: rollout(model, x, residual=1.5), "residual=1.5"),
        (lambda: rollout(model, x, (0, 22)), "column 0 to 21"),
        (lambda: cam(model, x, 5), "target=5 .*0 to 4"),
        (lambda: cam(model, x, [1, 2, 3]), "one for each of 2 images"),
        (lambda: cam(model, x, method="best"), "grad-cam, exact"),
        (lambda: cam(model, x, method="exact", point="embed"), "point='embed'"),
        (lambda: cam(random_swin(num_classes=0), x), "no classifier"),
        (lambda: integrated_gradients(model, x, steps=0), "steps=0"),
        (lambda: deletion(model, x, torch.zeros(2, 5, 3)), "one value per pixel"),
        (lambda: deletion(model, x, torch.zeros(2, 37, 22), cell=0), "cell=0"),
    ):
        with pytest.raises(UsageError, match=said):
            wrong()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier of three named classes, and a SimMIM model."""
    folder = tmp_path_factory.mktemp("explain")
    mean, std = normalisation(3)
    preprocessing = {"mean": list(mean), "std": list(std), "crop_ratio": 0.875}
    model = random_swin(version=2, num_classes=3)
    Classify(model, 3, preprocessing={**preprocessing, "classes": ["blue", "green", "red"]}).save_pretrained(
        folder / "c"
    )
    SimMIM(random_swin(version=1, num_classes=0), preprocessing=preprocessing).save_pretrained(folder / "m")
    return {"classifier": folder / "c", "simmim": folder / "m"}


def test_the_command_writes_the_picture(checkpoints: dict[str, Path], photos: Path, tmp_path: Path, capsys):
    arguments = [
        "explain",
        str(photos / "red/0.png"),
        "--checkpoint",
        str(checkpoints["classifier"]),
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--target", "green", "--query", "5,6", "--stage", "0", "--block", "1", "--head", "1"]) == 0
    said = capsys.readouterr().out
    assert "green" in said
    assert "8 random orders" in said
    svg = (tmp_path / "0_explained.svg").read_text()
    for text in (
        "For “green”",
        "Attention of ×, head 1",
        "row 5, column 6",
        "stage 0, block 1",
        "Rollout",
        "random order",
    ):
        assert text in svg, text
    image = np.asarray(Image.open(tmp_path / "0_explained.png").convert("RGB"))
    assert image.shape[1] > 1000
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 500
    assert main([*arguments, "--target", "2", "--method", "grad-cam"]) == 0
    assert "red" in capsys.readouterr().out


def test_a_model_without_classes_is_explained_too(checkpoints: dict[str, Path], photos: Path, tmp_path: Path, capsys):
    arguments = [
        "explain",
        str(photos / "red/0.png"),
        "--checkpoint",
        str(checkpoints["simmim"]),
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    assert "row 16, column 16" in capsys.readouterr().out  # the centre
    svg = (tmp_path / "0_explained.svg").read_text()
    assert "Rollout" in svg
    assert "Deletion" not in svg


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--target", "gren"], "Did you mean 'green'"),
        (["--target", "3"], "0 to 2"),
        (["--method", "lime"], "integrated-gradients, grad-cam, exact"),
        (["--query", "32,0"], "row 0 to 31"),
        (["--query", "7"], "row and column"),
        (["--stage", "2"], "stages 0 to 1"),
        (["--block", "2"], "blocks 0 to 1"),
        (["--head", "4"], "heads 0 to 1"),
        (["--head", "-1"], "whole number"),
    ],
)
def test_wrong_values_end_in_one_line(checkpoints: dict[str, Path], photos: Path, capsys, more: list[str], said: str):
    arguments = ["explain", str(photos / "red/0.png"), "--checkpoint", str(checkpoints["classifier"]), *more]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("swinscale: ")
    assert error.count("\n") == 1
    assert said in error


def test_missing_pictures_and_classes_end_in_one_line(
    checkpoints: dict[str, Path], photos: Path, tmp_path: Path, capsys
):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    simmim = ["--checkpoint", str(checkpoints["simmim"])]
    for arguments, said in (
        ([str(tmp_path / "none.jpg"), *simmim], "No such picture"),
        ([str(broken), *simmim], "broken.jpg"),
        ([str(photos / "red/0.png"), *simmim, "--target", "red"], "no classes"),
    ):
        assert main(["explain", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
