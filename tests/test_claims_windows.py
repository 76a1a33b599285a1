"""The claim about shifted windows: other windows are computed rightly, steps run, and verdicts follow from results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from swinscale.claims import sliding, windows, windows_read
from swinscale.claims.results import drawing
from swinscale.claims.sliding import SlidingStage, SwinVariant, make_stage, sliding_attention, surroundings
from swinscale.config import to_dict
from swinscale.errors import UsageError
from swinscale.models import LRNetConfig, SwinConfig, SwinTransformer, plan
from swinscale.models.windows import position_code
from swinscale.ops.position import PositionBias
from swinscale.recipes import DataConfig, Recipe
from swinscale.tasks import ClassifyConfig
from swinscale.train import TrainConfig

CPU = torch.device("cpu")
TINY = SwinConfig(
    version=1, img_size=24, patch_size=2, window_size=3, embed_dim=8, depths=(2, 2), num_heads=(1, 2), num_classes=3,
    drop_path_rate=0.0,
)  # fmt: skip
METHODS = ("gathered", "masked", "flex")


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention by plain operations: the same numbers without a compiler's half minute."""
    monkeypatch.setattr(sliding, "_compiled_flex", lambda: flex_attention)


def brute_force(qkv: Tensor, values: Tensor, size: Sequence[int], window: Sequence[int], scale: float) -> Tensor:
    """Query by query, key by key; images (B, L, 3, A, d) and a table (A, rows, columns) of offsets → (B, L, A * d)"""
    q, k, v = qkv.unbind(2)
    (height, width), (rows, columns) = size, (w // 2 for w in window)
    out = torch.zeros_like(q)
    for y in range(height):
        for x in range(width):
            keys, biases = [], []
            for v_ in range(max(0, y - rows), min(height, y + rows + 1)):
                for u in range(max(0, x - columns), min(width, x + columns + 1)):
                    keys.append(v_ * width + u)
                    biases.append(values[:, y - v_ + window[0] - 1, x - u + window[1] - 1])
            here = y * width + x
            logits = (q[:, here, None] * k[:, keys]).sum(-1) * scale + torch.stack(biases)
            out[:, here] = (logits.softmax(1)[..., None] * v[:, keys]).sum(1)
    return out.flatten(2)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "window"), [((6, 7), (3, 5)), ((3, 3), (3, 3)), ((2, 5), (5, 3))])
def test_sliding_attention_equals_the_loop(method: Any, size: tuple[int, int], window: tuple[int, int]):
    heads, dim, tokens = 2, 4, math.prod(size)
    qkv = torch.randn(2, tokens, 3, heads, dim)
    table = torch.randn(heads, *(2 * w - 1 for w in window))
    bias = PositionBias(table.flatten(1), position_code(window, window, CPU))
    with torch.inference_mode():
        found = sliding_attention(qkv.flatten(2), bias, surroundings(size, window, method, CPU), 0.3, method)
    torch.testing.assert_close(found, brute_force(qkv, table, size, window, 0.3), rtol=1e-4, atol=1e-5)


def test_both_methods_for_training_have_the_same_gradients():
    qkv = torch.randn(2, 20, 24, requires_grad=True)
    values = torch.randn(2, 25, requires_grad=True)
    bias, made = PositionBias(values, position_code((3, 3), (3, 3), CPU)), []
    for method in ("gathered", "masked"):
        around = surroundings((4, 5), (3, 3), method, CPU)  # type: ignore[arg-type]
        out = sliding_attention(qkv, bias, around, 0.5, method)  # type: ignore[arg-type]
        made.append(torch.autograd.grad((out * torch.linspace(-1, 1, 8)).sum(), (qkv, values)))
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 1e-3


def random_values(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)


def test_windows_that_stay_are_independent_of_each_other():
    stage = make_stage(TINY, 0, "not shifted")
    random_values(stage)
    x, standard = torch.randn(2, 6, 6, 8), make_stage(TINY, 0, "shifted")
    standard.load_state_dict(stage.state_dict())
    alone = standard(x[:, 3:, :3])  # one window per map, which the standard network does not shift either
    torch.testing.assert_close(stage(x)[:, 3:, :3], alone)
    assert (standard(x)[:, 3:, :3] - alone).abs().max() > 1e-2


def test_one_window_per_map_is_the_standard_network():
    config = replace(TINY, img_size=6, depths=(2,), num_heads=(1,), window_size=3, pretrained_window_sizes=0)
    fixed, standard = SwinVariant(config, "not shifted"), SwinTransformer(config)
    random_values(fixed)
    standard.load_state_dict(fixed.state_dict())
    images = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(fixed(images), standard(images))


