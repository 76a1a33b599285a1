"""Predicted memory against what PyTorch's allocator hands out, and against figures derived by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import __main__ as bench
from bench.memory import classifier, configuration, measure
from bench.page import rewrite
from tests.processes import launch

from swinscale.cli import main
from swinscale.config import override
from swinscale.errors import UsageError
from swinscale.memory import (
    MemoryPlan,
    Predictor,
    advice_after_out_of_memory,
    advise,
    card_bytes,
    predict,
    usable,
)
from swinscale.models import SwinConfig, create_model, model_config
from swinscale.parallel import MemoryConfig, World
from swinscale.recipes import get_recipe
from swinscale.rehearsal import Rehearsal
from swinscale.tasks import Classify, ClassifyConfig, SimMIM, SimMIMConfig, Task

pytestmark = pytest.mark.usefixtures("compiler_settings")
ROOT = Path(__file__).parent.parent
TOLERANCE = 0.15
MODES = ("none", "selective", "block")
BACKENDS = ("sdpa", "sequential", "eager")
GIANT = "swinv2_giant_window12_192"


def check(
    task: Task, size: int, count: int, memory: MemoryConfig, precision: Any = "fp32", passes: int = 1
) -> MemoryPlan:
    plan = predict(
        task, micro_batch=count, img_size=size, precision=precision, memory=memory, accumulate=passes, device="cpu"
    )
    peak, held = measure(task, size, count, memory, precision, passes)
    assert plan.peak == pytest.approx(peak, rel=TOLERANCE)
    # Also what comes on top of parameters, states and images, which are no achievement to predict.
    assert plan.peak - held == pytest.approx(peak - held, rel=TOLERANCE)
    return plan


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_tiny_as_measured(name: str, backend: str, mode: Any):
    check(classifier(name, 128), 128, 3, MemoryConfig(attention=backend, checkpointing=mode))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "count", "mode"),
    [
        ("swinv2_tiny_window8_256", 256, 4, "none"),
        ("swin_tiny_patch4_window7_224", 224, 4, "block"),
        ("swin_small_patch4_window7_224", 224, 1, "selective"),
        ("swinv2_small_window8_256", 128, 3, "block"),
        ("swin_base_patch4_window7_224", 112, 2, "none"),
        ("swinv2_base_window16_256", 256, 1, "selective"),
    ],
)
def test_larger_as_measured(name: str, size: int, count: int, mode: Any):
    """Each size with one technique; ``python -m bench memory`` measures the others too."""
    check(classifier(name, size), size, count, MemoryConfig(attention="sdpa", checkpointing=mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "block"])
def test_simmim_as_measured(mode: Any):
    task = SimMIM(create_model("swinv2_tiny_window8_256", img_size=192, num_classes=0), SimMIMConfig(norm_target=47))
    check(task, 192, 2, MemoryConfig(checkpointing=mode))


def test_low_precision_several_passes_and_settings_per_stage_as_measured():
    stages = MemoryConfig(("sequential", "sdpa", "eager", "sdpa"), ("block", "selective", "none", "none"))
    plan = check(classifier("swinv2_tiny_window8_256", 128), 128, 2, stages, "bf16", passes=2)
    assert plan.backends == ("sequential", "sdpa", "eager", "sdpa")
    assert plan.copies > 0


def test_a_frozen_backbone_as_measured():
    task = Classify(
        create_model("swinv2_tiny_window8_256", img_size=128, num_classes=10), 10, ClassifyConfig(linear_probe=True)
    )
    plan = check(task, 128, 4, MemoryConfig())
    assert sum(plan.activations) == 0
    assert plan.gradients == 4 * (768 * 10 + 10)


def test_an_image_of_another_size_than_the_model_was_made_for():
    check(classifier("swinv2_tiny_window8_256", 96), 150, 1, MemoryConfig())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "sequential", "eager"])
@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("swin_tiny_patch4_window7_224", 224, 32),
        ("swinv2_small_window8_256", 256, 16),
        ("swinv2_base_window16_256", 256, 8),
    ],
)
def test_as_measured_on_a_gpu(name: str, size: int, count: int, backend: str, mode: Any):
    memory = MemoryConfig(attention=backend, checkpointing=mode)
    task = classifier(name, size)
    peak, _ = measure(task, size, count, memory, "bf16", here=World(0, 1, torch.device("cuda")))
    assert predict(task, micro_batch=count, memory=memory).peak == pytest.approx(peak, rel=TOLERANCE)


SPREAD = """
import json, sys
import torch
from bench import __main__ as bench
from bench.memory import classifier, measure
from swinscale.memory import predict
from swinscale.parallel import MemoryConfig, world
torch.manual_seed(0)
with world("cpu", alone_in_group=True) as here:
    for settings, precision, passes in json.loads(sys.argv[1]):
        memory, build = MemoryConfig(**settings), lambda: classifier("swinv2_tiny_window8_256", 128)
        how = dict(precision=precision, processes=here.size, device="cpu", accumulate=passes)
        plan = predict(build(), micro_batch=2, memory=memory, **how)
        # How long gloo's threads hold what they send depends on how busy the machine is: the least of three counts.
        peak = min(measure(build(), 128, 2, memory, precision, passes, here)[0] for _ in range(3 if passes > 1 else 1))
        print("found", json.dumps([settings, precision, passes, plan.peak, peak]))
