"""R-DOWN-1: feature maps of chosen stages, any size, a norm per requested level, frozen stages, no unused parameter."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from random_models import random_swin, randomise
from swinscale import UsageError, load_weights
from swinscale.adapters import REQUIREMENTS, needs
from swinscale.models.pyramid import Pyramid, keep_stages
from swinscale.parallel import world

FOUR = {"depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4), "embed_dim": 16, "img_size": 64}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (1, 3), (0, 2), (3,)], ids=str)
def test_maps_are_those_of_the_model_each_normalised(version: int, stages: tuple[int, ...]):
    whole = random_swin(version, **FOUR)
    images = torch.randn(2, 3, 75, 50)  # neither side is a multiple of anything
    expected = whole.forward_intermediates(images, list(stages), intermediates_only=True, output_fmt="NHWC")
    pyramid = randomise(Pyramid(random_swin(version, **FOUR), stages), seed=1)
    report = load_weights(pyramid.backbone, whole.state_dict())
    assert any("stages after" in line for line in report.left_out) == (stages[-1] < 3)
    maps = pyramid(images)
    assert pyramid.channels == [16 * 2**stage for stage in stages]
    for stage, found, raw in zip(stages, maps, expected, strict=True):
        norm = pyramid.norms[str(stage)] if stage < 3 else whole.norm
        assert torch.equal(found, F.layer_norm(raw, raw.shape[-1:], norm.weight, norm.bias).movedim(-1, 1))
        stride = 4 * 2**stage
        assert found.shape[2:] == (-(-75 // stride), -(-50 // stride)) and found.is_contiguous()


@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (0, 2), (1,)], ids=str)
@pytest.mark.parametrize("frozen", [0, 1])
def test_distributed_training_finds_no_unused_parameter(stages: tuple[int, ...], frozen: int):
    with world("cpu", alone_in_group=True):
        model = DistributedDataParallel(Pyramid(random_swin(**FOUR).train(), stages, frozen))
        for _ in range(2):  # an unused parameter is an error in the second step
            sum(x.square().mean() for x in model(torch.randn(1, 3, 64, 64))).backward()
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


def test_frozen_stages_do_not_move():
    fields = {**FOUR, "drop_path_rate": 0.5, "drop_rate": 0.3, "ape": True}
    model = Pyramid(random_swin(**fields), (0, 1, 2, 3), frozen_stages=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(2, 3, 64, 64)
    first = model(images)
    sum(x.square().mean() for x in first).backward()
    optimiser.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    still = ("backbone.patch_embed.", "backbone.absolute_pos_embed", "backbone.layers.0.", "backbone.layers.1.")
    still += ("norms.0.", "norms.1.")
    assert moved and not [name for name in moved if name.startswith(still)]
    assert not [name for name in before if not name.startswith(still) and name not in moved]
    second = model(images)
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))  # no dropout, no stochastic depth
    assert not model.backbone.layers[1].training and model.backbone.layers[2].training and model.norms["2"].training
    assert not model.eval().backbone.layers[2].training


def test_everything_may_be_frozen():
    model = Pyramid(random_swin(**FOUR), (1, 3), frozen_stages=4).train()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("stages", [(), (4,), (-1,), (1, 0), (0, 0)], ids=str)
def test_impossible_stages_are_refused(stages: tuple[int, ...]):
    with pytest.raises(UsageError, match=r"name some of \[0, 1, 2, 3\], ascending"):
        keep_stages(random_swin(**FOUR), stages)


def test_impossible_frozen_stages_are_refused():
    with pytest.raises(UsageError, match="frozen_stages=3 is not allowed: choose 0 to 2"):
        Pyramid(random_swin(**FOUR), (0, 1), frozen_stages=3)


MISSING = """
import sys, importlib
from swinscale import UsageError
import swinscale.weights
finders, packages = sys.meta_path[:], ["timm", "transformers", "torchvision", "segmentation_models_pytorch"]
class Without:
    def find_spec(self, name, path=None, target=None):
        found = None if name in packages else (finder.find_spec(name, path, target) for finder in finders)
        return next(filter(None, found or ()), None)
sys.meta_path[:] = [Without()]
for module in ("timm", "transformers", "torchvision", "segmentation_models"):
    try:
        importlib.import_module("swinscale.adapters." + module)
    except UsageError as error:
        print(error)
"""


def test_a_missing_library_says_how_to_install_it():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True)
    lines = [
        f"This adapter needs {wanted} (No module named '{package}'): pip install '{wanted}'"
        for package, wanted in REQUIREMENTS.items()
    ]
    assert done.stdout.splitlines() == lines, done.stderr[-1000:]


def test_an_old_library_says_what_to_install():
    with pytest.raises(UsageError, match=r"needs timm>=1.0.31 \(cannot import name 'later'"), needs("timm"):
        from timm.models import later  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="No module named 'another'"), needs("timm"):
        import another  # noqa: F401
