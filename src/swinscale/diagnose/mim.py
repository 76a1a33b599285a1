"""How SimMIM pre-training goes, seen at each evaluation: pictures, baselines, feature rank, probes on frozen features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from swinscale.diagnose.features import feature_rank, linear_probe, nearest_neighbours
from swinscale.diagnose.instrument import Instrument, Reading, View, inspection, spread
from swinscale.diagnose.pictures import Panels, grid, keep_picture, reconstruction_panels
from swinscale.parallel import World, is_sharded
from swinscale.runlog import read_log
from swinscale.tasks.simmim import SimMIM

SHOWN = 6
RANKED = 512
PROBED = 2000
AT_ONCE = 32  # images per forward pass; of clips fewer, so that there are as many tokens
COLLAPSED = 2.0
NEAR_THE_MEAN = 0.02
TURNED = 0.01  # by which share losses must have moved apart to be called apart


class ProbeData(NamedTuple):
    """Labelled images for probes, untouched by augmentation; items as of ``MaskedImageModelling``'s ``images``."""

    train: Any
    evaluation: Any


class MaskedImageModelling(Instrument):
    """Watches SimMIM from evaluation to evaluation.

    * ``reconstructions/step-….png`` in the run's directory: the same few evaluation images each time, with the same masks;
    * ``effective_rank`` and ``largest_share`` of the pooled features of whole evaluation images, which tell of a collapse;
    * every ``probe_every`` epochs and at the end, ``knn`` and ``linear_probe``: the share of held-out images whose class a
      nearest-neighbour vote and a linear classifier on frozen features tell;
    * warnings: a loss like the mean predictor's, features that have collapsed, an evaluation loss that rises while the
      training loss falls.

    Args:
        directory: of the run.
        images: the evaluation images or clips, a data set with items ``[0, index]``: dictionaries of ``image`` (C, H, W) or
            (C, T, H, W) and ``mask``; without ``image`` where it cannot be read.
        probe: images for the probes, whose items have a ``label``; None where there are no labels.
        probe_every, evaluate_every: in epochs; 0: never, and only at the end.
        probe_stage: the stage whose features are probed.
    """

    name = "mim"

    def __init__(
        self,
        directory: Path,
        images: Any,
        *,
        probe: ProbeData | None = None,
        probe_every: float = 0.0,
        evaluate_every: float = 1.0,
        probe_stage: int = -1,
    ):
        self.directory, self.images, self.probe = directory, images, probe
        self.probe_every, self.evaluate_every, self.probe_stage = probe_every, evaluate_every, probe_stage

    def after_evaluation(self, view: View, measures: Mapping[str, Any]) -> Reading | None:
        """What the loss is worth, and what the encoder's features are."""
        assert isinstance(view.task, SimMIM)
        warnings = []
        with inspection(view):
            warnings += self._draw(view.task, view)
            features, _ = pooled_features(view.task, self.images, RANKED, view.world)
            sets = self._probe_features(view.task, view) if self._probes_now(view) else None
        if not view.world.is_main:
            return None
        scalars, record = dict[str, float](), dict[str, Any]()
        if len(features) > 1:
            rank = feature_rank(features)
            scalars |= {"effective_rank": rank.effective, "largest_share": rank.largest_share}
        if sets is not None and all(len(labels) for _, labels in sets):
            (train, classes), (held_out, truth) = sets
            for name, predict in (("knn", nearest_neighbours), ("linear_probe", linear_probe)):
                scalars[name] = (predict(train, classes, held_out) == truth).double().mean().item()
            record["probe_images"] = {"train": len(classes), "evaluation": len(truth)}
        if view.step > view.warmup_steps:
            warnings += signs(measures, scalars, len(features))
            warnings += memorising(read_log(self.directory), view.step, measures["loss"])
        return Reading(scalars, record, warnings)

    def _draw(self, task: SimMIM, view: View) -> list[tuple[str, str]]:
        """Writes the pictures; what the disk does not take is a warning."""
        if not (is_sharded(task) or view.world.is_main) or not {"mean", "std"} <= task.preprocessing.keys():
            return []
        samples = [s for i in spread(len(self.images), SHOWN) if "image" in (s := self.images[0, i])]
        if not samples:
            return []
        images, masks = (torch.stack([s[name] for s in samples]) for name in ("image", "mask"))
        panels = reconstruction_panels(task, images, masks)
        if not view.world.is_main:
            return []
        return keep_picture(grid(panels, Panels._fields), self.directory / "reconstructions", view.step)

    def _probes_now(self, view: View) -> bool:
        """Whether an evaluation is the first one after a multiple of ``probe_every`` epochs, or the last one."""
        if self.probe is None or not self.probe_every:
            return False
        before = view.epoch - self.evaluate_every if self.evaluate_every else 0.0
        periods = [int(epoch / self.probe_every + 1e-6) for epoch in (before, view.epoch)]
        return view.step == view.total_steps or periods[0] < periods[1]

    def _probe_features(self, task: SimMIM, view: View) -> list[tuple[Tensor, Tensor]]:
        assert self.probe is not None
        return [pooled_features(task, data, PROBED, view.world, self.probe_stage) for data in self.probe]


