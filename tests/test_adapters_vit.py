"""SimMIM and classification with timm's plain ViT: the same network as timm's, files that both read, recipes from end to end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import swinscale
from random_models import random_swin, randomise
from swinscale import UsageError
from swinscale.adapters.vit import ViT, from_pretrained
from swinscale.cli import main
from swinscale.inference import load_pipeline, load_simmim
from swinscale.models import build_model
from swinscale.models.vit_config import TIMM_NAME, ViTConfig
from swinscale.optim import OptimConfig, parameter_groups
from swinscale.recipes import get_recipe
from swinscale.recipes.base import build_task
from swinscale.show import task_of
from swinscale.tasks import Classify, SimMIM, SimMIMConfig
from swinscale.weights.records import read_config, read_metadata
from swinscale.weights.vit import load_vit

SMALL = ViTConfig(32, 4, num_classes=5, embed_dim=32, depth=3, num_heads=2, init_values=0.1, drop_path_rate=0.0)
TINY = ["model.embed_dim=16", "model.depth=2", "model.num_heads=2", "train.batch_size=6", "data.limit=18"]
TINY += ["train.device=cpu", "train.diagnose_every=1", "train.eval_every=0"]


def vit(**changes: Any) -> ViT:
    model = ViT(dataclasses.replace(SMALL, **changes))
    randomise(model)
    return model.eval()


def simmim(**changes: Any) -> SimMIM:
    return SimMIM(vit(num_classes=0, **changes), SimMIMConfig(mask_patch=8)).eval()


def timms(config: ViTConfig, state: dict[str, Tensor]) -> nn.Module:
    """The network that timm makes of the arguments that we record."""
    model = timm.create_model(TIMM_NAME, **config.timm_arguments())
    model.load_state_dict(state)
    return model.eval()


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.6


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (30, 21)])
@pytest.mark.parametrize("init_values", [0.0, 0.1])
@torch.no_grad()
def test_the_network_is_timms(size: tuple[int, int], init_values: float):
    ours = vit(init_values=init_values)
    theirs: Any = timms(ours.config, ours.state_dict())
    images = torch.randn(2, 3, *size)
    expected = theirs.forward_features(images)
    assert torch.allclose(ours.forward_features(images), expected, atol=1e-5)
    tokens = ours.forward_tokens(ours.embed(images))
    assert tokens.shape == (2, *ours.config.stage_maps(size)[0], 32)
    assert torch.allclose(tokens.flatten(1, 2), expected[:, 1:], atol=1e-5)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@torch.no_grad()
def test_intermediates_are_those_of_every_block():
    ours, images = vit(), torch.randn(2, 3, 30, 42)
    theirs: Any = timms(ours.config, ours.state_dict())
    expected = theirs.forward_intermediates(images, [0, 2], norm=True, intermediates_only=True)
    options: dict[str, Any] = {"norm": True, "stop_early": True, "output_fmt": "NHWC"}
    maps = ours.forward_intermediates(images, [0, 2], intermediates_only=True, **options)
    for one, other in zip(maps, expected, strict=True):
        assert one.shape == (2, 8, 11, 32) and torch.allclose(one.movedim(-1, 1), other, atol=1e-5)
    last, [only] = ours.forward_intermediates(images, [-1], **options)
    assert torch.equal(last[:, 1:], only.flatten(1, 2))
    with pytest.raises(UsageError, match="no block 3: this model has blocks 0 to 2"):
        ours.forward_intermediates(images, [3])


@torch.no_grad()
def test_hidden_pixels_count_as_a_target_alone():
    task = simmim()
    images, mask = torch.randn(1, 3, 32, 32), random_mask(1, 8, 8)
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    changed = torch.where(hidden, torch.randn_like(images), images)
    assert torch.equal(task.predict(images, mask), task.predict(changed, mask))
    assert not torch.allclose(task.predict(images, mask), task.predict(images + 1, mask))
    assert task.reconstruct(images, mask).loss != task.reconstruct(changed, mask).loss


@pytest.mark.parametrize(("chans", "bf16"), [(1, False), (4, False), (3, True)])
def test_training_lowers_the_loss(chans: int, bf16: bool):
    """R-MIM-2, and in bf16 as in fp32."""
    task = SimMIM(ViT(dataclasses.replace(SMALL, num_classes=0, in_chans=chans)), SimMIMConfig(mask_patch=8))
    images = torch.randn(4, chans, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    mask, losses = random_mask(4, 8, 8), []
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = task({"image": images, "mask": mask})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@torch.no_grad()
def test_bf16_is_near_fp32():
    task = simmim()
    images, mask = torch.randn(2, 3, 32, 32), random_mask(2, 8, 8)
    exact = task.predict(images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = task.predict(images, mask)
    assert (rounded.float() - exact).abs().mean() < 0.03 * exact.abs().mean()


@torch.no_grad()
def test_any_size_of_image():
    """R-MIM-1: sizes that the patch does not divide are padded at their end, and the prediction is cut to the image."""
    task = simmim()
    images, mask = torch.randn(1, 3, 30, 42), random_mask(1, 8, 11)
    assert task.predict(images, mask).shape == (1, 3, 30, 42)
    padded = nn.functional.pad(images, (0, 2, 0, 2))
    assert torch.allclose(task.predict(images, mask), task.predict(padded, mask)[..., :30, :42], atol=1e-5)
    assert task.features(images).shape == task.features(images, 0).shape == (1, 32)


def test_inputs_of_another_shape_are_named():
    for shape in ((3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (1, 3, 4, 32, 32)):
        with pytest.raises(UsageError, match="3 channels"):
            vit()(torch.zeros(shape))


def test_depth_and_decay_of_every_parameter():
    task = Classify(vit(), 5)
    groups = parameter_groups(task, OptimConfig(layer_decay=0.65, weight_decay=0.05))
    found = {n: (g["layer"], g["layer_scale"], g["weight_decay"]) for g in groups for n in g["names"]}
    assert found.keys() == {name for name, _ in task.named_parameters()}
    scale = {layer: pytest.approx(0.65 ** (4 - layer)) for layer in range(5)}
    assert found["model.patch_embed.proj.weight"] == (0, scale[0], 0.05)
    assert found["model.pos_embed"] == found["model.cls_token"] == (0, scale[0], 0.0)
    assert found["model.blocks.0.attn.qkv.weight"] == (1, scale[1], 0.05)
    assert found["model.blocks.2.ls2.gamma"] == found["model.blocks.2.norm1.weight"] == (3, scale[3], 0.0)
    assert found["model.norm.weight"] == found["model.head.bias"] == (4, 1.0, 0.0)
    assert found["model.head.weight"] == (4, 1.0, 0.05)
    masked = simmim()
    assert {"mask_token", "encoder.pos_embed", "encoder.cls_token"} <= masked.no_weight_decay()
    assert masked.layer_id("encoder.blocks.1.mlp.fc1.weight") == 2 and masked.layer_id("decoder.0.weight") == 4


def test_init_weights_reaches_every_parameter():
    with torch.device("meta"):
        model = ViT(SMALL)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.init_weights(3)
    eager = ViT(SMALL)
    eager.init_weights(3)
    for (name, one), other in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        assert one.isfinite().all() and torch.equal(one, other), name
    assert model.blocks[1].ls1.gamma.eq(0.1).all() and model.blocks[1].norm1.weight.eq(1).all()
    assert 0.01 < model.pos_embed.std() < 0.03


@pytest.mark.parametrize("mode", ["selective", "block"])
def test_checkpointing_changes_no_gradient(mode: str):
    model, images, ran = vit(), torch.randn(2, 3, 32, 32), list[int]()
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: ran.append(1))
    gradients = []
    for setting in ("none", mode):
        model.set_grad_checkpointing(setting)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert len(gradients[0]) == len(list(model.parameters())) and len(ran) == 3


def test_timm_takes_the_encoder_of_a_saved_model(tmp_path: Path):
    task, images = simmim(), torch.randn(1, 3, 32, 32)
    task.save_pretrained(tmp_path / "simmim")
    record = json.loads((tmp_path / "simmim" / "config.json").read_text())["timm"]
    state = load_file(tmp_path / "simmim" / "model.safetensors")
    theirs: Any = timm.create_model(record["architecture"], **record["model_args"]).eval()
    encoder = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    theirs.load_state_dict(encoder)
    with torch.no_grad():
        expected = task.encoder.forward_features(images)
        assert torch.allclose(theirs.forward_features(images), expected, atol=1e-5)


@torch.no_grad()
def test_saved_models_are_opened_again(tmp_path: Path):
    task = simmim()
    task.preprocessing = {"mean": [0.5] * 3, "std": [0.2] * 3}
    images, mask = torch.randn(1, 3, 30, 42), random_mask(1, 8, 11)
    task.save_pretrained(tmp_path / "simmim")
    again = load_simmim(tmp_path / "simmim").eval()
    assert torch.equal(again.predict(images, mask), task.predict(images, mask))
    assert again.preprocessing == task.preprocessing and "timm" not in read_metadata(tmp_path / "simmim")
    encoder = from_pretrained(tmp_path / "simmim").eval()
    assert torch.equal(encoder(images), task.encoder(images))
    model = vit()
    Classify(model, 5).save_pretrained(tmp_path / "classify")
    pipeline = load_pipeline(tmp_path / "classify")
    assert isinstance(pipeline.model, ViT) and torch.equal(pipeline.model(images), model(images))


def test_fine_tuning_begins_with_the_encoder(tmp_path: Path):
    """R-MIM-8: another size, other channels and a fresh classifier, each named in the report."""
    task = simmim()
    task.save_pretrained(tmp_path)
    model = ViT(dataclasses.replace(SMALL, img_size=(48, 40), in_chans=1))
    fresh = model.head.weight.clone()
    report = load_vit(model, tmp_path)
    assert "map 8×8 → 12×10" in report.reshaped["pos_embed"] and "3 → 1" in report.reshaped["patch_embed.proj.weight"]
    assert set(report.fresh) == {"head.weight", "head.bias"} and "mask token" in report.left_out[0]
    assert torch.equal(model.head.weight, fresh) and not report.plain
    assert torch.equal(model.blocks[2].mlp.fc2.weight, task.encoder.blocks[2].mlp.fc2.weight)
    assert torch.equal(
        model.cls_token + model.pos_embed[:, :1], (task.encoder.cls_token + task.encoder.pos_embed)[:, :1]
    )
    tables = [m.pos_embed[0, 1:].unflatten(0, m.config.stage_maps()[0]) for m in (model, task.encoder)]
    assert torch.allclose(tables[0][5:7, 4:6].mean((0, 1)), tables[1][3:5, 3:5].mean((0, 1)), atol=0.2)


def test_simmim_goes_on_from_a_model_of_other_channels(tmp_path: Path):
    simmim().save_pretrained(tmp_path)
    other = simmim(in_chans=1)
    report = load_vit(other, tmp_path)
    assert set(report.fresh) == {"decoder.0.weight", "decoder.0.bias"}
    assert list(report.reshaped) == ["encoder.patch_embed.proj.weight"]
    assert torch.equal(other.mask_token, load_file(tmp_path / "model.safetensors")["mask_token"])


def test_weights_of_timm_are_read(tmp_path: Path):
    theirs: Any = timm.create_model(TIMM_NAME, **dataclasses.replace(SMALL, num_classes=7).timm_arguments())
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    model = ViT(SMALL)
    report = load_vit(model, tmp_path / "timm.pth")
    assert report.looks_like == "a ViT" and set(report.fresh) == {"head.weight", "head.bias"}
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.eval().forward_features(images), theirs.eval().forward_features(images), atol=1e-5)


def test_models_of_another_kind_are_refused(tmp_path: Path):
    Classify(vit(), 5).save_pretrained(tmp_path / "vit")
    swinscale.save_pretrained(random_swin(2), tmp_path / "swin")
    with pytest.raises(UsageError, match=r"swinscale\.adapters\.vit\.from_pretrained"):
        swinscale.from_pretrained(tmp_path / "vit")
    with pytest.raises(UsageError, match=r"swinscale\.from_pretrained"):
        from_pretrained(tmp_path / "swin")
    with pytest.raises(UsageError, match="holds a ViT"):
        read_config(tmp_path / "vit")
    with pytest.raises(UsageError, match="does not fit a ViT of depth 3"):
        load_vit(vit(), tmp_path / "swin")
    with pytest.raises(UsageError, match=r"does not fit a ViT of depth 4.*blocks\.3"):
        load_vit(vit(depth=4), tmp_path / "vit")
    with pytest.raises(UsageError, match="'window_size'"):
        load_pipeline(tmp_path / "vit", window_size=4)
    with pytest.raises(UsageError, match=r"adapters\.vit\.ViT"):
        build_model(SMALL)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 5}, "no multiple of num_heads=5"),
        ({"img_size": "big"}, "img_size='big'"),
        ({"depth": 0}, "depth=0"),
        ({"init_values": -1.0}, "init_values=-1.0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
    ],
)
def test_configurations_that_cannot_be(fields: dict[str, Any], words: str):
    with pytest.raises(UsageError) as error:
        ViTConfig(**fields)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_published_recipes_are_those_of_the_article():
    """Pre-training and fine-tuning of ViT-B as published, but for what ``adapters.vit`` names."""
    before, after = get_recipe("simmim_vit_base_800ep"), get_recipe("imagenet_simmim_vit_base_800ep")
    for recipe in (before, after):
        model = recipe.model
        assert isinstance(model, ViTConfig) and (model.img_size, model.patch_size) == ((224, 224), (16, 16))
        assert (model.embed_dim, model.depth, model.num_heads, model.init_values) == (768, 12, 12, 0.1)
        assert model.drop_path_rate == 0.1 and recipe.train.batch_size == 2048
    optim, task = before.train.optim, before.task
    assert isinstance(task, SimMIMConfig) and (task.mask_patch, task.mask_ratio, task.loss) == (32, 0.6, "l1")
    assert (before.train.epochs, optim.warmup_epochs, optim.weight_decay) == (800, 10, 0.05)
    assert (optim.scaled(optim.lr, 2048), optim.schedule, optim.milestones) == (4e-4, "multistep", (700.0,))
    optim = after.train.optim
    assert (after.train.epochs, optim.warmup_epochs, optim.layer_decay) == (100, 20, 0.65)
    assert (optim.scaled(optim.lr, 2048), optim.schedule, optim.weight_decay) == (5e-3, "cosine", 0.05)


def test_parameters_and_cost_of_vit_base():
    config = ViTConfig()
    with torch.device("meta"):
        theirs = timm.create_model(TIMM_NAME)
    count = sum(p.numel() for p in task_of(get_recipe("imagenet_simmim_vit_base_800ep")).parameters())
    assert count - 12 * 2 * 768 == sum(p.numel() for p in theirs.parameters()) == 86_567_656
    assert config.macs() == pytest.approx(17.58e9, rel=1e-3)  # as published for DeiT-B, which is the same network


def test_dense_tasks_need_a_swin():
    dense = dataclasses.replace(get_recipe("mask_rcnn_swinv2_tiny"), model=SMALL)
    with pytest.raises(UsageError, match="needs a Swin Transformer: a ViT"):
        build_task(dense, ["cat"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two epochs of masked image modelling, and one of fine-tuning from them, on a few of the bundled pictures."""
    place = tmp_path_factory.mktemp("runs")
    runs = {name: place / name for name in ("desk_simmim_vit", "desk_finetune_vit")}
    masked = ["train.epochs=2", "train.checkpoint_every=1"]
    tuned = ["train.epochs=1", "data.labels_per_class=0", "--init", str(runs["desk_simmim_vit"] / "last")]
    for name, settings in (("desk_simmim_vit", masked), ("desk_finetune_vit", tuned)):
        assert main(["train", name, "--out", str(runs[name]), *TINY, *settings]) == 0
    return runs


