"""SwinMLP gives the numbers of a plain network that pads the map where ours looks at regions; its names, counts, limits."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from random_models import SMALL_MLP, random_mlp
from swinscale.config import from_dict, to_dict
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer, create_model, list_models, model_config, plan
from swinscale.models.init import initial_values
from swinscale.models.swin_mlp import SwinMLP, SwinMLPConfig

PUBLISHED = {  # parameters; millions of them and GMAC as published
    "swin_mixer_tiny_c24_patch4_window8_256": (20_386_632, 20, 4.0),
    "swin_mixer_tiny_c12_patch4_window8_256": (21_152_072, 21, 4.0),
    "swin_mixer_tiny_c6_patch4_window8_256": (22_682_952, 23, 4.0),
    "swin_mixer_base_patch4_window7_224": (60_659_416, 61, 10.4),
}
CLIP = {
    "img_size": (8, 16, 16),
    "patch_size": (2, 2, 2),
    "window_size": (2, 3, 3),
    "depths": (2, 2),
    "num_heads": (2, 4),
}


def plain(model: SwinMLP, x: Tensor) -> Tensor:
    """Logits by loops over windows of a map in raster order, padded with zeros around it; reads names, never our modules."""
    config, weights = model.config, dict(model.named_parameters())
    conv = F.conv2d if config.rank == 2 else F.conv3d

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def lines(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def pad_end(x: Tensor, multiples: tuple[int, ...]) -> Tensor:
        missing = [-n % m for n, m in zip(x.shape[1:-1], multiples, strict=True)]
        return F.pad(x, [0, 0, *(v for m in reversed(missing) for v in (0, m))])

    x = x.movedim(1, -1)
    x = pad_end(x, config.patch_size).movedim(-1, 1)
    x = conv(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=config.patch_size)
    x = norm(x.movedim(1, -1), "patch_embed.norm")
    for stage, depth in enumerate(config.depths):
        heads, window = config.num_heads[stage], config.stage_windows[stage]
        for index in range(depth):
            block, size = f"layers.{stage}.blocks.{index}", x.shape[1:-1]
            shift = [w // 2 if index % 2 and (n > w or config.small_map == "pad") else 0 for n, w in zip(size, window, strict=True)]  # fmt: skip
            padded = pad_end(norm(x, f"{block}.norm1"), window)
            around = [(w - s, s) if s else (0, 0) for w, s in zip(window, shift, strict=True)]
            padded = F.pad(padded, [0, 0, *(v for pair in reversed(around) for v in pair)])
            mixed = torch.zeros_like(padded)
            starts = (range(0, n, w) for n, w in zip(padded.shape[1:-1], window, strict=True))
            for corner in itertools.product(*starts):
                place = (slice(None), *(slice(c, c + w) for c, w in zip(corner, window, strict=True)))
                tokens = padded[place].flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, A, N, d)
                spatial = f"{block}.spatial_mlp"
                out = F.conv1d(
                    tokens.flatten(1, 2), weights[f"{spatial}.weight"], weights[f"{spatial}.bias"], groups=heads
                )
                mixed[place] = out.unflatten(1, (heads, -1)).transpose(1, 2).flatten(2).unflatten(1, window)
            inside = tuple(slice(before, before + n) for (before, _), n in zip(around, size, strict=True))
            x = x + mixed[(slice(None), *inside)]
            x = x + lines(F.gelu(lines(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        if stage + 1 < len(config.depths):
            x = pad_end(x, config.merging)
            quarters = [x[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
            x = lines(
                norm(torch.cat(quarters, -1), f"layers.{stage}.downsample.norm"), f"layers.{stage}.downsample.reduction"
            )
    return lines(norm(x, "norm").flatten(1, -2).mean(1), "head")


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


SIZES = [
    (32, 32),  # as trained
    (64, 48),  # larger: the last stage has several windows, which shift
    (37, 22),  # no whole windows
    (9, 50),  # maps of 5, 3 and 2 rows: smaller than a window
    (1, 1),
    (100, 120),  # 3000 tokens: in evaluation a few windows at a time
]


@pytest.mark.parametrize("fields", [{}, {"window_size": 5}, {"pad": "legacy", "small_map": "pad"}], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_equal_those_of_a_map_padded_around(size, fields):
    model, x = random_mlp(**fields), torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = plain(model, x)
        assert distance(model(x), expected) <= 1e-5
        assert expected.std() > 0.01
    assert distance(model(x), expected) <= 1e-5  # with gradients all windows at once


@pytest.mark.parametrize("size", [(8, 16, 16), (3, 19, 31), (1, 5, 40)], ids=str)
def test_clips_are_mixed_in_windows_of_time_and_space(size):
    model, x = random_mlp(**CLIP), torch.randn(2, 3, *size)
    assert distance(model(x), plain(model, x)) <= 1e-5


def test_gradients_equal_those_of_a_map_padded_around():
    model, x = random_mlp(), torch.randn(2, 3, 37, 44)
    grads = []
    for network in (model, lambda x: plain(model, x)):
        model.zero_grad()
        network(x).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-4 * grads[1][name].norm(), name


def test_windows_shift():
    """The last block of the first stage lets a token see those beside its window; without it, nothing gets there."""
    model = random_mlp(depths=(2,), num_heads=(2,), num_classes=0)
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    seen = {}
    for blocks in (2, 1):
        model.layers[0].blocks = model.layers[0].blocks[:blocks]
        (grad,) = torch.autograd.grad(model.forward_features(x)[0, 3, 3].sum(), x)
        seen[blocks] = grad[0].abs().sum(0).view(16, 2, 16, 2).sum((1, 3)) > 0
    assert seen[1][:4, :4].all()
    assert seen[1].sum() == 16
    assert seen[2][:8, :8].all()
    assert seen[2].sum() == 64


def closed_form(config: SwinMLPConfig) -> int:
    total = 48 * config.embed_dim + 3 * config.embed_dim
    for stage, (depth, heads, (side, _)) in enumerate(zip(config.depths, config.num_heads, config.stage_windows, strict=True)):  # fmt: skip
        dim, tokens = config.embed_dim * 2**stage, side**2
        total += depth * (heads * tokens * (tokens + 1) + 8 * dim**2 + 9 * dim)
        total += 8 * dim**2 + 8 * dim if stage < 3 else 2 * dim + 1000 * dim + 1000
    return total


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_operations_are_the_published_ones(name):
    parameters, millions, gmac = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(name)
        x = torch.empty(1, 3, *model.config.img_size)
    assert isinstance(model, SwinMLP)
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters == closed_form(model.config)
    assert round(count / 1e6) == millions
    with FlopCounterMode(display=False) as counter:
        model(x)
    costs = plan(model.config)
    assert counter.get_total_flops() == costs.flops
    assert costs.parameters == count
    # Theirs counts the windows over the zeros around the map as well.
    assert costs.macs / 1e9 == pytest.approx(gmac, abs=0.06)


def test_names_and_shapes_are_those_of_the_published_file():
    model = SwinMLP(
        SwinMLPConfig(img_size=64, embed_dim=16, depths=(2, 1), num_heads=(2, 4), window_size=8, num_classes=3)
    )
    block = {"norm1.weight": (16,), "norm1.bias": (16,), "spatial_mlp.weight": (2 * 64, 64, 1), "spatial_mlp.bias": (128,),
             "norm2.weight": (16,), "norm2.bias": (16,), "mlp.fc1.weight": (64, 16), "mlp.fc1.bias": (64,),
             "mlp.fc2.weight": (16, 64), "mlp.fc2.bias": (16,)}  # fmt: skip
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for index in range(2):
        start = f"layers.0.blocks.{index}."
        assert {n.removeprefix(start): s for n, s in shapes.items() if n.startswith(start)} == block
    assert shapes["layers.1.blocks.0.spatial_mlp.weight"] == (4 * 64, 64, 1)
    assert list(shapes)[-4:] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert shapes["layers.0.downsample.reduction.weight"] == (32, 64)


def test_every_parameter_has_its_published_first_value():
    with torch.device("meta"):
        later = SwinMLP(SwinMLPConfig(**SMALL_MLP))
    model = SwinMLP(SwinMLPConfig(**SMALL_MLP))
    model.init_weights(3)
    values = dict(initial_values(later, 3))
    assert all(p.is_meta for p in later.parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, values[name]), name
        if "spatial_mlp.weight" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.1)
        if "spatial_mlp.bias" in name:
            assert not p.any()
    torch.manual_seed(0)
    first = SwinMLP(SwinMLPConfig(**SMALL_MLP)).state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(t, first[n]) for n, t in SwinMLP(SwinMLPConfig(**SMALL_MLP)).state_dict().items())


def test_a_record_tells_it_from_a_swin():
    config = SwinMLPConfig(**SMALL_MLP)
    record = json.loads(json.dumps(to_dict(config)))
    assert from_dict(SwinMLPConfig, record) == config
    assert type(SwinMLP(config).config) is SwinMLPConfig
    assert config != SwinConfig(version=1, **SMALL_MLP)
    with pytest.raises(UsageError, match="Unknown setting 'token_mixing'"):
        from_dict(SwinConfig, record)


@pytest.mark.parametrize(
    "field", [{"version": 2}, {"position_bias": "log"}, {"similarity": "cosine"}, {"qkv_bias": False},
              {"attn_drop_rate": 0.1}, {"token_mixing": "attention"}], ids=str)  # fmt: skip
def test_settings_of_attention_are_refused(field):
    (name,) = field
    with pytest.raises(UsageError, match=rf"^{name}=\S+ is not allowed: SwinMLP has \S+\. Leave it out\.$"):
        SwinMLPConfig(**SMALL_MLP, **field)


def test_a_way_to_compute_attention_is_refused():
    model = random_mlp()
    model.set_attention_backend("auto")
    for name in ("sdpa", ("auto", "eager", "auto")):
        with pytest.raises(UsageError, match="SwinMLP has no attention"):
            model.set_attention_backend(name)


def test_names_are_listed_and_take_settings():
    assert set(PUBLISHED) == set(list_models("swin_mixer"))
    assert model_config("swin_mixer_base_patch4_window7_224").drop_path_rate == 0.5
    small = create_model("swin_mixer_tiny_c6_patch4_window8_256", img_size=64, num_classes=3, depths=(1, 1, 1, 1))
    assert small(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    assert [s.num_heads for stage in small.layers for s in stage.blocks] == [16, 32, 64, 128]


def test_it_serves_as_a_backbone():
    model, x = random_mlp(), torch.randn(2, 3, 37, 44)
    last, maps = model.forward_intermediates(x)
    assert isinstance(model, SwinTransformer)
    assert torch.equal(last, model.forward_features(x))
    for info, feature, dim, grid in zip(model.feature_info, maps, (12, 24, 48), model.config.stage_maps((37, 44)), strict=True):  # fmt: skip
        assert feature.shape == (2, dim, *grid)
        assert info["num_chs"] == dim
    assert len(model.units()) == 7 + 2
    assert model.no_weight_decay() == set()
    ids = [model.config.layer_id(name) for name, _ in model.named_parameters()]
    assert set(ids) == set(range(model.config.num_layers + 1))
    model.reset_classifier(2)
    assert model(x).shape == (2, 2)


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_checkpointing_changes_no_gradient(mode):
    model, x = random_mlp().train(), torch.randn(2, 3, 40, 36)
    grads = []
    for chosen in ("none", mode):
        model.set_grad_checkpointing(chosen)
        model.zero_grad()
        torch.manual_seed(0)  # stochastic depth
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_it_learns():
    """Four pictures whose classes are told by where a bright spot is: mixing within and between windows has to do it."""
    torch.manual_seed(0)
    model = SwinMLP(SwinMLPConfig(**{**SMALL_MLP, "drop_path_rate": 0.0}, num_classes=4)).train()
    x = torch.randn(4, 3, 32, 32) * 0.1
    for index, (row, column) in enumerate(itertools.product((2, 20), (2, 20))):
        x[index, :, row : row + 8, column : column + 8] += 1
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    first = F.cross_entropy(model(x), torch.arange(4)).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        optimizer.step()
    assert first == pytest.approx(math.log(4), abs=0.2)
    assert loss.item() < 0.1


def test_reduced_precision_stays_near():
    model, x = random_mlp(), torch.randn(2, 3, 37, 44)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(model(x).float(), expected) < 0.03
        assert distance(model.bfloat16()(x.bfloat16()).float(), expected) < 0.06