def pooled_features(task: SimMIM, images: Any, count: int, world: World, stage: int = -1) -> tuple[Tensor, Tensor]:
    """Features of at most ``count`` images spread evenly over a data set; every process reads and encodes its share.

    Args:
        images: items ``[0, index]`` are dictionaries of ``image``, (C, H, W) or (C, T, H, W), and, where there is one,
            ``label``; without ``image`` where it cannot be read, and then left out.

    Returns:
        (N, D) features and (N,) labels (-1 without), on the CPU, the same in every process.
    """
    config, chosen = task.encoder.config, spread(len(images), count)
    blank, device = torch.zeros(config.in_chans, *config.img_size), task.mask_token.device
    places = range(world.rank, -(-len(chosen) // world.size) * world.size, world.size)  # as many in every process
    found, at_once = [], max(1, AT_ONCE // math.prod(config.stage_maps()[0][:-2]))
    for start in range(0, len(places), at_once):
        some = places[start : start + at_once]
        samples = [images[0, chosen[place % len(chosen)]] for place in some]
        read = [place < len(chosen) and "image" in sample for place, sample in zip(some, samples, strict=True)]
        batch = torch.stack([sample.get("image", blank) for sample in samples]).to(device)
        notes = torch.tensor([[s.get("label", -1), ok] for s, ok in zip(samples, read, strict=True)], device=device)
        found.append(torch.cat([task.features(batch, stage).float(), notes], 1))
    rows = torch.stack(_everybodys(torch.cat(found), world), 1).flatten(0, 1).cpu()
    rows = rows[rows[:, -1] == 1]
    return rows[:, :-2], rows[:, -2].long()


def signs(measures: Mapping[str, float], scalars: Mapping[str, float], images: int) -> list[tuple[str, str]]:
    """Warnings, as (kind, text), about one evaluation after the warm-up."""
    found = []
    loss, mean = measures["loss"], measures["mean_predictor_loss"]
    if loss > (1 - NEAR_THE_MEAN) * mean:
        found.append(
            (
                "like_the_mean",
                f"The loss ({loss:.4f}) is not 2 % below that of predicting each image's mean visible colour ({mean:.4f}): "
                f"nothing is learned from what surrounds a masked pixel. Try --overfit 8, another train.optim.lr, or more "
                f"images per step.",
            )
        )
    if (rank := scalars.get("effective_rank")) is not None and rank < COLLAPSED:
        found.append(
            (
                "collapse",
                f"The features of {images} different images have an effective rank of {rank:.2f}: they are nearly the same for "
                f"all of them. Lower train.optim.lr, or look for images that are all alike.",
            )
        )
    return found


def memorising(log: Sequence[Mapping[str, Any]], step: int, loss: float) -> list[tuple[str, str]]:
    """A warning, as (kind, text), if the evaluation loss has risen by 1 % since its lowest while the training loss fell by 1 %.

    Args:
        log: entries of the run, of the kinds "train" and "eval", each with ``step`` and ``loss``.
        step, loss: of the newest evaluation, whether or not the log has it.
    """
    evaluations = {e["step"]: e["loss"] for e in log if e["kind"] == "eval" and e["step"] < step} | {step: loss}
    steps = sorted(evaluations)
    lowest = min(steps, key=lambda s: evaluations[s])

    def training_loss(until: int) -> float | None:
        """The mean since the evaluation before."""
        after = max((s for s in steps if s < until), default=0)
        values = [e["loss"] for e in log if e["kind"] == "train" and after < e["step"] <= until]
        return sum(values) / len(values) if values else None

    then, now = training_loss(lowest), training_loss(step)
    if then is None or now is None or loss < (1 + TURNED) * evaluations[lowest] or now > (1 - TURNED) * then:
        return []
    text = (
        f"Since step {lowest} the evaluation loss has risen from {evaluations[lowest]:.4f} to {loss:.4f}, while the training loss "
        f"fell from {then:.4f} to {now:.4f}: the model learns its images by heart. That alone is a poor reason to stop: in the "
        f"published study with a tenth of ImageNet, four times the steps raised it from 0.482 to 0.512, and accuracy after "
        f"fine-tuning from 82.7 to 83.2. Judge by probes (task.probe_every) or by fine-tuning 'last', or add images."
    )
    return [("memorising", text)]


def _everybodys(rows: Tensor, world: World) -> list[Tensor]:
    """``rows`` of every process, of equal shape."""
    if world.size == 1:
        return [rows]
    gathered = [torch.empty_like(rows) for _ in range(world.size)]
    dist.all_gather(gathered, rows.contiguous())
    return gathered
