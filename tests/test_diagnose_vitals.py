"""Vital signs: what they say is what happens in the model, and the run is the same with and without them."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tests.processes import launch
from tests.random_models import random_swin, randomise
from tests.test_train import MODEL, _poison_stage, equal, recipe, weights
from torch import nn

from swinscale import train as training
from swinscale.checkpoint import checkpoint_steps
from swinscale.config import to_dict
from swinscale.diagnose import activations
from swinscale.diagnose.activations import amplitude, sample, watched
from swinscale.diagnose.attention import attention_weights, head_statistics, logit_scales
from swinscale.diagnose.instrument import Reading, View
from swinscale.diagnose.vitals import Vitals, parameters_by_part
from swinscale.diagnose.warning_signs import Signs, WarningSigns
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.optim import OptimConfig
from swinscale.parallel import MemoryConfig, World
from swinscale.recipes import build, run
from swinscale.runlog import RunLog, read_log
from swinscale.tasks import Classify, ClassifyConfig, SimMIM, SimMIMConfig

ROOT = Path(__file__).parent.parent
HERE = World(0, 1, torch.device("cpu"))


def readings(directory: Path) -> list[dict]:
    return [entry for entry in read_log(directory) if entry["kind"] == "vitals"]


def view(task, step: int = 1, clipped: float = 1.0, batch=None, precision="fp32") -> View:
    return View(task, step, 0.0, 10, 0, precision, HERE, batch, clipped=clipped)


@pytest.mark.parametrize(
    "fields", [{"version": 1}, {"version": 2}, {"version": 2, "qkv_bias": False}, {"pad": "legacy"}]
)
def test_attention_weights_are_those_of_the_model(fields):
    """With the values and the projection they give what the module gave: V1 and V2, padding, windows of several regions."""
    model = random_swin(**fields)
    model.set_attention_backend("eager")
    calls = []
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.register_forward_hook(lambda *call: calls.append(call))
    with torch.no_grad():
        model(torch.randn(2, 3, 30, 26))
        for attn, inputs, output in calls:
            shares = attention_weights(attn, *inputs)
            *_, values = (attn.qkv(inputs[0]) if attn.qkv.bias is not None else _project(attn, inputs[0])).chunk(3, -1)
            mixed = torch.einsum("bwanm,bwmad->bwnad", shares, values.unflatten(-1, (attn.num_heads, -1))).flatten(-2)
            torch.testing.assert_close(attn.proj(mixed), output)
            torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:-1]))
            assert torch.equal(attention_weights(attn, inputs[0], inputs[1]), shares)
    assert any(inputs[1].regions is not None for _, inputs, _ in calls) or fields.get("pad")


def _project(attn, x):
    qkv = x @ attn.qkv.weight.T
    return qkv if attn.q_bias is None else qkv + torch.cat((attn.q_bias, 0 * attn.q_bias, attn.v_bias))


def test_logit_scales_stop_at_their_limit():
    attn = random_swin(2).layers[0].blocks[0].attn
    with torch.no_grad():
        attn.logit_scale.copy_(torch.tensor([[[9.0]], [[math.log(7)]]]))
    assert logit_scales(attn).tolist() == pytest.approx([100, 7])


def test_head_statistics_of_even_and_of_collapsed_attention():
    even, one = torch.full((3, 16, 16), 1 / 16), torch.zeros(3, 16, 16)
    one[..., 5] = 1
    found = head_statistics(torch.stack([even, one], 1), None)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0], [1 / 16, 1], [1 / 16, 1], [1 / 16, 1]]))


def test_head_statistics_count_visible_keys_and_leave_padding_out():
    """Even attention within regions of 4 and 2 tokens has entropy 1; a token alone and padding (-1) ask nothing."""
    regions = torch.tensor([[0, 0, 0, 0, 1, 1, 2, -1]])
    shares = (regions[:, :, None] == regions[:, None, :]).float()
    shares = (shares / shares.sum(-1, keepdim=True))[:, None]
    entropy, top, largest, received = head_statistics(shares, regions)[:, 0].tolist()
    assert (entropy, largest) == pytest.approx((1, 1 / 2))
    assert top == pytest.approx((4 / 4 + 2 / 2) / 6)
    assert received == pytest.approx(1 / 6)


def test_amplitudes():
    x = torch.randn(4, 8, 16, 12)
    mean, rms, p50, p99, largest = amplitude(x).tolist()
    size = x.abs()
    expected = [size.mean(), size.square().mean().sqrt(), size.quantile(0.5), size.quantile(0.99), size.max()]
    assert [mean, rms, p50, p99, largest] == pytest.approx([value.item() for value in expected])
    assert amplitude((1e4 * x).half())[1].item() == pytest.approx(1e4 * rms, rel=1e-2)  # squares would not fit fp16
    assert not math.isfinite(amplitude(torch.tensor([[1.0, math.nan]]))[4].item())


def test_a_sample_has_every_channel():
    x = torch.arange(96).repeat(4, 64, 64, 1)
    some = sample(x, 1000)
    assert 500 < len(some) <= 1000 and set(some.tolist()) == set(range(96))


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "res-post"])
def test_branches_are_what_is_added_to_the_stream(placement, monkeypatch):
    """Block by block: what went in plus the branches is what comes out, wherever the norms are."""
    monkeypatch.setattr(activations, "amplitude", lambda x: x)
    model = random_swin(norm_placement=placement)
    inputs = {}
    for s, stage in enumerate(model.layers):
        for b, block in enumerate(stage.blocks):
            name = f"layers.{s}.blocks.{b}"
            block.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
    with torch.no_grad(), watched(model) as seen:
        model(torch.randn(1, 3, 32, 32))
    found = seen.amplitudes
    assert len(seen.heads) == 4 and len(seen.biases) == 2 and len(seen.scales) == 4
    for name, x in inputs.items():
        attention, mlp, stream = (found[name, place] for place in ("attention", "mlp", "stream"))
        if placement == "post":
            torch.testing.assert_close(found[name, "attention sum"], x + attention)
            block = model.get_submodule(name)
            torch.testing.assert_close(found[name, "mlp sum"], block.norm1(x + attention) + mlp)
        else:
            torch.testing.assert_close(stream, x + attention + mlp)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_is_the_same_with_and_without(photos, tmp_path, version):
    """Losses and weights to the last bit, read at every step and resumed in between; a healthy run warns of nothing."""
    mixed = recipe(photos, ClassifyConfig(mixup=0.5, cutmix=1.0), diagnose_every=0, epochs=3, keep_checkpoints=9)
    fields = ("embed_dim", "depths", "num_heads", "window_size", "img_size", "num_classes", "drop_path_rate")
    model = SwinConfig(version=version, **{name: getattr(MODEL, name) for name in fields})
    mixed = dataclasses.replace(mixed, model=model)
    watched_one = dataclasses.replace(mixed, train=dataclasses.replace(mixed.train, diagnose_every=1))
    run(mixed, tmp_path / "without")
    run(watched_one, tmp_path / "with")
    steps = checkpoint_steps(tmp_path / "with/checkpoints")
    shutil.rmtree(tmp_path / f"with/checkpoints/step-{steps[-1]:08d}")
    run(watched_one, tmp_path / "with", resume=True)
    assert readings(tmp_path / "without") == []
    assert [r["step"] for r in readings(tmp_path / "with")] == list(range(1, steps[-1] + 1))
    assert equal(weights(tmp_path / "without"), weights(tmp_path / "with"))
    losses = [[e["loss"] for e in read_log(tmp_path / d) if e["kind"] == "train"] for d in ("without", "with")]
    assert losses[0] == losses[1]
    assert [e for e in read_log(tmp_path / "with") if "text" in e] == []


def test_a_reading_says_what_happened(photos, tmp_path):
    """SimMIM: gradient norms add up to the run's own, before clipping; every block is there; bias maps at some readings."""
    tight = OptimConfig(lr=2e-3, lr_scaling="none", warmup_epochs=1, clip_grad=0.01)
    built = build(recipe(photos, SimMIMConfig(mask_patch=8), optim=tight, epochs=7))
    sets = (built.train_data, built.eval_data, built.recipe.train)
    training.train(built.task, *sets, tmp_path / "run", instruments=[Vitals(2)])
    found = readings(tmp_path / "run")
    norms = {e["step"]: e["grad_norm"] for e in read_log(tmp_path / "run") if e["kind"] == "train"}
    assert [r["step"] for r in found] == [1, *range(2, max(norms), 2), max(norms)]
    for reading in found:
        parts = [value for key, value in reading.items() if key.startswith("gradient/")]
        assert math.hypot(*parts) == pytest.approx(norms[reading["step"]], rel=1e-3)
        assert reading["clipped"] == pytest.approx(0.01 / norms[reading["step"]], rel=1e-3)
        blocks = {"layers.0.blocks.0", "layers.1.blocks.0"}
        assert blocks == set(reading["heads"]) == set(reading["logit_scales"]) < set(reading["amplitudes"])
        assert {"mask_token", "decoder", "patch_embed", "norm", "layers.0.downsample"} < set(reading["weights"])
    with_maps = [r for r in found if "position_bias" in r]
    assert len(found) > len(with_maps) >= 8 and with_maps[0] is found[0] and with_maps[-1] is found[-1]
    bias = with_maps[0]["position_bias"]["layers.0.blocks.0"]
    assert bias["window"] == [4, 4] and len(bias["values"]) == 1 and len(bias["values"][0]) == 49
    assert '"amplitude/layers.0.blocks.0"' in (tmp_path / "run/log.jsonl").read_text()


