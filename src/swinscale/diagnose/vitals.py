"""The vital signs of any training run: amplitudes, attention, position bias, gradients, updates."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from swinscale.diagnose.activations import AMPLITUDES, HEADS, Activations, sample, watched
from swinscale.diagnose.instrument import Instrument, Reading, View
from swinscale.diagnose.warning_signs import ENOUGH_KEYS, Signs, WarningSigns
from swinscale.models import SwinTransformer
from swinscale.models.swin_mlp import SwinMLP
from swinscale.parallel import autocast, is_sharded, release
from swinscale.tasks.base import Task

IMAGES = 4
"""At most so many images pass through the model for a reading."""
BIAS_READINGS = 8
"""Position biases are recorded at the first and last reading and so many times between, because they are large."""
UNIT = re.compile(r"layers\.\d+\.(blocks\.\d+|downsample)|[^.]+")


@dataclass
class _Parameters:
    """What is kept from before an update. Sums of squares are of this process's share, one entry per part."""

    parts: dict[str, list[nn.Parameter]]
    gradients: Tensor
    weights: Tensor
    samples: dict[str, list[Tensor]]


class Vitals(Instrument):
    """Reads the vital signs every so many optimiser steps, at the first and at the last (``train.diagnose_every``).

    A reading costs norms over gradients and weights, and one forward pass of four training images, without gradients and in
    evaluation mode. Attention and amplitudes need a backbone that is a ``SwinTransformer`` (and no ``SwinMLP``); of others
    only gradients and updates are read. Activations are those of the main process's images.

    Args:
        every: optimiser steps from one reading to the next; 0: none.
    """

    name = "vitals"

    def __init__(self, every: int):
        self.every, self.signs = every, WarningSigns()
        self._before: _Parameters | None = None

    def due(self, step: int, total_steps: int) -> bool:
        return self.every > 0 and (step % self.every == 0 or step in (1, total_steps))

    @torch.no_grad()
    def before_update(self, view: View) -> None:
        parts = parameters_by_part(view.task)
        gradients = [_squares([p.grad for p in part], part[0]) for part in parts.values()]
        weights = [_squares(part, part[0]) for part in parts.values()]
        samples = {name: [sample(_share(p)[0]).clone() for p in part] for name, part in parts.items()}
        self._before = _Parameters(parts, torch.stack(gradients), torch.stack(weights), samples)

    @torch.no_grad()
    def after_update(self, view: View) -> Reading | None:
        before, self._before = self._before, None
        assert before is not None, "after_update without before_update"
        updates = torch.stack([_change(part, before.samples[name]) for name, part in before.parts.items()])
        sums = torch.stack([before.gradients, before.weights, updates])
        totals = torch.tensor(view.world.sums(*sums.flatten().tolist())).view(3, -1).sqrt()
        norms = {name: column.tolist() for name, column in zip(before.parts, totals.T, strict=True)}
        seen = None
        swin = view.task.backbone
        if isinstance(swin, SwinTransformer) and not isinstance(swin, SwinMLP):
            seen = _look(view, swin) if view.world.is_main or is_sharded(view.task) else None
        if not view.world.is_main:
            return None
        gradients = {name: g / (view.clipped or 1.0) for name, (g, _, _) in norms.items()}
        ratios = {name: u / w for name, (_, w, u) in norms.items() if w}
        total = math.hypot(*gradients.values())
        signs = Signs(view.step, view.precision, view.step > view.warmup_steps, total, view.clipped, ratios)
        scalars = {f"gradient/{name}": value for name, value in gradients.items()}
        scalars |= {f"update_ratio/{name}": value for name, value in ratios.items()}
        scalars["clipped"] = view.clipped
        record: dict[str, Any] = {"weights": {name: w for name, (_, w, _) in norms.items()}}
        if seen is not None:
            bias_too = self._with_biases(view)
            more, details, signs = _summary(seen, signs, bias_too)
            scalars, record = scalars | more, record | details
        finite = {name: _short(value) for name, value in scalars.items() if math.isfinite(value)}
        return Reading(finite, _short(record), self.signs.read(signs))

    def _with_biases(self, view: View) -> bool:
        """Whether this reading is one of those that record position biases; a function of the step alone."""
        passed = [step * BIAS_READINGS // view.total_steps for step in (view.step - self.every, view.step)]
        return view.step in (1, view.total_steps) or passed[0] != passed[1]


def parameters_by_part(task: Task) -> dict[str, list[nn.Parameter]]:
    """The parameters that learn: by block, patch merging and so on of the backbone, and the rest by their first name."""
    home = next((f"{name}." for name, module in task.named_modules() if module is task.backbone and name), "")
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            unit = UNIT.match(name.removeprefix(home))
            assert unit is not None
            parts.setdefault(unit[0], []).append(parameter)
    return parts


def _share(tensor: Tensor) -> tuple[Tensor, float]:
    """What this process holds of a tensor, and one over the number of processes that hold the same."""
    if isinstance(tensor, DTensor):
        copies = [tensor.device_mesh.size(i) for i, place in enumerate(tensor.placements) if place.is_replicate()]
        return tensor.to_local().detach(), 1 / math.prod(copies)
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return tensor.detach(), 1 / processes


def _squares(tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The sum of squares, such that those of all processes add up to that of the whole tensors; on the device of ``like``."""
    total = torch.zeros((), device=like.device)
    for values, share in (_share(tensor) for tensor in tensors if tensor is not None):
        total += torch.linalg.vector_norm(values, dtype=torch.float32).square() * share
    return total


def _change(part: Sequence[Tensor], samples: Sequence[Tensor]) -> Tensor:
    """An estimate of the sum of squares of an update, from entries before and after it; adds up like ``_squares``."""
    total = torch.zeros((), device=samples[0].device)
    for tensor, old in zip(part, samples, strict=True):
        values, share = _share(tensor)
        if values.numel():
            total += (sample(values) - old).float().square().mean() * (share * values.numel())
    return total


def _look(view: View, swin: SwinTransformer) -> Activations:
    """A forward pass of a few images of the last micro-batch, through the hooks of ``watched``."""
    task, batch = view.task, view.batch
    assert batch is not None
    images = len(batch["image"])
    few = {k: v[:IMAGES] if isinstance(v, (Tensor, list)) and len(v) == images else v for k, v in batch.items()}
    training = task.training
    task.eval()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([view.device] if view.device.type == "cuda" else []))  # mixup draws
        if any(module._compiled_call_impl is not None for module in swin.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled blocks have no hooks
        stack.enter_context(autocast(view.precision, view.device))
        seen = stack.enter_context(watched(swin))
        task(few)
    release(task)
    task.train(training)
    return seen


def _summary(seen: Activations, signs: Signs, with_biases: bool) -> tuple[dict[str, float], dict[str, Any], Signs]:
    """Scalars, record and signs of what passed through the model."""
    amplitudes = dict(zip(seen.amplitudes, torch.stack([*seen.amplitudes.values()]).tolist(), strict=True))
    heads = {block: dict(zip(HEADS, values.tolist(), strict=True)) for block, values in seen.heads.items()}
    scales = {block: values.tolist() for block, values in seen.scales.items()}
    mean, largest = AMPLITUDES.index("mean"), AMPLITUDES.index("max")
    activations: dict[str, dict[str, list[float]]] = {}
    scalars, stream = dict[str, float](), dict[str, float]()
    for (name, place), values in amplitudes.items():
        activations.setdefault(name, {})[place] = values
        if place == "stream":
            scalars |= {f"amplitude/{name}": values[mean], f"largest/{name}": values[largest]}
        # A block that ends with a norm has a normalised output, whatever came before.
        if place == "mlp sum" or (place == "stream" and "attention" in activations[name] and name not in stream):
            stream[name] = values[mean]
    for block, measured in heads.items():
        scalars |= {f"{what}/{block}": _mean(measured[what]) for what in ("entropy", "top_key")}
        if block in scales:
            scalars[f"logit_scale/{block}"] = max(scales[block])
    record: dict[str, Any] = {"amplitudes": activations, "heads": heads, "keys": seen.keys, "logit_scales": scales}
    if with_biases:
        record["position_bias"] = {
            block: {"window": list(window), "values": values.tolist()}
            for block, (window, values) in seen.biases.items()
        }
    places = {f"{name} ({place})": values[largest] for (name, place), values in amplitudes.items()}
    known = {block: measured for block, measured in heads.items() if seen.keys[block] >= ENOUGH_KEYS}
    told = replace(
        signs,
        amplitudes=stream,
        largest=places,
        entropies={block: measured["entropy"] for block, measured in known.items()},
        top_keys={block: measured["top_key"] for block, measured in known.items()},
        scales=scales,
    )
    return scalars, record, told


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _short(values: Any) -> Any:
    """Numbers to four digits, what is not finite as None: a log of thousands of readings stays readable and valid JSON."""
    if isinstance(values, Mapping):
        return {name: _short(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_short(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.4g}") if math.isfinite(values) else None
    return values
