"""``python -m bench vitals``: what a reading of a run's vital signs costs, beside the steps between two readings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench import tables
from bench.contenders import Setting
from swinscale.diagnose.instrument import View, watched_update
from swinscale.diagnose.vitals import Vitals
from swinscale.models import SwinTransformer
from swinscale.parallel import World, autocast
from swinscale.tasks import Classify
from swinscale.timing import Spread, alternate
from swinscale.train_config import TrainConfig


def cost(setting: Setting, batch: int, device: str, repeats: int) -> dict[str, Any]:
    """Seconds of a training step and of a reading, in alternation, and what that is at the default interval."""
    where = torch.device(device)
    task = Classify(SwinTransformer(setting.config), setting.config.num_classes).to(where).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    size = setting.config.img_size
    images = {"image": torch.randn(batch, setting.config.in_chans, *size, device=where)}
    images["label"] = torch.arange(batch, device=where) % setting.config.num_classes
    precision, interval = "bf16" if device == "cuda" else "fp32", TrainConfig().diagnose_every
    view = View(task, 2 * interval, 0.0, 10**6, 0, precision, World(0, 1, where), images)  # type: ignore[arg-type]

    def step(_: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(view.precision, where):
            loss, _ = task(images)
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), 5.0)
        optimizer.step()

    def reading(_: int) -> None:
        with watched_update([Vitals(1)], view, lambda *_: None):
            pass

    steps, readings = alternate([step, reading], repeats, device, min_seconds=0.0)
    extra = Spread.ratio(readings, steps)
    return {
        "title": str(setting),
        "batch": batch,
        "device": device,
        "precision": precision,
        "step_s": Spread.of(steps).as_dict(),
        "reading_steps": extra.as_dict(),
        "interval": interval,
        "share": extra.median / interval,
        "rounds": {"step_s": steps, "reading_s": readings},
    }


def parts(content: dict[str, Any]) -> dict[str, Any]:
    """What a page can show."""
    return {"cost": lambda: cost_table(content), "machine": lambda: tables.machine(content["environment"])}


def cost_table(content: dict[str, Any]) -> str:
    """A row: the reading as a number of steps, and its share of training at the default interval."""
    heads = ("training", "a step", "a reading, in steps (quartiles)", "interval, steps", "share of training")
    row = content["cost"]
    what = f"{row['title']}, batch {row['batch']}, {row['precision']} on {row['device']}"
    step = tables.duration(row["step_s"]["median"])
    shares = (str(row["interval"]), f"{100 * row['share']:.2f} %")
    return tables.table(heads, [(what, step, tables.spread(row["reading_steps"]), *shares)])