def test_update_ratios_are_those_of_the_weights():
    """Also with more entries than are sampled, as long as the sample is all of them or the update is even."""
    task = Classify(random_swin(), 5)
    batch = {"image": torch.randn(2, 3, 32, 32), "label": torch.tensor([1, 2])}
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    vitals = Vitals(1)
    for p in task.parameters():
        p.grad = torch.ones_like(p)
    vitals.before_update(view(task, 0, 0.5, batch))
    with torch.no_grad():
        for p in task.parameters():
            p.add_(0.01 * p + 0.003)
    reading = vitals.after_update(view(task, 1, 0.5, batch))
    assert reading is not None
    parts = parameters_by_part(task)
    names = {id(p): name for name, p in task.named_parameters()}
    for part, members in parts.items():
        change = torch.cat([(p - before[names[id(p)]]).flatten() for p in members])
        size = torch.cat([before[names[id(p)]].flatten() for p in members])
        assert reading.scalars[f"update_ratio/{part}"] == pytest.approx((change.norm() / size.norm()).item(), rel=1e-3)
        assert reading.record["weights"][part] == pytest.approx(size.norm().item(), rel=1e-3)
        entries = sum(p.numel() for p in members)
        assert reading.scalars[f"gradient/{part}"] == pytest.approx(2 * math.sqrt(entries), rel=1e-3)


