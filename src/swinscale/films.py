"""Films through a trained video model: their classes printed, and the attention drawn over them; reconstructions of SimMIM.

classify_films("runs/desk_video_swinv2/best", [Path("film.mp4")], out=Path("predictions"))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch import Tensor

from swinscale.data import CorruptImage, mask_for_sample
from swinscale.data.clips import Sampling
from swinscale.data.frames import Timeline, read_frames
from swinscale.data.video import open_video, write_video
from swinscale.diagnose.clips import FilmExample, draw_attention, film_sheet
from swinscale.diagnose.explain import rollout
from swinscale.diagnose.explain_maps import enlarge
from swinscale.diagnose.pictures import Panels, grid, reconstruction_panels
from swinscale.errors import UsageError
from swinscale.inference import drawing, film_files, read_each, say_unread
from swinscale.parallel import autocast, resolve_precision, world
from swinscale.runlog import measures
from swinscale.tasks import SimMIM
from swinscale.video import VideoPipeline, load_video, mask_of

SHOWN_FRAMES = 6
"""Frames of a film that are shown beside each other, at most."""
LOWEST = 2.0
"""Times an equal share: attention that is nearly even everywhere is not made to look as if it were not."""


def classify_films(
    checkpoint: str | Path,
    films: Sequence[Path],
    *,
    out: Path | None = None,
    top: int = 5,
    device: str = "auto",
    **options: Any,
) -> list[tuple[Path, list[tuple[str, float]]]]:
    """Prints the most likely classes of each film; with a SimMIM model, draws what it makes of a clip instead.

    Args:
        films: files, or folders of them. Those that cannot be read are named and left out.
        out: folder for the films with their class and the attention drawn over them (``draw_film``);
            reconstructions go to ``predictions`` by default.
        options: see ``load_video``.

    Returns:
        For each film its classes with probabilities, best first; for SimMIM its measures.

    Raises:
        UsageError: if there is no film, or none that can be read.
    """
    pipeline = load_video(checkpoint, **options)
    console = Console(highlight=False)
    results: list[tuple[Path, list[tuple[str, float]]]] = []
    unread: list[str] = []
    drawn: set[Path] = set()
    with world(device) as here:
        task = pipeline.task.to(here.device)
        if isinstance(task, SimMIM):
            for path, clip in read_each(film_files(films), pipeline.read, unread):
                place = drawing(out or Path("predictions"), path, "reconstructed", drawn)
                values = _reconstruct(task, clip.to(here.device), place)
                console.print(f"{path}: {measures(values)}\n  wrote {place}", soft_wrap=True, markup=False)
                results.append((path, list(values.items())))
        else:
            for path, probabilities in read_each(film_files(films), pipeline, unread):
                values_, indices = probabilities.topk(min(top, len(probabilities)))
                ranked = [(pipeline.classes[i], p) for p, i in zip(values_.tolist(), indices.tolist(), strict=True)]
                said = ", ".join(f"{name} {100 * p:.1f} %" for name, p in ranked)
                console.print(f"{path}: {said}", soft_wrap=True, markup=False)
                results.append((path, ranked))
                if out is not None:
                    _draw(pipeline, path, ranked, drawing(out, path, "predicted", drawn), console)
    say_unread(console, unread, any_read=bool(results), what="films")
    return results


def _reconstruct(task: SimMIM, clip: Tensor, place: Path) -> dict[str, float]:
    """Draws the frame in the middle of a clip (C, T, H, W) as it is, masked and completed; returns the measures of the clip."""
    mask = mask_for_sample(mask_of(task), 0, 0, 0)
    found = {name: metric.to(clip.device) for name, metric in task.new_metrics().items()}
    with torch.no_grad(), autocast(resolve_precision("auto", clip.device), clip.device):
        task.update_metrics(found, {"image": clip[None], "mask": mask[None].to(clip.device)})
        panels = reconstruction_panels(task, clip[None], mask[None])
    place.parent.mkdir(parents=True, exist_ok=True)
    grid(panels, Panels._fields).save(place)
    return {name: metric.compute().item() for name, metric in found.items()}


def _draw(
    pipeline: VideoPipeline, film: Path, ranked: Sequence[tuple[str, float]], place: Path, console: Console
) -> None:
    """Writes the film with its class and attention as ``place`` with the end .mp4, and some of its frames as a picture."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        draw_film(pipeline, film, ranked, place.with_suffix(".mp4"))
    except (CorruptImage, UsageError) as error:  # what was chosen could be read, the rest cannot
        console.print(f"  not drawn: {error}", soft_wrap=True, markup=False)
        return
    console.print(f"  wrote {place.with_suffix('.mp4')} and {place.name}", soft_wrap=True, markup=False)


