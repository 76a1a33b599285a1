"""The same numbers as timm, torchvision and transformers on copied weights, with every parameter random.

Where a peer is known to be wrong or different, the switch that replays it is in the test: torchvision pads small maps up to
the window, transformers leaves padding unmasked, timm pads after the roll (so it is compared at sizes without padding).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinscale.models import SwinConfig, SwinTransformer, model_config, variants
from swinscale.models.windows import position_code, relative_coords
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import convert_state_dict, load_weights

ensure_torchvision()


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Random values of the size they have in trained models, none of them trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            matrix = p.ndim > 1 and "logit_scale" not in name and "bias_table" not in name
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if matrix else 0.3, generator=generator)
            if name.endswith("weight") and p.ndim == 1:
                p.add_(1)
            if "logit_scale" in name:
                p.add_(math.log(10))
    return model.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


V1_TINY = model_config("swin_tiny_patch4_window7_224", num_classes=10, drop_path_rate=0.0)
V2_TINY = model_config("swinv2_tiny_window8_256", num_classes=10, drop_path_rate=0.0)
V2_BASE = model_config("swinv2_base_window12to16_192to256", num_classes=10, drop_path_rate=0.0)


def timm_peer(config: SwinConfig) -> nn.Module:
    import timm

    names = {
        96: ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"),
        128: ("", "swinv2_base_window12to16_192to256"),
    }
    name = names[config.embed_dim][config.version - 1]
    return timm.create_model(name, num_classes=10, img_size=config.img_size, drop_path_rate=0.0)


def transformers_peer(config: SwinConfig) -> nn.Module:
    import transformers

    kind = "Swin" if config.version == 1 else "Swinv2"
    more = {}
    if config.version == 2:
        more = {"pretrained_window_sizes": [w[0] for w in config.pretrained_window_sizes]}
    peer_config = getattr(transformers, f"{kind}Config")(
        image_size=config.img_size[0], embed_dim=config.embed_dim, depths=list(config.depths), drop_path_rate=0.0,
        num_heads=list(config.num_heads), window_size=config.window_size[0][0], num_labels=10, **more,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForImageClassification")(peer_config)


def torchvision_peer(config: SwinConfig) -> nn.Module:
    from torchvision.models import swin_transformer

    build = {1: swin_transformer.swin_t, 2: swin_transformer.swin_v2_t}[config.version]
    return build(weights=None, num_classes=10)


PEERS = {"timm": timm_peer, "transformers": transformers_peer, "torchvision": torchvision_peer}


def pair(peer: str, config: SwinConfig) -> tuple[SwinTransformer, nn.Module]:
    theirs = randomise(PEERS[peer](config))
    ours = SwinTransformer(config).eval()
    assert load_weights(ours, theirs.state_dict(), config=config).share == 1
    # The same coordinates but for the last bit, which can switch a hidden unit at its kink.
    for module in theirs.modules():
        table = getattr(module, "relative_coords_table", None)
        if table is not None:
            window = tuple((n + 1) // 2 for n in table.shape[1:3])
            stage = next(s for s in range(len(config.depths)) if config.num_heads[s] == heads_of(module))
            coords = relative_coords(window, config.trained_windows[stage], "log", table.device).view_as(table)
            assert (table - coords).abs().max() <= 1e-6
            table.copy_(coords)
    return ours, theirs


def heads_of(module: nn.Module) -> int:
    return getattr(module, "num_heads", None) or module.num_attention_heads


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out.logits if hasattr(out, "logits") else out


# (peer, configuration for that peer, input size); the second size of each is one that the model was not built for where
# the peer can do that, else a second model.
PADDED = {"pad": "legacy"}
TV = {"pad": "legacy", "small_map": "pad-noshift"}
CASES = [
    ("timm", V1_TINY, (224, 224)),
    ("timm", dataclasses.replace(V1_TINY, img_size=448), (448, 448)),
    ("timm", V2_TINY, (256, 256)),
    ("timm", dataclasses.replace(V2_TINY, img_size=512), (512, 512)),
    ("timm", dataclasses.replace(V2_TINY, img_size=(256, 512)), (256, 512)),
    ("timm", V2_BASE, (256, 256)),
    ("timm", dataclasses.replace(V2_BASE, img_size=512), (512, 512)),
    ("transformers", V1_TINY, (224, 224)),
    ("transformers", dataclasses.replace(V1_TINY, **PADDED), (264, 232)),
    ("transformers", V2_TINY, (256, 256)),
    ("transformers", dataclasses.replace(V2_TINY, img_size=320, **PADDED), (320, 320)),
    ("transformers", V2_BASE, (256, 256)),
    ("transformers", dataclasses.replace(V2_BASE, img_size=512), (512, 512)),
    ("torchvision", dataclasses.replace(V1_TINY, **TV), (224, 224)),
    ("torchvision", dataclasses.replace(V1_TINY, **TV), (232, 100)),
    ("torchvision", dataclasses.replace(V2_TINY, **TV), (256, 256)),
    ("torchvision", dataclasses.replace(V2_TINY, **TV), (120, 204)),
]


def name(case: tuple[str, SwinConfig, tuple[int, int]]) -> str:
    peer, config, size = case
    return f"{peer}-v{config.version}-{config.embed_dim}-{size[0]}x{size[1]}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_outputs(case):
    """≤ 1e-5 relative (R-REP-1)."""
    peer, config, size = case
    ours, theirs = pair(peer, config)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert relative(ours(x), logits(theirs, x)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c[2] in ((224, 224), (256, 256))], ids=name)
def test_gradients(case):
    """≤ 1e-4 relative for the input and for every parameter."""
    peer, config, size = case
    ours, theirs = pair(peer, config)
    x = torch.randn(1, 3, *size)
    direction = torch.randn(1, 10)
    grads = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (logits(model, leaf) * direction).sum().backward()
        grads.append(leaf.grad)
    assert relative(*grads) <= 1e-4
    their_grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in theirs.named_parameters()}
    converted = convert_state_dict(their_grads, "official")
    for n, p in ours.named_parameters():
        assert relative(p.grad, converted[n]) <= 1e-4, n


def old_trunc_normal(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0, generator: Any = None
) -> Tensor:
    """The sampler that torch had before 2.13: inverse of the normal distribution function, from one uniform draw."""
    low, high = (0.5 * (1 + math.erf((v - mean) / std / math.sqrt(2))) for v in (a, b))
    with torch.no_grad():
        tensor.uniform_(2 * low - 1, 2 * high - 1, generator=generator).erfinv_().mul_(std * math.sqrt(2)).add_(mean)
        return tensor.clamp_(a, b)


@pytest.mark.parametrize("arch", ["swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"])
def test_published_values_of_torchvision(arch, shared_data, monkeypatch):
    """torchvision's own expected outputs, ≤ 3e-6."""
    from torchvision.models import swin_transformer

    golden = json.loads((shared_data / "torchvision_golden.json").read_text())
    monkeypatch.setattr(nn.init, "trunc_normal_", old_trunc_normal)
    torch.manual_seed(0)
    theirs = getattr(swin_transformer, arch)(weights=None, num_classes=50).eval()
    x = torch.rand(1, 3, 64, 64)
    size = {"t": "tiny", "s": "small", "b": "base"}[arch[-1]]
    variant = f"swinv2_{size}_window8_256" if "v2" in arch else f"swin_{size}_patch4_window7_224"
    ours = SwinTransformer(model_config(variant, num_classes=50, pad="legacy", small_map="pad-noshift")).eval()
    load_weights(ours, theirs.state_dict(), config=ours.config)
    expected = torch.tensor(golden[arch]["values"]).view(1, -1)
    with torch.no_grad():
        assert (ours(x) - expected).abs().max() <= 3e-6


