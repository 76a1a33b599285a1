"""The memory recipe: every technique, alone and together, gives the loss and the gradients of the plain run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.processes import launch
from tests.random_models import randomise

from swinscale.models import SwinConfig, SwinTransformer
from swinscale.parallel import MemoryConfig
from swinscale.tasks import SimMIM, SimMIMConfig

# As Giant: width doubles, depths unequal, an extra norm in some blocks; the last map (8×8) is smaller than two windows.
GIANT = SwinConfig(
    embed_dim=16, depths=(1, 2, 5, 2), num_heads=(1, 2, 2, 4), window_size=4, img_size=64, patch_size=2, num_classes=0,
    main_norm_interval=2, drop_path_rate=0.0,
)  # fmt: skip
ZERO3 = MemoryConfig(shard="zero3")
TECHNIQUES = {
    "plain": MemoryConfig(),
    "sequential": MemoryConfig(attention="sequential:4"),
    "sequential in two stages": MemoryConfig(attention=("sequential:3", "sequential:3", "auto", "auto")),
    "selective": MemoryConfig(checkpointing="selective"),
    "block": MemoryConfig(checkpointing="block"),
    "by stage": MemoryConfig(checkpointing=("block", "selective", "none", "none")),
    "zero1": MemoryConfig(shard="zero1"),
    "zero2": MemoryConfig(shard="zero2"),
    "zero3": ZERO3,
    "hybrid": MemoryConfig(shard="zero3", replicas=2),
    "offload": MemoryConfig(shard="zero3", offload=True),
    "all": MemoryConfig(("sequential:4", "sequential:4", "auto", "auto"), "block", "zero3", 2, True),
    "all, selective": MemoryConfig("sequential:4", "selective", "zero1"),
}


def build(device: str = "cpu") -> SimMIM:
    with torch.device(device):
        return SimMIM(SwinTransformer(GIANT), SimMIMConfig(mask_patch=16))


def batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    masked = torch.stack([torch.randperm(32 * 32, generator=random) < 600 for _ in range(8)]).view(8, 32, 32)
    return {"image": torch.randn(8, 3, 64, 64, generator=random), "mask": masked}


WORKER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from swinscale.parallel import gather, micro_batch, prepare, whole, world
from tests.test_parallel import GIANT, TECHNIQUES, batch, build
torch.set_num_threads(1)
folder, passes = Path(sys.argv[1]), int(sys.argv[2])
with world("cpu", alone_in_group=True) as here:
    found = {}
    for name, memory in TECHNIQUES.items():
        if here.size % memory.replicas:
            continue
        task = build()
        task.load_state_dict(load_file(folder / "state.safetensors"))
        model = prepare(task, memory, here, "fp32")
        loss, share = 0.0, 8 // here.size // passes
        for step in range(passes):
            start = (step * here.size + here.rank) * share
            part = {key: value[start : start + share] for key, value in batch().items()}
            with micro_batch(model, memory, last=step + 1 == passes):
                value, _ = model(part)
                (value / passes).backward()
            loss += value.item() / passes
        gradients = {k: whole(p.grad) for k, p in task.named_parameters()}
        reference = load_file(folder / "gradients.safetensors")
        worst = max((gradients[k] - reference[k]).abs().max().item() for k in reference)
        found[name] = here.sum(loss) / here.size, worst
    # Without a checkpoint: built on meta, each process fills its share.
    meta = build("meta")
    prepare(meta, TECHNIQUES["zero3"], here, "fp32", seed=5)
    fresh = gather(meta)
    if here.is_main:
        eager = build()
        eager.init_weights(5)
        same = all(torch.equal(fresh[k], v) for k, v in eager.state_dict().items())
        print(json.dumps({"found": found, "same": same, "nan": any(v.isnan().any().item() for v in fresh.values())}))
"""


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> tuple[object, float]:
    """Random weights, and loss and gradients of the whole batch in one process without any technique."""
    folder = tmp_path_factory.mktemp("plain")
    torch.set_num_threads(1)
    task = randomise(build())
    loss, _ = task(batch())
    loss.backward()
    save_file(dict(task.state_dict()), folder / "state.safetensors")
    save_file({name: p.grad for name, p in task.named_parameters()}, folder / "gradients.safetensors")
    return folder, loss.item()