@pytest.mark.parametrize("kind", windows_read.ARMS)
def test_variants_have_the_parameters_of_the_standard_network(kind: Any):
    variant, standard = SwinVariant(TINY, kind), SwinTransformer(TINY)
    for model in (variant, standard):
        model.init_weights(3)
    assert variant.state_dict().keys() == standard.state_dict().keys()
    for name, value in standard.state_dict().items():
        assert torch.equal(value, variant.state_dict()[name]), name


def test_a_sliding_stage_sees_as_far_as_its_windows():
    stage = make_stage(TINY, 0, "sliding", "masked")
    random_values(stage)
    x = torch.randn(1, 9, 9, 8)
    changed = x.clone()
    changed[0, 4, 4, 0] += 1
    reached = (stage(x) - stage(changed)).abs().amax(-1)[0] > 1e-6
    assert reached.nonzero().tolist() == [[y, x] for y in range(2, 7) for x in range(2, 7)]  # two layers of 3×3


def test_evaluation_in_portions_is_the_same():
    stage = make_stage(TINY, 0, "sliding", "masked").eval()
    random_values(stage)
    x = torch.randn(20, 12, 12, 8)  # more than a portion of tokens
    with torch.no_grad():
        torch.testing.assert_close(stage(x), torch.cat([stage(image[None]) for image in x]))


def test_mistakes_are_said():
    with pytest.raises(UsageError, match=r"\(4, 4\) is not odd"):
        surroundings((8, 8), (4, 4), "masked", CPU)
    with pytest.raises(UsageError, match="similarity='dot'"):
        SlidingStage(replace(TINY, similarity="cosine"), 0, "masked")
    with pytest.raises(UsageError, match="no gradients"):
        make_stage(TINY, 0, "sliding", "flex")(torch.randn(1, 3, 3, 8))


def test_steps_at_every_scale(monkeypatch: pytest.MonkeyPatch):
    for scale in ("desk", "gpu", "paper"):
        made = windows.steps(scale, "bundled:fashion-mnist", 2)  # type: ignore[arg-type]
        assert [s.name for s in made if s.name.startswith(("not-shifted", "shifted", "sliding"))] == [
            f"{arm}-{seed}" for seed in range(2) for arm in ("not-shifted", "shifted", "sliding")
        ]
        assert [s.name for s in made if s.name.startswith("lrnet")] == ["lrnet-0", "lrnet-1"]
        assert all(s.alone == (s.name.partition("-")[0] in ("area", "speed")) for s in made)
        json.dumps([s.described() for s in made])
        lrnet = made[-1].arguments["recipe"]
        other = next(s for s in made if s.name == "shifted-1").arguments["recipe"]
        assert (lrnet.train, lrnet.task, lrnet.data) == (other.train, other.task, other.data)  # the same training
        assert 0.85 < sum(lrnet.model.macs()) / plan(other.model).macs < 1.15  # and as much to compute
        assert windows.settings(scale)  # type: ignore[arg-type]
    recipe = next(s for s in made if s.name == "sliding-1").arguments["recipe"]
    assert (recipe.name, recipe.train.epochs) == ("imagenet_swin_tiny", 300)


def test_times_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    area = windows.time_area(tmp_path, (8, 16), 1)
    assert area["sides"] == [8, 16]
    assert all(len(area[kind]) == 2 and area[kind][1][0] > 0 for kind in ("windows", "global"))

    def missing() -> Any:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(sliding, "_compiled_flex", missing)
    monkeypatch.setattr(windows, "model_config", lambda name: TINY)
    speed = windows.time_ways(tmp_path, "tiny", 1, 1)
    assert speed["reasons"] == {windows_read.FLEX: "RuntimeError: no compiler"}
    ran = {windows_read.FIXED, windows_read.SHIFTED, windows_read.NAIVE}
    assert [set(times) for times in (*speed["stages"], speed["network"])] == [ran] * 3
    assert all(len(times) == 1 and times[0] > 0 for times in speed["network"].values())


def test_lrnet_is_timed_beside_shifted_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = LRNetConfig(24, depths=(1,), widths=(8,), stage_dims=(12,), stem_width=8, num_classes=3)
    monkeypatch.setattr(windows, "model_config", lambda name: small if "lrnet" in name else TINY)
    speed = windows.time_lrnet(tmp_path, "tiny", "lrnet50", 1, 2)
    assert not speed["reasons"] and len(speed["stages"]) == 2
    for times in (*speed["stages"], speed["network"]):
        assert set(times) == {windows_read.SHIFTED, windows_read.LRNET} and all(min(t) > 0 for t in times.values())