def test_recipes_from_end_to_end(trained: dict[str, Path], photos: Path, tmp_path: Path, capsys):
    """Vital signs at every step, evaluation at two sizes, information, prediction and reconstruction, a report."""
    picture, out = str(photos / "red" / "0.png"), tmp_path / "out"
    for name, measure, drawn in (
        ("desk_simmim_vit", "psnr", "0_reconstructed.png"),
        ("desk_finetune_vit", "top1", "0_predicted.png"),
    ):
        run = trained[name]
        last = str(run / "last")
        assert main(["eval", last, "--device", "cpu"]) == 0
        assert measure in capsys.readouterr().out
        assert main(["eval", last, "--device", "cpu", "--img-size", "48"]) == 0
        assert "at 48×48" in capsys.readouterr().out
        assert any(json.loads(line)["kind"] == "vitals" for line in (run / "log.jsonl").read_text().splitlines())
        assert main(["info", last]) == 0
        assert "ViT of timm (embed_dim 16, depth 2, heads 2, patches of 4×4)" in capsys.readouterr().out
        assert main(["predict", picture, "--checkpoint", last, "--out", str(out), "--device", "cpu"]) == 0
        assert (out / drawn).is_file()
    assert main(["report", str(trained["desk_simmim_vit"]), "--out", str(tmp_path / "report.html")]) == 0