def test_a_step_without_a_finite_loss_is_not_read(photos, tmp_path):
    skipping = recipe(photos, on_non_finite="skip", epochs=2, diagnose_every=1)
    built = build(skipping)
    built.task.model.layers[1] = _poison_stage(built.task.model.layers[1], 2)
    sets = (built.train_data, built.eval_data, built.recipe.train)
    training.train(built.task, *sets, tmp_path / "run", instruments=[Vitals(1)])
    assert [r["step"] for r in readings(tmp_path / "run")] == [1, 2, 4, 5, 6]


def test_fp16_steps_that_overflow_are_not_read(photos, tmp_path, monkeypatch):
    """The scaler begins too high and leaves steps out; the run is the same with and without readings."""
    monkeypatch.setattr(training, "resolve_precision", lambda *_: "fp16")
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**40, enabled=enabled)
    )
    for every in (0, 1):
        run(recipe(photos, epochs=10, diagnose_every=every), tmp_path / str(every))
    assert equal(weights(tmp_path / "0"), weights(tmp_path / "1"))
    norms = {e["step"]: e["grad_norm"] for e in read_log(tmp_path / "1") if e["kind"] == "train"}
    finite = [step for step, norm in norms.items() if math.isfinite(norm)]
    assert 0 < len(finite) < len(norms)
    assert [r["step"] for r in readings(tmp_path / "1")] == finite


def test_compiled_blocks_are_read():
    """A compiled block does not run hooks; for a reading it runs as it is written."""
    model = random_swin()
    for unit in model.units():
        unit.compile(backend="eager")
    task, batch = Classify(model, 5), {"image": torch.randn(2, 3, 32, 32), "label": torch.tensor([1, 2])}
    task.train()
    task(batch)[0].backward()
    vitals = Vitals(1)
    vitals.before_update(view(task, 0, 1.0, batch))
    reading = vitals.after_update(view(task, 1, 1.0, batch))
    assert reading is not None and len(reading.record["heads"]) == 4 and task.training


def test_other_backbones_have_gradients_and_updates_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3))
    task, batch = Classify(net, 3), {"image": torch.randn(2, 3, 2, 2), "label": torch.tensor([1, 2])}
    task(batch)[0].backward()
    vitals = Vitals(5)
    vitals.before_update(view(task, 4, 1.0, batch))
    reading = vitals.after_update(view(task, 5, 1.0, batch))
    assert reading is not None
    assert {key for key in reading.scalars if key.startswith("gradient/")} == {"gradient/1", "gradient/2"}
    assert "amplitudes" not in reading.record
    assert [step for step in range(1, 13) if vitals.due(step, 12)] == [1, 5, 10, 12]
    assert not any(Vitals(0).due(step, 12) for step in range(1, 13))