"""


@pytest.mark.slow
def test_two_processes_as_measured():
    """DDP and the three ways of sharding, by gloo."""
    cases = [
        ({}, "fp32", 1),
        ({"shard": "zero1"}, "fp32", 2),
        ({"shard": "zero2"}, "bf16", 1),
        ({"shard": "zero3"}, "bf16", 2),
        ({"shard": "zero3", "checkpointing": "block"}, "bf16", 1),
    ]
    lines = [line for line in launch(2, SPREAD, json.dumps(cases))[0].splitlines() if line.startswith("found")]
    assert len(lines) == len(cases)
    for line in lines:
        *case, predicted, peak = json.loads(line.removeprefix("found "))
        assert predicted == pytest.approx(peak, rel=TOLERANCE), case


@pytest.fixture(scope="module")
def giant() -> Predictor:
    """G at 640 pixels with window 40, one image."""
    return Predictor(model_config(GIANT, img_size=640, window_size=40, num_classes=0), micro_batch=1)


@pytest.mark.parametrize(
    ("memory", "accumulate", "expected"),
    # bytes per parameter over 8 processes, without what is gathered or cast for use: parameters, gradients, moments
    [
        (MemoryConfig(), 1, (4, 4, 8)),
        (MemoryConfig(shard="zero1"), 1, (4 / 8, 4 / 8, 8 / 8)),
        (MemoryConfig(shard="zero1"), 2, (4 / 8, 4, 8 / 8)),
        (MemoryConfig(shard="zero2"), 2, (4 / 8, 4 / 8, 8 / 8)),
        (MemoryConfig(shard="zero3"), 1, (4 / 8, 4 / 8, 8 / 8)),
        (MemoryConfig(shard="zero3", replicas=2), 1, (4 / 4, 4 / 4, 8 / 4)),
        (MemoryConfig(shard="zero3", offload=True), 1, (0, 0, 0)),
        (MemoryConfig(optimizer_bits=8), 1, (4, 4, 2 + 8 / 256)),
    ],
)
def test_bytes_per_parameter(giant: Predictor, memory: MemoryConfig, accumulate: int, expected: tuple[float, ...]):
    count = sum(giant.sizes)
    plan = giant.plan(memory, processes=8, accumulate=accumulate)
    found = (plan.parameters, plan.gradients, plan.optimizer)
    assert found == pytest.approx([count * e for e in expected], rel=1e-6)


def test_the_articles_48_gigabytes(giant: Predictor):
    """AdamW in fp32: 16 bytes for each of 3.0 billion parameters."""
    plan = giant.plan(MemoryConfig(), ema=True)
    assert plan.parameters + plan.gradients + plan.optimizer == 16 * sum(giant.sizes)
    assert (plan.parameters + plan.gradients + plan.optimizer) / 1e9 == pytest.approx(48.0, abs=0.1)
    assert plan.ema == plan.parameters
    assert plan.copies == pytest.approx(2 * sum(giant.sizes), rel=0.01)


@pytest.mark.parametrize(
    ("model", "size", "window", "expected"),
    # millions of logits of one image per stage (windows × heads × tokens²)
    [
        (GIANT, (192, 192), 12, (5.31, 2.65, 1.33, 0.17)),
        (GIANT, (640, 640), 40, (655, 328, 164, 20)),
        (GIANT, (1536, 1536), 32, (2416, 1208, 604, 537)),
        ("swinv2_large_window12_192", (1536, 1536), 32, (906, 453, 226, 201)),
    ],
)
def test_logits_of_eager_attention(model: str, size: tuple[int, ...], window: int, expected: tuple[float, ...]):
    """Its softmax holds two tensors of that many numbers in fp32 at once, and little beside them."""
    logits = logits_of(model_config(model, img_size=size, window_size=window))
    assert logits == pytest.approx([1e6 * e for e in expected], rel=0.03)
    plan = predict(
        model_config(model, img_size=size, window_size=window), micro_batch=1, memory=MemoryConfig(attention="eager")
    )
    for bytes_at_once, count in zip(plan.attention, logits, strict=True):
        assert 8 * count < bytes_at_once < 20 * count


@pytest.mark.slow
def test_logits_of_a_clip():
    """G, 8 tokens of time × 320² pixels, window 8×20²."""
    config = configuration("G", "320²×8, window 20²×8")
    assert logits_of(config) == pytest.approx([2621e6, 1311e6, 655e6, 82e6], rel=0.01)
    plan = predict(config, micro_batch=1, memory=MemoryConfig(checkpointing="block", attention="sequential"))
    assert plan.peak < 100e9


def logits_of(config: SwinConfig) -> list[int]:
    return [
        math.prod(math.ceil(n / w) for n, w in zip(grid, window, strict=True)) * heads * math.prod(window) ** 2
        for grid, window, heads in zip(config.stage_maps(), config.stage_windows, config.num_heads, strict=True)
    ]


def test_fewer_windows_stand_for_all_in_sequential_attention(monkeypatch: pytest.MonkeyPatch):
    """What is extended along a line is what all windows give, forward and backward."""
    config = model_config("swinv2_tiny_window16_256", img_size=1024, window_size=16, num_classes=0)
    found = []
    for parts in (4, 10**6):
        monkeypatch.setattr("swinscale.rehearsal.PARTS", parts)
        rehearsal = Predictor(config, micro_batch=1, device="cpu", precision="fp32").rehearsal
        found.append([rehearsal.unit(i, "none", "sequential:64", False) for i in (0, 1)])
    for one, other in zip(*found, strict=True):
        for name in ("forward", "saved", "backward", "backward_with_grads", "attention"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=0.02), name


def test_parts_that_are_not_run_take_what_those_take_that_are(monkeypatch: pytest.MonkeyPatch):
    from contextlib import nullcontext

    def measure() -> Any:
        config = model_config("swinv2_micro_patch2_window4_32", num_classes=0)
        return Predictor(config, micro_batch=2, device="cpu").rehearsal.unit(1, "none", "sequential:8", False)

    quick = measure()
    monkeypatch.setattr("swinscale.rehearsal._each_part_once", lambda _: nullcontext())
    slow = measure()
    for name in ("forward", "saved", "backward_with_grads"):
        assert getattr(quick, name) == pytest.approx(getattr(slow, name), rel=0.02), name


def test_techniques_save(giant: Predictor):
    def peak(accumulate: int = 1, **settings: Any) -> int:
        return giant.plan(MemoryConfig(**settings), processes=8, accumulate=accumulate).peak

    assert peak(checkpointing="block") < peak(checkpointing="selective") < peak()
    assert peak(attention=("sequential", "sequential", "auto", "auto")) < peak(attention="eager")
    assert peak(shard="zero3") < peak(shard="zero2") <= peak(shard="zero1") < peak()
    assert peak(2, shard="zero2") < peak(2, shard="zero1")
    assert peak(optimizer_bits=8) < peak()
    assert peak(shard="zero3", offload=True) < peak(shard="zero3")
    assert peak(shard="zero3") < peak(shard="zero3", replicas=4)


def test_fused_attention_is_predicted_without_a_gpu():
    plan = predict(model_config("swinv2_tiny_window16_256"), micro_batch=2)
    assert plan.backends == ("triton",) * 4
    # 2 × 16 windows of 256 tokens: no tensor per pair of tokens in a pass (16 bytes for each of q, k, v, out would be more)
    eager = predict(model_config("swinv2_tiny_window16_256"), micro_batch=2, memory=MemoryConfig(attention="eager"))
    assert plan.attention[0] < eager.attention[0] / 2
    assert plan.peak < eager.peak


def test_windows_too_large_for_the_fused_kernels_go_another_way(giant: Predictor):
    assert giant.plan(MemoryConfig()).backends == ("sdpa", "sdpa", "sdpa", "triton")  # 40×40 tokens; 20×20 in the last
    with pytest.raises(UsageError, match=r"'triton' cannot run here: .* at most 1024 tokens, not 1600"):
        giant.plan(MemoryConfig(attention="triton"))


@pytest.fixture(scope="module")
def tiny() -> Predictor:
    """64 images of 256 pixels, whose activations dominate."""
    return Predictor(model_config("swinv2_tiny_window8_256"), micro_batch=64)


def card_for(plan: MemoryPlan) -> int:
    """Bytes of the smallest card that a step fits."""
    return math.ceil((plan.peak + 1e6 + 1e9) / 0.97)


@pytest.mark.parametrize(
    ("processes", "settings", "overrides"),
    [
        (1, {"checkpointing": "selective"}, ["checkpointing=selective"]),
        (1, {"checkpointing": "block"}, ["checkpointing=block"]),
        (8, {"checkpointing": "block", "shard": "zero1"}, ["checkpointing=block", "shard=zero1"]),
        (1, {"checkpointing": "block", "optimizer_bits": 8}, ["checkpointing=block", "optimizer_bits=8"]),
    ],
)
def test_advice_names_the_cheapest_settings(
    tiny: Predictor, processes: int, settings: dict[str, Any], overrides: list[str]
):
    card = card_for(tiny.plan(MemoryConfig(**settings), processes=processes))
    found = tiny.advise(card, MemoryConfig(), processes=processes)
    assert not found.fits
    assert found.overrides == tuple(f"train.memory.{o}" for o in overrides)
    assert found.then is not None and found.then.peak <= usable(card) < found.plan.peak
    assert str(found).startswith("does not fit: the peak is ") and all(o in str(found) for o in found.overrides)


def test_advice_says_so_when_all_is_well_or_nothing_helps(tiny: Predictor):
    fits = tiny.advise(card_bytes("80GB"), MemoryConfig())
    assert fits.fits and not fits.overrides and str(fits).startswith("fits: the peak is ")
    nothing = tiny.advise(card_bytes("1.1GB"), MemoryConfig())
    assert not nothing.fits and not nothing.overrides
    assert nothing.then is not None and nothing.then.peak < nothing.plan.peak / 10
    assert "with everything switched on 0." in str(nothing) and "are still missing" in str(nothing)


@pytest.mark.slow
def test_three_billion_parameters_on_one_small_gpu_need_the_memory_of_the_cpu(giant: Predictor):
    found = giant.advise(card_bytes("24GB"), MemoryConfig())
    assert "train.memory.offload=True" in found.overrides
    assert found.then is not None and found.then.peak <= usable(card_bytes("24GB"))


def test_advice_can_be_typed():
    """And with it typed, the recipe fits."""
    recipe = get_recipe("imagenet_swinv2_tiny")
    task = Classify(create_model("swinv2_tiny_window8_256", img_size=256), 1000)
    found = advise(task, 6 * 10**9, micro_batch=128, precision="bf16")
    assert found.overrides
    changed = override(recipe, *(o.replace('"', "") for o in found.overrides)).train
    plan = predict(task, micro_batch=changed.micro_batch or 128, memory=changed.memory)
    assert plan.peak <= usable(6 * 10**9)


def test_advice_shrinks_the_micro_batch_where_techniques_do_not_suffice():
    found = advise(model_config("swinv2_tiny_window8_256"), 4 * 10**9, micro_batch=512)
    assert any(o.startswith("train.micro_batch=") for o in found.overrides)
    assert "train.memory.checkpointing=block" in found.overrides
    assert found.then is not None and found.then.peak <= usable(4 * 10**9)


@pytest.mark.slow
def test_sequential_attention_is_advised_where_logits_dominate_and_no_fused_kernel_runs():
    config = model_config("swinv2_tiny_window8_256", img_size=1280, window_size=40, num_classes=0)
    plan = predict(config, micro_batch=1, memory=MemoryConfig(checkpointing="block"))
    found = advise(
        config, int((plan.peak - 2e8 + 1e9) / 0.97), micro_batch=1, memory=MemoryConfig(checkpointing="block")
    )
    assert len(found.overrides) == 1
    assert found.overrides[0].startswith("train.memory.attention=\"('sequential',")
    typed = override(get_recipe("imagenet_swinv2_tiny"), found.overrides[0].replace('"', "")).train.memory.attention
    assert len(typed) == 4 and typed[0] == "sequential"


def test_out_of_memory_ends_in_advice(monkeypatch: pytest.MonkeyPatch):
    task = classifier("swinv2_tiny_window8_256", 128)
    settings: dict[str, Any] = {"img_size": 128, "micro_batch": 64, "precision": "bf16", "memory": MemoryConfig()}
    general = advice_after_out_of_memory(task, **settings)
    assert "train.memory.checkpointing=block" in general and "swinscale show" in general
    card = type("Card", (), {"total_memory": 8 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    text = advice_after_out_of_memory(task, **settings)
    assert text.startswith("Out of memory: the predicted peak is ")
    assert " of 8.0 GB. With train.memory." in text


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80e9), ("141GiB", 141 * 2**30), ("74.5 GB", 74.5e9), ("H200", 141e9)]
)
def test_cards(text: str, expected: float):
    assert card_bytes(text) == int(expected)


def test_mistakes_are_explained(giant: Predictor):
    with pytest.raises(UsageError, match=r"card='H20' is not a card.*Did you mean 'H200'"):
        card_bytes("H20")
    with pytest.raises(UsageError, match=r"replicas=3 does not divide the 8 processes"):
        giant.plan(MemoryConfig(shard="zero3", replicas=3), processes=8)
    with pytest.raises(UsageError, match=r"train.memory.checkpointing=\('block',\): give one value, or 4"):
        giant.plan(MemoryConfig(checkpointing=("block",)))
    with pytest.raises(UsageError, match="precision='auto'"):
        predict(model_config(GIANT), micro_batch=1, precision="auto")
    with pytest.raises(UsageError, match="device='mps'"):
        predict(model_config(GIANT), micro_batch=1, device="mps")
    with pytest.raises(UsageError, match="Unknown attention back end 'magic'"):
        giant.plan(MemoryConfig(attention="magic"))
    with pytest.raises(UsageError, match="The memory of Linear cannot be predicted"):
        predict(Classify(torch.nn.Linear(3, 10), 10), micro_batch=1)


def test_show_prints_the_table_and_the_verdict(capsys: pytest.CaptureFixture[str]):
    arguments = ["show", "imagenet_swinv2_tiny", "--data", "somewhere", "train.batch_size=64"]
    assert main([*arguments, "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    for words in (
        "each of 8 GPUs",
        "1 × 8 images",
        "this recipe",
        "shard=zero3",
        "checkpointing=block",
        "16GB: this recipe fits",
    ):
        assert words in out
    assert main([*arguments, "--gpus", "1", "--card", "4GB", "train.micro_batch=64"]) == 0
    out = capsys.readouterr().out
    assert "1 × 64 images" in out and "shard=zero3" not in out.replace("shard=zero3 offload", "")
    assert "4GB: this recipe does not fit" in out and "train.memory.checkpointing=" in out
    assert main(["show", "swinv2_tiny_window8_256", "--gpus", "8"]) == 2
    assert "need a recipe" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "this recipe" not in capsys.readouterr().out


def test_the_task_that_is_asked_about_stays_as_it_is():
    task = classifier("swinv2_micro_patch2_window4_32", 32)
    before = {name: (value.clone(), value.requires_grad) for name, value in task.named_parameters()}
    task.eval()
    rehearsal = Rehearsal(task, (32, 32), 2, None, "cpu")
    rehearsal.unit(0, "block", "eager", False)
    assert not task.training
    assert task.model.layers[0].blocks[0].attn.backend == "auto"
    assert task.model.layers[0].blocks[0].checkpointing == "none"
    for name, value in task.named_parameters():
        assert torch.equal(value, before[name][0]) and value.grad is None and not value._post_accumulate_grad_hooks


@pytest.mark.slow
def test_the_bench_writes_what_the_page_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench.main(["memory", "--tiny", "--sections", "predicted", "--out", str(tmp_path)]) == 0
    assert "| none " in capsys.readouterr().out
    page = tmp_path / "memory.md"
    page.write_text(
        "\n".join(f"<!-- bench:memory-tiny.{part} -->\n<!-- /bench -->" for part in ("L", "gpu", "machine"))
    )
    assert rewrite(page, tmp_path) == ["memory-tiny.L", "memory-tiny.gpu", "memory-tiny.machine"]
    assert "zero3" in page.read_text() and "Not measured" in page.read_text()


def test_the_page_shows_what_is_recorded(tmp_path: Path):
    """``docs/memory.md`` is what its results make of it."""
    page = ROOT / "docs" / "memory.md"
    again = tmp_path / "docs" / "memory.md"
    again.parent.mkdir()
    again.write_text(page.read_text())
    assert len(rewrite(again, ROOT / "bench" / "results")) >= 7
    assert again.read_text() == page.read_text()
