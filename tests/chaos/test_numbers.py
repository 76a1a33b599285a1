"""Losses that are no numbers, losses that explode, and memory that runs out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tests.chaos.faults import Place, differences, one_line, recipe

from swinscale.runlog import read_log

# A loss that grows beyond all bounds at one step, as after an update that was too large.
EXPLODES = """
import math
from swinscale import train
from swinscale.tasks import Classify
inner_step, inner = train._Run._optimizer_step, Classify.forward
now = []
def step(self, batches):
    now[:] = [self.step == 7]
    return inner_step(self, batches)
def forward(self, batch):
    loss, logs = inner(self, batch)
    return (loss * (math.inf if now[0] and self.training else 1.0), logs)
train._Run._optimizer_step, Classify.forward = step, forward
"""


def finite(place: Place) -> bool:
    return all(t.isfinite().all() for t in load_file(place.run / "last/model.safetensors").values())


def with_array(photos: Path, value: float) -> Path:
    """The folder, with an array in place of one picture, as an instrument's raw data may be."""
    (photos / "red/7.png").unlink()
    np.save(photos / "red/7.npy", np.full((3, 36, 40), value, np.float32))
    return photos


def test_a_picture_of_nan(own_photos, tmp_path, fault):
    row = fault("a picture of NaN")
    place = Place(tmp_path, recipe(with_array(own_photos, np.nan), {"eval": str(own_photos)}))
    place.finish()
    assert any("red/7.npy (holds numbers that are not finite)" in text for text in place.events("unreadable"))
    assert not place.events("non_finite")
    row.outcome("named as unreadable and replaced")


@pytest.mark.parametrize("policy", ["raise", "skip", "rewind"])
def test_a_batch_of_nan(own_photos, photos, tmp_path, fault, policy):
    """A picture of huge numbers is finite until it is normalised."""
    row = fault(f"NaN in a batch, on_non_finite={policy}")
    data = with_array(own_photos, 3e38)
    place = Place(tmp_path, recipe(data, {"eval": str(photos)}, on_non_finite=policy))
    run = place.start()
    if policy == "raise":
        one_line(run, "is not finite; first in model.", "train.on_non_finite=skip")
        row.outcome("one line that names step and module, exit code 2")
        return
    assert run.wait() == 0, run.errors[-3000:]
    told, rewound = place.events("non_finite"), place.events("rewound")
    assert len(told) >= 2 and all("is not finite; first in model." in text for text in told)
    assert bool(rewound) == (policy == "rewind")
    assert finite(place)
    row.outcome(f"{len(told)} batches told and left out, weights stay finite, the run ends well", batches=len(told))


@pytest.mark.parametrize("policy", ["raise", "skip", "rewind"])
def test_an_exploding_loss(photos, tmp_path, whole, fault, policy):
    row = fault(f"the loss explodes at one step, on_non_finite={policy}")
    place = Place(tmp_path, recipe(photos, on_non_finite=policy))
    run = place.start(patch=EXPLODES)
    if policy == "raise":
        one_line(run, "Step 7: the loss or gradient is not finite", "The newest checkpoint is intact")
        assert place.saved == [3, 6]
        place.finish()
        assert differences(whole, place.run) == []
        row.outcome("one line, exit code 2; resumed without the fault, bit-identical")
        return
    assert run.wait() == 0, run.errors[-3000:]
    assert len(place.events("non_finite")) == 1
    rewound = place.events("rewound")
    assert rewound == (["Back to step 6; step 7 will be left out."] if policy == "rewind" else [])
    steps = {e["step"]: e["loss"] for e in read_log(place.run) if e["kind"] == "train"}
    assert steps.keys() == {*range(1, 13)} - {8}  # entries count from 1: that of step 7 is missing
    before = {e["step"]: e["loss"] for e in read_log(whole) if e["kind"] == "train"}
    assert all(steps[n] == before[n] for n in range(1, 8))
    assert finite(place)
    row.outcome("that step alone is left out, and said; the run ends well")


@pytest.mark.parametrize("policy", ["raise", "skip", "rewind"])
def test_a_learning_rate_that_is_far_too_high(photos, tmp_path, fault, policy):
    """After the first update the weights give nothing finite: leaving out steps does not help, and must not go on for days."""
    row = fault(f"train.optim.lr=1e20, on_non_finite={policy}")
    place = Place(tmp_path, recipe(photos, on_non_finite=policy, eval_every=0, epochs=40))
    run = place.start("train.optim.lr=1e20")
    text = one_line(run, "is not finite", "Lower train.optim.lr")
    if policy != "raise":
        assert "ten steps in a row were left out" in text
        assert len(place.events("non_finite")) == 10
    row.outcome("one line, exit code 2" + ("" if policy == "raise" else ", after ten such steps in a row"))


OUT_OF_MEMORY = """
import torch
from swinscale.tasks import Classify
inner = Classify.forward
def forward(self, batch):
    if self.training:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free."
        )
    return inner(self, batch)
Classify.forward = forward
"""


def test_a_gpu_that_is_full(photos, tmp_path, fault):
    row = fault("GPU out of memory")
    place = Place(tmp_path, recipe(photos, epochs=1))
    run = place.start(patch=OUT_OF_MEMORY)
    text = one_line(run, "ut of memory")
    assert "train.memory." in text or "train.micro_batch" in text
    row.outcome("one or two lines with settings that need less, exit code 2")
