"""LR-Net: published sizes, the contract of every backbone, any input size, first values (SPEC 6)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from random_models import randomise
from swinscale.errors import UsageError
from swinscale.models import LRNet, LRNetConfig, create_model, list_models, model_config
from swinscale.models.lrnet import LocalRelation

NAMES = list_models("lrnet")
SMALL = LRNetConfig(
    32,
    num_classes=5,
    depths=(2, 1),
    widths=(12, 16),
    stage_dims=(24, 32),
    stem_width=8,
    kernel_size=3,
    shared_channels=8,
)


def small(**fields: object) -> LRNet:
    """A random LR-Net of two stages; 12 channels are a group of 8 and one of 4."""
    net: LRNet = randomise(LRNet(replace(SMALL, **fields)))  # type: ignore[arg-type]
    return net


def on_meta(name: str) -> LRNet:
    with torch.device("meta"):
        net: LRNet = create_model(name)
    return net


@pytest.mark.parametrize(
    ("name", "millions", "published", "gmac"),
    [("lrnet26", 14.62, 14.7, 2.6), ("lrnet50", 23.40, 23.3, 4.3), ("lrnet101", 40.85, 42, 8.0)],
)
def test_sizes_are_the_published_ones(name: str, millions: float, published: float, gmac: float):
    """SPEC 6.2: parameters of the articles within 3 %; operations, which count in ways of their own, within 10 %."""
    count = sum(p.numel() for p in on_meta(name).parameters()) / 1e6
    assert round(count, 2) == millions and count == pytest.approx(published, rel=0.03)
    assert sum(model_config(name).macs()) / 1e9 == pytest.approx(gmac, rel=0.1)


def closed_form(config: LRNetConfig) -> int:
    """Parameters by arithmetic."""

    def relation(dim: int) -> int:
        groups = math.ceil(dim / config.shared_channels)
        return dim * (2 * groups + dim) + groups + config.prior_hidden * (3 + groups)

    first = config.stem_width
    total, before = first * (config.in_chans + 4) + relation(first), first
    for depth, width, dim in zip(config.depths, config.widths, config.stage_dims, strict=True):
        for block in range(depth):
            total += before * width + relation(width) + width * dim + 4 * width + 2 * dim
            total += before * dim + 2 * dim if not block else 0
            before = dim
    return total + (before + 1) * config.num_classes


@pytest.mark.parametrize("name", NAMES)
def test_contract_of_every_variant(name: str):
    """As of the Swins: shapes, feature_info and the pyramid agree; parameters are those of the formula."""
    net = on_meta(name).eval()
    config = net.config
    x = torch.empty(2, config.in_chans, *config.img_size, device="meta")
    last, maps = net.forward_intermediates(x)
    assert net(x).shape == (2, config.num_classes)
    assert last.shape == net.forward_features(x).shape == (2, *config.stage_maps()[-1], net.num_features)
    for info, feature, dim, grid in zip(net.feature_info, maps, config.stage_dims, config.stage_maps(), strict=True):
        assert feature.shape == (2, dim, *grid) and info["num_chs"] == dim
        assert grid[0] == -(-config.img_size[0] // info["reduction"])
        assert net.get_submodule(str(info["module"]))
    assert sum(p.numel() for p in net.parameters()) == closed_form(config)


def test_macs_are_those_of_the_layers():
    """Counted by hooks on the 1×1 layers, and per place for the aggregation."""
    net, size, counted = small(), (21, 34), [0]

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(layer, nn.Conv2d) and out.shape[-1] != layer_grid:
            counted[0] += layer.weight.numel() * out.shape[-2:].numel()
        if isinstance(layer, LocalRelation):
            dim = layer.proj.weight.shape[0]
            counted[0] += (dim + math.ceil(dim / 8)) * 9 * out.shape[-2:].numel()

    layer_grid = 3  # the prior reads a grid of 3×3 offsets; no map here is as wide
    for layer in net.modules():
        layer.register_forward_hook(count)
    net(torch.randn(1, 3, *size))
    assert counted[0] + 32 * 5 == sum(net.config.macs(size))


NETS = {stride: small(stem_stride=stride) for stride in (1, 2, 4)}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(height=st.integers(1, 50), width=st.integers(1, 50), stride=st.sampled_from([1, 2, 4]), train=st.booleans())
def test_every_size_works(height: int, width: int, stride: int, train: bool):
    """R-SIZE-1."""
    net = NETS[stride].train(train)
    with torch.set_grad_enabled(train):
        last, maps = net.forward_intermediates(torch.randn(2, 3, height, width))
    for stage, feature in enumerate(maps):
        assert feature.shape[2:] == tuple(math.ceil(n / (stride * 2**stage)) for n in (height, width))
    assert last.isfinite().all()
    if train:
        last.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("similarity", ["product", "squared", "absolute"])
def test_every_parameter_learns(similarity: str):
    net = small(similarity=similarity).train()
    net(torch.randn(4, 3, 24, 20)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_a_layer_sees_its_neighbourhood_alone():
    layer = randomise(LocalRelation(SMALL, 12, 2))
    x = torch.randn(1, 12, 9, 9)
    changed = x.clone()
    changed[0, :, 4, 4] += 1
    reached = (layer(x) - layer(changed)).abs().amax(1)[0] > 1e-6
    assert reached.nonzero().tolist() == [[2, 2]]  # of 3×3 around the places 0, 2, 4, …
    changed[0, :, 4, 4], changed[0, :, 3, 4] = x[0, :, 4, 4], x[0, :, 3, 4] + 1
    assert ((layer(x) - layer(changed)).abs().amax(1)[0] > 1e-6).nonzero().tolist() == [[1, 2], [2, 2]]


def test_intermediates():
    net = small()
    x = torch.randn(2, 3, 32, 32)
    last, maps = net.forward_intermediates(x)
    assert torch.equal(last, net.forward_features(x))
    one = net.forward_intermediates(x, indices=[-1, 0], intermediates_only=True)
    assert torch.equal(one[0], maps[1]) and torch.equal(one[1], maps[0])
    two = net.forward_intermediates(x, indices=2, output_fmt="NHWC", norm=True, intermediates_only=True)
    assert torch.equal(two[0].movedim(-1, 1), maps[0]) and torch.equal(two[1], last)
    calls: list[int] = []
    net.layers[1].register_forward_hook(lambda *_: calls.append(1))
    early, only = net.forward_intermediates(x, indices=[0], stop_early=True)
    assert not calls and torch.equal(only[0], maps[0]) and early.shape[-1] == 24
    for wrong in ([2], [-3], 0):
        with pytest.raises(UsageError, match="stages 0 to 1"):
            net.forward_intermediates(x, indices=wrong)
    with pytest.raises(UsageError, match="output_fmt='HWC'"):
        net.forward_intermediates(x, output_fmt="HWC")  # type: ignore[arg-type]


def test_classifier_is_replaced_and_removed():
    net = small()
    x = torch.randn(1, 3, 32, 32)
    net.reset_classifier(7)
    assert net(x).shape == (1, 7) and net.config.num_classes == net.num_classes == 7
    net.reset_classifier(0)
    assert torch.equal(net(x), net.forward_head(net.forward_features(x), pre_logits=True))
    assert net(x).shape == (1, net.head_hidden_size) and isinstance(net.get_classifier(), nn.Identity)


def test_evaluation_repeats_and_states_go_round():
    net, other = small(in_chans=4), LRNet(small(in_chans=4).config).eval()
    x = torch.randn(3, 4, 20, 30)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), net(x)) and torch.equal(other(x), net(x))
    alone = torch.cat([net(one[None]) for one in x])
    assert torch.allclose(alone, net(x), atol=1e-5)


def test_init_weights_reaches_every_parameter():
    """The same from a seed, whether the model was built on meta or not; a block starts as its shortcut."""
    with torch.device("meta"):
        net = LRNet(SMALL)
    net.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    net.init_weights(3)
    eager = LRNet(SMALL)
    eager.init_weights(3)
    for (name, one), other in zip(net.state_dict().items(), eager.state_dict().values(), strict=True):
        assert one.isfinite().all() and torch.equal(one, other), name
    block, x = net.layers[0].blocks[1].eval(), torch.rand(1, 24, 8, 8)
    assert torch.equal(block(x), x)
    eager.init_weights(4)
    assert not torch.equal(net.head.weight, eager.head.weight)


def test_depth_of_every_parameter():
    names = {name for name, _ in small().named_parameters()}
    depths = {
        "stem.relation.query.weight": 0,
        "layers.0.blocks.1.relation.prior.0.weight": 2,
        "layers.1.blocks.0.shortcut.1.bias": 3,
        "head.weight": 4,
    }
    assert depths.keys() <= names and {name: SMALL.layer_id(name) for name in depths} == depths
    assert {SMALL.layer_id(name) for name in names} == set(range(SMALL.num_layers + 1))
    assert {n for n in names if ".prior." in n} == small().no_weight_decay()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"depths": (1, 1)}, "same number of stages"),
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"similarity": "cosine"}, "similarity='cosine'"),
        ({"stem_stride": 3}, "stem_stride=3"),
        ({"shared_channels": 0}, "shared_channels=0"),
        ({"img_size": "big"}, "img_size='big'"),
        ({"num_classes": -1}, "num_classes=-1"),
    ],
)
def test_configurations_that_cannot_be(fields: dict[str, object], words: str):
    with pytest.raises(UsageError) as error:
        LRNetConfig(**fields)  # type: ignore[arg-type]
    assert words in str(error.value) and "\n" not in str(error.value)


def test_unknown_settings_and_inputs_are_named():
    with pytest.raises(UsageError, match=r"'window_size'. .*kernel_size"):
        create_model("lrnet26", window_size=7)
    with pytest.raises(UsageError, match=r"Did you mean 'lrnet101'"):
        create_model("lrnet110")
    for shape in ((3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (1, 3, 4, 32, 32)):
        with pytest.raises(UsageError, match="3 channels"):
            small()(torch.zeros(shape))