@pytest.mark.parametrize("kind", ["sliding", "not shifted"])
def test_a_variant_trains(tmp_path: Path, photos: Path, kind: Any):
    train = TrainConfig(epochs=2, batch_size=10, num_workers=0, diagnose_every=0, checkpoint_every=0, device="cpu")
    data = DataConfig(str(photos), eval_fraction=0.25, augment="none", crop_ratio=None)
    recipe = Recipe("trial", replace(TINY, num_classes=0), ClassifyConfig(), data, train)
    result = windows.train_variant(tmp_path, recipe, kind, "masked")
    assert 0 <= result["metrics"]["top1"] <= 1 and result["seconds"] > 0
    assert json.loads((tmp_path / "run/config.json").read_text())["windows"] == kind
    assert [p.name for p in (tmp_path / "run/last").iterdir()] == [
        "variant.safetensors"
    ]  # not a Swin that loads as one
    assert windows.train_variant(tmp_path, recipe, kind, "masked") == result
    with pytest.raises(UsageError):  # another experiment
        windows.train_variant(tmp_path, recipe, "shifted", "masked")
    assert to_dict(recipe)["name"] == "trial"


def constructed(
    naive: float = 4.0,
    flex: float | None = 1.5,
    shift: float = 1.0,
    slide: float = 0.0,
    power: float = 2.0,
    lrnet: float = 3.0,
    behind: float = 4.0,
) -> dict[str, Any]:
    """Results in which naive and flex sliding take so many times as long, and so on; noise is small and fixed."""
    noise = (0.99, 1.0, 1.01)
    sides = [16, 32, 64, 128]
    area = {"sides": sides} | {
        kind: [[1e-6 * side ** (2 * exponent) * n for n in noise] for side in sides]
        for kind, exponent in (("windows", 1.0), ("global", power))
    }
    factors = {windows_read.FIXED: 0.98, windows_read.SHIFTED: 1.0, windows_read.NAIVE: naive, windows_read.FLEX: flex}
    times = {way: [f * n for n in noise] for way, f in factors.items() if f is not None}
    reasons = {} if flex else {windows_read.FLEX: "RuntimeError: no compiler"}
    results: dict[str, Any] = {
        "area": area, "speed-T": {"batch": 4, "stages": [times] * 4, "network": times, "reasons": reasons},
    }  # fmt: skip
    beside = {windows_read.SHIFTED: times[windows_read.SHIFTED], windows_read.LRNET: [lrnet * n for n in noise]}
    results["speed-lrnet"] = {
        "batch": 4, "lrnet": "lrnet50", "stages": [beside] * 4, "network": beside, "reasons": {}
    }  # fmt: skip
    for seed, n in enumerate((0.0, 0.1, -0.1)):
        results[f"lrnet-{seed}"] = {"metrics": {"top1": (50 + shift + n * (shift or 0.5) - behind + n) / 100}}
        for arm, gain in (("not-shifted", 0.0), ("shifted", shift), ("sliding", shift + slide)):
            results[f"{arm}-{seed}"] = {"metrics": {"top1": (50 + gain + n * (gain or 0.5)) / 100}}
    return results


REPRODUCED, REFUTED, OPEN = "reproduced", "not reproduced", "not decided at this scale"


def verdicts(**changes: Any) -> list[str]:
    return [finding.verdict for finding in windows.read("desk", constructed(**changes)).findings]


def test_verdicts_follow_from_results():
    assert verdicts() == [REPRODUCED] * 10
    assert verdicts(power=1.2)[1] == REFUTED
    assert verdicts(naive=0.5)[2:5] == [REFUTED] * 3  # then the naive one is the best sliding kernel
    assert verdicts(flex=0.9)[2:5] == [REPRODUCED, REPRODUCED, REFUTED]
    assert verdicts(flex=None)[2:5] == [REPRODUCED, REPRODUCED, OPEN]
    assert verdicts(shift=-1.0)[5] == REFUTED
    assert verdicts(shift=0.02)[5] == OPEN
    assert verdicts(slide=5.0)[6] == REFUTED
    assert verdicts(lrnet=0.8)[7:] == [REFUTED, REFUTED, REPRODUCED]
    assert verdicts(behind=-4.0)[7:] == [REPRODUCED, REPRODUCED, REFUTED]
    outcome = windows.read("desk", constructed(flex=None))
    assert "no compiler" in outcome.findings[4].measured and any("no compiler" in note for note in outcome.notes)


def test_a_diverged_run_decides_nothing():
    results = constructed()
    results["sliding-1"] = {"metrics": {}, "diverged": "the loss is not finite"}
    assert [f.verdict for f in windows.read("desk", results).findings][5:7] == [REPRODUCED, OPEN]


def test_exponents_are_of_the_larger_half():
    sides = (10, 20, 40, 80)
    seconds = [[5.0], [5.0], [40.0**3], [80.0**3]]
    assert windows_read.exponents(sides, seconds) == pytest.approx([1.5])


def test_pictures_are_drawn(tmp_path: Path):
    for flex in (1.5, None):
        for figure in windows.read("desk", constructed(flex=flex)).figures:
            drawing(figure).save(tmp_path / figure.name)
            assert (tmp_path / f"{figure.name}.png").stat().st_size > 5000