def test_sharded_parameters_are_read(photos, tmp_path):
    """Of a run whose parameters are in shares of one process: the same readings."""
    plain = recipe(photos, SimMIMConfig(mask_patch=8), epochs=2, diagnose_every=2)
    spread = dataclasses.replace(plain, train=dataclasses.replace(plain.train, memory=MemoryConfig(shard="zero3")))
    run(plain, tmp_path / "plain")
    run(spread, tmp_path / "spread")
    assert_alike(readings(tmp_path / "plain"), readings(tmp_path / "spread"), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "zero3"])
def test_two_processes_read_what_one_does(photos, tmp_path, shard):
    """Gradients, weights and updates are of the whole model; activations of the main process's images."""
    steady = OptimConfig(lr=1e-3, lr_scaling="none", warmup_epochs=0, eps=1e-3)
    plain = recipe(photos, epochs=2, diagnose_every=1, optim=steady)
    plain = dataclasses.replace(plain, model=dataclasses.replace(MODEL, drop_path_rate=0.0))
    run(plain, tmp_path / "one")
    two = dataclasses.replace(plain, train=dataclasses.replace(plain.train, memory=MemoryConfig(shard=shard)))
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(two)))
    code = "import sys; from swinscale.cli import main; sys.exit(main(sys.argv[1:]))"
    launch(2, code, "train", tmp_path / "recipe.json", "--out", tmp_path / "two")
    assert_alike(readings(tmp_path / "one"), readings(tmp_path / "two"), 1e-2, ("gradient", "update_ratio", "weights"))


