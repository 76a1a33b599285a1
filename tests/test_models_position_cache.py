"""What is computed once: the position bias in evaluation, layouts always; and when it is computed anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from random_models import random_swin, randomise
from swinscale.models.position import RelativePositionBias


def operations(model, x, training=False):
    """How often each operation runs."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        out = model(x)
        if training:
            out.sum().backward()
    return {e.key.removeprefix("aten::"): e.count for e in seen.key_averages()}


MADE_FROM_SIZES = {"arange", "remainder", "meshgrid", "lift_fresh", "argsort"}


@pytest.mark.parametrize("version", [1, 2])
def test_steady_state_builds_no_constants(version):
    """R-SPD-2: after the first call nothing is made on the host: no layout, mask or coordinates, no copy."""
    model = random_swin(version, drop_path_rate=0.0)
    x = torch.randn(2, 3, 39, 200 + 8 * version)  # maps that no other test asks for
    with torch.no_grad():
        first, second = operations(model, x), operations(model, x)
    assert "arange" in first
    assert not MADE_FROM_SIZES & set(second)
    assert not {"sigmoid", "masked_fill", "ne"} & set(second), "the bias with its mask is kept"
    model.train()
    operations(model, x, True)
    steady = operations(model, x, True)
    assert not MADE_FROM_SIZES & set(steady)
    blocks = sum(len(stage.blocks) for stage in model.layers)
    assert steady.get("sigmoid", 0) == (blocks if version == 2 else 0), "the bias network runs once per block"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_no_copies_from_host_to_device(version, training):
    """R-SPD-2, seen by the profiler."""
    model = random_swin(version, drop_path_rate=0.1).cuda().train(training)
    x = torch.randn(2, 3, 37, 45, device="cuda")
    for _ in range(2):
        model(x).sum().backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        model(x).sum().backward()
        torch.cuda.synchronize()
    assert not [e.key for e in seen.key_averages() if "HtoD" in e.key]


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def replaced(model):
    for p in model.parameters():
        p.data = p.data * 1.5


def behind_autograd(model):
    """As exponential moving averages are often kept; evaluation then begins with ``eval()``."""
    for p in model.parameters():
        p.data.mul_(1.5)
    model.eval()


def optimiser(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.1).step()


def loaded(model):
    model.load_state_dict(randomise(copy.deepcopy(model), seed=5).state_dict())


def assigned(model):
    model.load_state_dict(randomise(copy.deepcopy(model), seed=5).state_dict(), assign=True)


def half(model):
    model.to(torch.float64)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("change", [in_place, replaced, behind_autograd, optimiser, loaded, assigned, half])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changed_weights_are_noticed(change, version, mode):
    """R-SPD-2: a model that has cached its bias gives what a fresh copy with the new weights gives."""
    model, x = random_swin(version), torch.randn(1, 3, 32, 32)
    with mode():
        before = model(x)
    change(model)
    fresh = random_swin(version)
    fresh = fresh.to(next(model.parameters()).dtype)
    fresh.load_state_dict(model.state_dict())
    x = x.to(next(model.parameters()).dtype)
    with mode():
        assert torch.equal(model(x), fresh(x))
        assert not torch.allclose(model(x).float(), before) or change is half


def test_a_cache_filled_in_inference_mode_serves_training():
    model, x = random_swin(2, drop_path_rate=0.0), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        model(x)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model(x).sum().backward()  # evaluation mode, frozen backbone: the kept bias takes part in autograd
    model.requires_grad_(True)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.layers[0].blocks[0].attn.parameters())


def test_functional_calls_use_the_weights_given():
    model, x = random_swin(2), torch.randn(1, 3, 32, 32)
    other = randomise(copy.deepcopy(model), seed=9)
    with torch.no_grad():
        model(x)
        found = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
        assert torch.equal(found, other(x))


def test_a_large_bias_is_not_kept():
    """A window of 24 with many heads: its values are kept, the bias for each pair of tokens is not."""
    model = random_swin(2, window_size=24, img_size=96, num_heads=(4, 4), depths=(1, 1), embed_dim=32, patch_size=4)
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 96))
    attn: RelativePositionBias = model.layers[0].blocks[0].attn
    kept = attn._kept[1]
    assert kept.values.shape == (4, 47 * 47)
    assert not kept._made


def test_many_sizes_do_not_fill_the_memory(monkeypatch):
    """Each size brings masks of its own; a bias keeps those of the last few."""
    from swinscale.ops import position

    monkeypatch.setattr(position, "KEPT", 20_000)
    model = random_swin(2)
    with torch.no_grad():
        for side in range(33, 65):
            model(torch.randn(1, 3, side, 97 - side))
    for stage in model.layers:
        kept = stage.blocks[1].attn._kept[1]._made.values()
        assert any(regions is not None for _, regions in kept)
        assert sum(made.numel() for made, _ in kept) <= 20_000


def test_chunks_do_not_change_the_output(monkeypatch):
    """On a CPU a block takes a few windows at a time; masks, images and remainders fall where they may."""
    from swinscale.models import chunks

    for version, pad in ((1, "exact"), (2, "exact"), (2, "legacy")):
        model, x = random_swin(version, pad=pad), torch.randn(3, 3, 60, 92)
        outputs = []
        with torch.no_grad():
            for tokens in (16, 48, 200, 10**9):
                monkeypatch.setattr(chunks, "TOKENS", tokens)
                outputs.append(model(x))
        for out in outputs[1:]:
            assert torch.allclose(out, outputs[0], atol=1e-5)


def test_hooks_see_whole_tensors(monkeypatch):
    from swinscale.models import chunks

    monkeypatch.setattr(chunks, "TOKENS", 16)
    model, seen = random_swin(2), []
    model.layers[0].blocks[0].mlp.fc1.register_forward_hook(lambda module, x, out: seen.append(out.shape))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert seen == [(2, 4, 16, 96)]