@pytest.mark.parametrize(("processes", "passes"), [(1, 1), (2, 2), (4, 1)])
def test_every_technique_gives_the_gradients_of_the_plain_run(plain_run, processes, passes):
    """R-BIG-2, R-BIG-3: fp32, ≤ 1e-6, with and without accumulation; values on meta as eager ones for the same seed."""
    folder, loss = plain_run
    result = json.loads(launch(processes, WORKER, folder, passes)[0])
    expected = {name for name, memory in TECHNIQUES.items() if processes % memory.replicas == 0}
    assert result["found"].keys() == expected
    largest = max(g.abs().max().item() for g in load_file(folder / "gradients.safetensors").values())
    assert largest > 0.01
    for name, (value, worst) in result["found"].items():
        assert abs(value - loss) <= 1e-6, name
        assert worst <= 1e-6 * max(1, largest), name
    assert result["same"]
    assert not result["nan"]


MIXED = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from swinscale.parallel import MemoryConfig, autocast, prepare, whole, world
from tests.test_parallel import batch, build
torch.set_num_threads(1)
folder = Path(sys.argv[1])
with world("cpu") as here:
    share = slice(here.rank * 4, here.rank * 4 + 4)
    reference, found = load_file(folder / "gradients.safetensors"), {}
    for name, memory in {"plain": MemoryConfig(), "zero3": MemoryConfig(shard="zero3")}.items():
        task = build()
        task.load_state_dict(load_file(folder / "state.safetensors"))
        model = prepare(task, memory, here, "bf16")
        with autocast("bf16", here.device):
            loss, _ = model({k: v[share] for k, v in batch().items()})
        loss.backward()
        parts = [(whole(p.grad), reference[k]) for k, p in task.named_parameters()]
        assert all(g.dtype == torch.float32 for g, _ in parts)
        found[name] = sum(((g - r).norm() / r.norm()).item() for g, r in parts) / len(parts)
    task = build()
    model = prepare(task, MemoryConfig(shard="zero3"), here, "fp32")
    # Loss scaling of fp16: a value that overflows in one share makes every process leave the step out.
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.AdamW(task.parameters(), lr=1e-3)
    before, scale = whole(task.mask_token).detach().clone(), None
    for overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale(model({k: v[share] for k, v in batch().items()})[0]).backward()
        if overflow and here.rank == 1:
            task.encoder.norm.weight.grad.to_local().fill_(torch.inf)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found[f"overflow {overflow}"] = torch.equal(whole(task.mask_token), before), scaler.get_scale()
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_mixed_precision(plain_run):
    """bf16 shares are no less exact than autocast alone; gradients are summed in fp32; fp16's loss scaling sees all shares."""
    folder, _ = plain_run
    for text in launch(2, MIXED, folder):
        found = json.loads(text)
        assert 0.005 < found["plain"] < 0.08
        assert found["zero3"] < 1.5 * found["plain"]
        assert found["overflow True"] == [True, 32768.0]
        assert found["overflow False"] == [False, 32768.0]


STATISTICS = """
import sys, torch
from torch import nn
from swinscale.parallel import share_statistics, world
with world("cpu") as here:
    norm = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(1, track_running_stats=False))
    norm[0].running_mean.fill_(here.rank)
    share_statistics(norm)
    torch.save(norm.state_dict(), f"{sys.argv[1]}/{here.rank}.pt")
"""


def test_statistics_of_batch_norms_are_shared(tmp_path):
    """Each process saw other images: what is evaluated and stored is the mean of what they know, the same everywhere."""
    launch(2, STATISTICS, tmp_path)
    for rank in (0, 1):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert state["0.running_mean"].tolist() == [0.5, 0.5] and state["0.running_var"].tolist() == [1, 1]


LEAVING = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from swinscale.parallel import world
sys.setswitchinterval(1000)  # the main thread gives the GIL away only where it waits
for _ in range(300):
    with world("cpu", alone_in_group=True):
        models = [DistributedDataParallel(torch.nn.Linear(2, 2))]
        models[0](torch.ones(1, 2)).sum().backward()
        dist.all_reduce(torch.ones(1))
    models.clear()
"""


def test_a_model_that_outlives_its_group_does_not_block_the_end():
    """As after a signal, whose traceback holds the model: gloo's thread may still need the GIL when the model is freed."""
    launch(1, LEAVING, timeout=120)