def assert_alike(ours: list[dict], theirs: list[dict], tolerance: float, only: tuple[str, ...] = ()) -> None:
    assert len(ours) == len(theirs) > 1
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            if not only or key.startswith(only):
                values = [json.loads(json.dumps(r[key]), parse_float=float) for r in (one, two)]
                flat = [torch.tensor(list(_numbers(v))) for v in values]
                torch.testing.assert_close(*flat, rtol=tolerance, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def _numbers(value):
    if isinstance(value, (int, float)):
        yield float(value)
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


HEALTHY = Signs(
    step=1,
    precision="fp16",
    warm=True,
    gradient=1.0,
    clipped=1.0,
    updates={"a": 1e-3},
    amplitudes={"a": 1.0, "b": 5.0},
    largest={"a (stream)": 9.0, "b (stream)": 80.0},
    entropies={"a": [0.8, 0.5]},
    top_keys={"a": [0.1, 0.4]},
    scales={"a": [10.0, 100.0]},
)


def told(*readings: Signs) -> list[list[str]]:
    signs = WarningSigns()
    return [[kind for kind, _ in signs.read(dataclasses.replace(r, step=i))] for i, r in enumerate(readings)]


def sick(**what) -> Signs:
    return dataclasses.replace(HEALTHY, **what)


def test_healthy_readings_warn_of_nothing():
    assert told(*[HEALTHY] * 20) == [[]] * 20


@pytest.mark.parametrize(
    ("readings", "kind"),
    [
        ([sick(amplitudes={"a": 0.5, "b": 600.0})], "amplitude_spread"),
        ([sick(amplitudes={"a": 20.0, "b": 30.0}), sick(amplitudes={"a": 25.0, "b": 320.0})], "amplitude_growth"),
        ([sick(largest={"a (mlp)": 17_000.0})], "activation_range"),
        ([sick(largest={"a (mlp)": math.nan, "b (stream)": math.inf})], "activation_not_finite"),
        ([sick(entropies={"a": [0.01, 0.02]})], "attention_collapse"),
        ([sick(top_keys={"a": [0.96, 0.97, 0.2]}, entropies={"a": [0.1, 0.1, 0.6]})], "attention_collapse"),
        ([sick(scales={"a": [100.0, 99.99, 20.0]})], "logit_scale"),
        ([*[HEALTHY] * 5, sick(gradient=11.0)], "gradient_jump"),
        ([sick(updates={"a": 0.2})] * 2, "update_ratio"),
        ([sick(clipped=0.04)] * 3, "clipping"),
    ],
)
def test_each_pattern_is_named(readings, kind):
    """At the reading that completes it and not before; the sentence names the place and the setting to change."""
    *before, last = told(*readings)
    assert last == [kind] and not any(before)
    signs = WarningSigns()
    for number, reading in enumerate(readings):
        found = signs.read(dataclasses.replace(reading, step=number))
    assert "train." in found[0][1] and "\n" not in found[0][1]


@pytest.mark.parametrize(
    "readings",
    [
        [sick(amplitudes={"a": 0.5, "b": 400.0})],
        [sick(amplitudes={"a": 1.0, "b": 2.0}), sick(amplitudes={"a": 1.0, "b": 60.0})],
        [sick(largest={"a (mlp)": 17_000.0}, precision="bf16")],
        [sick(top_keys={"a": [0.96, 0.5]})],
        [sick(scales={"a": [100.0, 20.0]})],
        [*[HEALTHY] * 4, sick(gradient=1e6)],
        [*[sick(warm=False)] * 6, sick(gradient=20.0)],
        [sick(updates={"a": 0.2}), HEALTHY, sick(updates={"a": 0.2})],
        [sick(updates={"a": 0.2}, warm=False)] * 3,
        [sick(clipped=0.04)] * 2,
    ],
)
def test_what_is_short_of_a_pattern_is_not(readings):
    assert not any(told(*readings))


def test_a_run_that_went_back_forgets_what_it_will_do_again():
    signs = WarningSigns()
    for step in range(1, 7):
        signs.read(sick(step=step))
    signs.read(sick(step=3))
    assert [reading.step for reading in signs.before] == [1, 2, 3]


def test_a_warning_is_said_once_until_it_has_been_absent(tmp_path, capsys):
    bad = Reading(warnings=[("clipping", "Gradients were clipped.")])
    with RunLog(tmp_path, True, 0, 5) as log:
        for step, reading in enumerate((bad, bad, Reading(), bad)):
            log.reading(step, "vitals", reading)
    assert [(e["kind"], e["step"]) for e in read_log(tmp_path)] == [("clipping", 0), ("clipping", 3)]
    assert capsys.readouterr().out.count("Gradients were clipped.") == 2


def test_the_module_that_breaks_is_named():
    """An activation that is not finite, read from a real model."""
    model = random_swin()
    task, batch = Classify(model, 5), {"image": torch.randn(2, 3, 32, 32), "label": torch.tensor([1, 2])}
    vitals = Vitals(1)
    vitals.before_update(view(task, 0, 1.0, batch))
    with torch.no_grad():
        model.layers[0].blocks[1].norm2.bias[3] = math.inf
    reading = vitals.after_update(view(task, 1, 1.0, batch))
    assert reading is not None
    [text] = [text for kind, text in reading.warnings if kind == "activation_not_finite"]
    assert text.startswith("layers.0.blocks.1 (mlp)")
    json.dumps({**reading.scalars, **reading.record}, allow_nan=False)


def test_video_and_simmim_forward_passes_are_read():
    """Three axes of window and bias; few images of a larger batch."""
    clip = randomise(
        SwinTransformer(
            SwinConfig(img_size=(4, 16, 16), patch_size=(2, 4, 4), window_size=(2, 2, 2), embed_dim=8, depths=(1, 1),
                       num_heads=(1, 2), num_classes=3)
        )
    )  # fmt: skip
    task = Classify(clip, 3)
    batch = {"image": torch.randn(6, 3, 4, 16, 16), "label": torch.zeros(6, dtype=torch.long), "index": torch.arange(6)}
    vitals = Vitals(1)
    vitals.before_update(view(task, 0, 1.0, batch))
    reading = vitals.after_update(view(task, 1, 1.0, batch))
    assert reading is not None
    bias = reading.record["position_bias"]["layers.0.blocks.0"]
    assert bias["window"] == [2, 2, 2] and len(bias["values"][0]) == 27
    mim = SimMIM(random_swin(num_classes=0), SimMIMConfig(mask_patch=8))
    assert "decoder" in parameters_by_part(mim) and "layers.1.blocks.1" in parameters_by_part(mim)


def test_the_cost_is_measured_and_shown(tmp_path, compiler_settings):
    """The share of training is that of one reading among the steps of an interval; the docs show the same file."""
    from bench import __main__ as bench
    from bench import page

    assert bench.main(["vitals", "--tiny", "--batch", "2", "--repeats", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "vitals-tiny.json").read_text())["cost"]
    [[step], [reading]] = found["rounds"]["step_s"], found["rounds"]["reading_s"]
    assert found["share"] == pytest.approx(reading / step / 100)
    table = page.parts(tmp_path, tmp_path / "page.md")["vitals-tiny.cost"]()
    assert f"{100 * found['share']:.2f} %" in table
    measured = json.loads((ROOT / "bench/results/vitals.json").read_text())["cost"]
    assert measured["share"] <= 0.02
    assert f"{100 * measured['share']:.2f} %" in (ROOT / "docs/diagnose.md").read_text()
