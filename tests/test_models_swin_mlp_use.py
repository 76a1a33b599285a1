"""SwinMLP in the hands of the rest of the library: saved, loaded, trained, compiled, exported."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image

from random_models import SMALL_MLP, random_mlp
from swinscale.diagnose.explain import attention
from swinscale.errors import UsageError
from swinscale.export.program import export_program
from swinscale.inference import load_pipeline
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.models.swin_mlp import SwinMLP, SwinMLPConfig
from swinscale.recipes import DataConfig, Recipe, run
from swinscale.tasks import ClassifyConfig
from swinscale.train_config import TrainConfig
from swinscale.weights import from_pretrained, load_weights, save_pretrained, transfer


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_a_saved_one_comes_back(tmp_path):
    model, x = random_mlp(), torch.randn(1, 3, 32, 32)
    save_pretrained(model, tmp_path, metadata={"task": {"name": "classify"}})
    again = from_pretrained(tmp_path)
    assert type(again) is SwinMLP
    assert again.config == model.config
    assert torch.equal(again.eval()(x), model(x))
    fewer = from_pretrained(tmp_path, num_classes=2, in_chans=1, drop_path_rate=0.3)
    assert fewer(x[:, :1]).shape == (1, 2)
    assert torch.equal(fewer.layers[1].blocks[2].spatial_mlp.weight, model.layers[1].blocks[2].spatial_mlp.weight)
    moved, report = transfer(tmp_path, num_classes=7)
    assert type(moved) is SwinMLP
    assert set(report.fresh) == {"head.weight", "head.bias"}
    with pytest.raises(
        UsageError, match=r"layers\.0\.blocks\.0\.spatial_mlp\.weight \(file \(32, 16, 1\), model \(50, 25, 1\)\)"
    ):
        from_pretrained(tmp_path, window_size=5)


def test_a_run_trains_saves_and_predicts(tmp_path):
    """Instruments read what there is, and a checkpoint comes back as a pipeline. Attention is not to be seen."""
    generator = torch.Generator().manual_seed(0)
    for split, name, index in itertools.product(("train", "validation"), ("dark", "light"), range(4)):
        place = tmp_path / "images" / split / name / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(128, (32, 32, 3), generator=generator) + (127 if name == "light" else 0)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(place)
    model = SwinMLPConfig(**{**SMALL_MLP, "num_classes": 0, "drop_path_rate": 0.0})
    data = DataConfig(train=str(tmp_path / "images"), augment="none", crop_ratio=None)
    training = TrainConfig(epochs=1, batch_size=4, num_workers=0, device="cpu", diagnose_every=1)
    run(Recipe("mixer", model, ClassifyConfig(), data, training), tmp_path / "run")
    pipeline = load_pipeline(tmp_path / "run" / "last")
    assert type(pipeline.backbone) is SwinMLP
    assert pipeline.classes == ["dark", "light"]
    grey = pipeline.read(tmp_path / "images" / "train" / "dark" / "0.png")
    assert pipeline.backbone(grey[None]).shape == (1, 2)
    with pytest.raises(UsageError, match="SwinMLP has no attention to look at"):
        attention(pipeline.backbone, grey[None], 0, 0, (3, 3))


def test_weights_of_the_other_kind_are_refused(tmp_path):
    model, swin = random_mlp(), SwinTransformer(SwinConfig(version=1, num_classes=5, **SMALL_MLP))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match="look like no SwinMLP"):
        load_weights(model, swin.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UsageError, match="look like a SwinMLP, which has no attention"):
        load_weights(swin, state)
    assert load_weights(SwinMLP(model.config), state).plain


@pytest.mark.parametrize(
    ("sizes", "dynamic"),
    [
        ([(37, 44)], None),
        pytest.param([(32, 32), (37, 44), (20, 60), (9, 50), (64, 33)], None, marks=pytest.mark.slow),
        pytest.param([(32, 32), (37, 44), (20, 60), (9, 50), (64, 33)], True, marks=pytest.mark.slow),
    ],
)
def test_a_compiler_makes_few_graphs_and_the_same_numbers(sizes, dynamic):
    torch._dynamo.reset()
    model = random_mlp(depths=(2, 2), num_heads=(2, 4))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3):
        for size in sizes:
            x = torch.randn(2, 3, *size)
            assert distance(compiled(x), model(x)) <= 1e-5
    torch._dynamo.reset()


@pytest.mark.slow
def test_an_exported_program_gives_the_same_numbers_at_other_sizes():
    model = random_mlp(depths=(2, 2), num_heads=(2, 4))
    program = export_program(model).module()
    with torch.no_grad():
        for shape in ((2, 3, 32, 32), (1, 3, 37, 44), (3, 3, 9, 50), (1, 3, 5, 1)):
            x = torch.randn(shape)
            assert distance(program(x), model(x)) <= 1e-5