def official_video(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names of a Video Swin in the published ones. Stages and mergings take turns in ``features``."""
    state = {}
    for key, value in theirs.items():
        if key.endswith("relative_position_index"):
            continue
        if found := re.fullmatch(r"features\.(\d+)\.(.+)", key):
            stage, merging = divmod(int(found[1]), 2)
            key = f"layers.{stage}.{'downsample' if merging else 'blocks'}.{found[2]}"
        state[key.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")] = value
    return state


def video_pair(theirs: nn.Module, **fields: Any) -> SwinTransformer:
    config = SwinConfig(version=1, patch_size=(2, 4, 4), img_size=(32, 224, 224), pad="legacy", **fields)
    ours = SwinTransformer(config).eval()
    ours.load_state_dict(official_video(theirs.state_dict()))
    return ours


@pytest.mark.parametrize("size", [(16, 48, 48), (5, 52, 41), (11, 26, 63)])
def test_video(size):
    """The same class with three axes is torchvision's Video Swin: outputs ≤ 1e-5, gradients ≤ 1e-4 relative.

    Time may be shorter than the window; a short height or width may not: there torchvision reads wrong offsets of its table.
    """
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    fields = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": (4, 3, 3), "num_classes": 10}
    theirs = SwinTransformer3d([2, 4, 4], 24, [2, 2], [2, 4], [4, 3, 3], num_classes=10)
    ours = video_pair(randomise(theirs), **fields)
    x = torch.randn(2, 3, *size)
    results = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, leaf.grad))
    assert relative(results[0][0], results[1][0]) <= 1e-5
    assert relative(results[0][1], results[1][1]) <= 1e-4
    grads = official_video({n: p.grad for n, p in theirs.named_parameters()})
    for n, p in ours.named_parameters():
        assert relative(p.grad, grads[n]) <= 1e-4, n


@pytest.mark.parametrize("arch", ["swin3d_t", "swin3d_s", "swin3d_b"])
def test_published_values_of_torchvision_video(arch, shared_data, monkeypatch):
    """torchvision's own expected outputs, ≤ 3e-6, with its rule for windows that shrink: the corner of the whole index."""
    from torchvision.models.video import swin_transformer

    from swinscale.models import position

    def corner(window, table, device):
        return position_code(table, table, device)[: math.prod(window)]

    golden = json.loads((shared_data / "torchvision_golden.json").read_text())
    monkeypatch.setattr(nn.init, "trunc_normal_", old_trunc_normal)
    torch.manual_seed(0)
    theirs = getattr(swin_transformer, arch)(weights=None, num_classes=50).eval()
    x = torch.rand(1, 3, 4, 112, 112)
    size = {"t": variants.TINY, "s": variants.SMALL, "b": variants.BASE}[arch[-1]]
    ours = video_pair(theirs, window_size=(8, 7, 7), num_classes=50, **size)
    monkeypatch.setattr(position, "position_code", corner)
    expected = torch.tensor(golden[arch]["values"]).view(1, -1)
    with torch.no_grad():
        assert (ours(x) - expected).abs().max() <= 3e-6


def detection_reference(x: Tensor, model: SwinTransformer) -> list[Tensor]:
    """The convention of the published detection code, in raster order with roll and partition (V1).

    Zero padding after the first norm and before the roll; windows never shrink; padding is attended; shifts stay.
    """
    outputs = []
    x = model.patch_embed(x)
    for stage in model.layers:
        for index, block in enumerate(stage.blocks):
            window = block.attn.window[0]
            shift = window // 2 if index % 2 else 0
            _, height, width, _ = x.shape
            y = torch.nn.functional.pad(block.norm1(x), (0, 0, 0, -width % window, 0, -height % window))
            rows, columns = y.shape[1:3]
            y = torch.roll(y, (-shift, -shift), (1, 2))
            region = torch.zeros(rows, columns, dtype=torch.long)
            if shift:
                for i, r in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                    for j, c in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                        region[r, c] = 3 * i + j
            out = torch.empty_like(y)
            bias, heads = block.attn.bias((window, window)).rows(), block.attn.num_heads
            for top in range(0, rows, window):
                for left in range(0, columns, window):
                    tile = y[:, top : top + window, left : left + window].reshape(1, window**2, -1)
                    label = region[top : top + window, left : left + window].reshape(-1)
                    q, k, v = block.attn.qkv(tile).view(window**2, 3, heads, -1).permute(1, 2, 0, 3)
                    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
                    scores = scores - 100.0 * (label[:, None] != label[None, :])
                    done = (scores.softmax(-1) @ v).transpose(0, 1).reshape(1, window, window, -1)
                    out[:, top : top + window, left : left + window] = done
            out = torch.roll(out, (shift, shift), (1, 2))[:, :height, :width]
            x = x + block.attn.proj(out)
            x = x + block.mlp(block.norm2(x))
        outputs.append(x.permute(0, 3, 1, 2))
        x = stage.downsample(x)
    return outputs


@pytest.mark.parametrize("size", [(64, 64), (90, 130), (30, 200)])
def test_published_dense_convention(size):
    """R-SIZE-3: pad="legacy", small_map="pad" is the convention of the published detection and segmentation models."""
    config = SwinConfig(
        version=1, embed_dim=24, depths=(2, 2, 2), num_heads=(2, 4, 8), window_size=7, img_size=224, num_classes=0,
        pad="legacy", small_map="pad",
    )  # fmt: skip
    model = randomise(SwinTransformer(config))
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = detection_reference(x, model)
        found = model.forward_intermediates(x, intermediates_only=True)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative(ours, theirs) <= 1e-5