def test_a_run_goes_on_from_its_checkpoint(trained: dict[str, Path], tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained["desk_simmim_vit"], run)
    before = load_file(run / "last" / "model.safetensors")
    shutil.rmtree(max((run / "checkpoints").iterdir(), key=lambda place: place.name))
    shutil.rmtree(run / "last")
    (run / "result.json").unlink()
    assert len(list((run / "checkpoints").iterdir())) == 1
    assert main(["train", str(run / "config.json"), "--out", str(run), "--resume"]) == 0
    after = load_file(run / "last" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_commands_for_swins_say_so(trained: dict[str, Path], photos: Path, tmp_path: Path, capsys):
    place, picture = str(trained["desk_finetune_vit"] / "last"), str(photos / "red" / "0.png")
    for command in (
        ["explain", picture, "--checkpoint", place],
        ["transfer", place, str(tmp_path / "out"), "--img-size", "64"],
        ["convert", place, str(tmp_path / "out"), "--to", "timm"],
        ["quantize", place, "--out", str(tmp_path / "out")],
        ["export", place, "--out", str(tmp_path / "out"), "--format", "torch"],
        ["train", "photos_finetune", "--data", str(photos), "--out", str(tmp_path / "run"), "--init", place],
        ["show", "desk_simmim_vit", "--gpus", "1"],
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert error.startswith("swinscale: ") and error.count("\n") == 1 and ("ViT" in error or "Swin" in error), error