def draw_film(pipeline: VideoPipeline, film: Path, ranked: Sequence[tuple[str, float]], out: Path) -> None:
    """Writes a film again with its class on each frame and the attention over it, and a picture beside it (.png).

    The attention is the rollout (``diagnose.explain.rollout``) of clips of whole frames, one after the other, so that it covers the
    film: how much of each place reaches what the classifier reads. A frame between two that the model sees has the map of the
    nearer one. Colours saturate at what 1 % of the places of the first clip exceed.

    Args:
        ranked: classes and probabilities, best first.
        out: the film to write, .mp4.

    Raises:
        CorruptImage, UsageError: if the film cannot be read to its end.
    """
    video = open_video(film)
    examples, every, high = list[FilmExample](), 1, LOWEST

    def drawn() -> Iterator[Image.Image]:
        nonlocal every, high
        clips = attention_over(pipeline, film)
        first = next(clips)
        high = max(LOWEST, float(np.quantile(first[1], 0.99)))
        maps = (
            (number, seen)
            for numbers, clip in chain([first], clips)
            for number, seen in zip(numbers, clip, strict=True)
        )
        number, seen = next(maps)
        later = next(maps, None)
        for index, frame in enumerate(video.frames):
            while later is not None and later[0] - index <= index - number:
                (number, seen), later = later, next(maps, None)
            picture = draw_attention(frame, seen / high, *ranked[0])
            if index % every == 0:
                examples.append(FilmExample(frame, picture, float(index / video.rate)))
                if len(examples) > SHOWN_FRAMES:
                    del examples[1::2]
                    every *= 2
            yield picture

    write_video(out, drawn(), video.rate)
    film_sheet(examples, ranked, high).save(out.with_suffix(".png"))


def attention_over(pipeline: VideoPipeline, film: Path) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """The frames of a film that the model sees when it looks at one clip after the other, in order, each with its map.

    Yields: for each clip the numbers of its frames, ascending, without those of the clip before, and for each of them (h, w) the
        attention rollout in multiples of an equal share.

    Raises:
        CorruptImage: for a film that cannot be read.
    """
    model, plan = pipeline.backbone, list[list[int]]()

    def choose(timeline: Timeline) -> list[int]:
        plan.extend([] if plan else _one_after_the_other(pipeline.sampling, timeline))
        return plan[clip]

    clip, last = 0, -1
    while clip == 0 or clip < len(plan):
        frames = read_frames(film, film.name, choose, model.config.in_chans, pipeline.fit)
        x = pipeline.transform(frames).movedim(0, 1)[None]
        shares = rollout(model, x)
        maps = enlarge(shares * shares[0].numel(), model.config.patch_size, tuple(x.shape[2:]))[0].cpu().numpy()
        places = {number: place for place, number in reversed(list(enumerate(plan[clip]))) if number > last}
        numbers = sorted(places)
        if numbers:
            yield numbers, maps[[places[number] for number in numbers]]
            last = numbers[-1]
        clip += 1


def _one_after_the_other(sampling: Sampling, timeline: Timeline) -> list[list[int]]:
    """Numbers of the frames of clips that follow each other from the first frame to the last; of segments one of the whole film."""
    length, count = len(timeline), len(timeline)
    if sampling.kind == "stride":
        span = sampling.frames * sampling.stride
        length = max(1, round(span * timeline.rate / sampling.rate if sampling.rate else span))
    starts = [*range(0, max(count - length, 0), length), max(count - length, 0)]
    clips = []
    for start in starts:
        seconds = timeline.seconds[start : start + length]
        part = Timeline([time - seconds[0] for time in seconds])
        clips.append((start + sampling.choose(part, 1, None)[0]).tolist())
    return clips
