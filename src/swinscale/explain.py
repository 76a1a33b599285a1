"""``swinscale explain``: why a model says what it says about one picture or film."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from swinscale.config import suggest
from swinscale.data import CorruptImage
from swinscale.diagnose.explain import attention, cam, deletion, integrated_gradients, rollout
from swinscale.diagnose.explain_cam import Method
from swinscale.diagnose.explain_maps import block_of, check_pixel, enlarge
from swinscale.diagnose.explain_pictures import ClassMap, Explanation, Map, draw_explanation
from swinscale.diagnose.pictures import to_picture
from swinscale.errors import UsageError
from swinscale.inference import Pipeline, film_files, load_pipeline, picture_files, reads_films
from swinscale.parallel import world
from swinscale.tasks import SimMIM
from swinscale.video import VideoPipeline, load_video

METHODS = ("integrated-gradients", *get_args(Method))


def explain_picture(
    image: Path,
    checkpoint: str | Path,
    *,
    target: str | None = None,
    query: Sequence[int] | None = None,
    stage: int | None = None,
    block: int | None = None,
    head: int | None = None,
    method: str = METHODS[0],
    out: Path = Path(),
    device: str = "auto",
) -> Explanation:
    """Writes ``IMAGE_explained.png`` and ``.svg`` into ``out``; prints what they say.

    Of a film one frame is drawn, that of the query, from the clip in its middle.

    Args:
        image: a picture; for a video model a film.
        checkpoint: what ``load_pipeline`` or ``load_video`` reads. Of a SimMIM model attention and rollout are shown.
        target: name or number of the class to explain; None: the predicted one.
        query: (row, column) of a pixel of the picture as the model gets it, resized and cropped; of a clip (frame, row, column).
            None: the peak of the class
            map, or the centre where there is none.
        stage, block, head: which attention, from 0. Default: the last block of the last stage but one, the mean of its heads.
        method: how the class map is made, one of ``METHODS``; integrated gradients are added up over each patch.

    Raises:
        UsageError: for anything that does not exist; the message says what does.
    """
    if method not in METHODS:
        raise UsageError(f"method='{method}' is not allowed: choose one of {', '.join(METHODS)}.")
    if not image.is_file():
        raise UsageError(f"No such picture: {image}.")
    films = reads_films(checkpoint)
    (film_files if films else picture_files)([image])  # the one is not the other
    pipeline = load_video(checkpoint) if films else load_pipeline(checkpoint)
    try:
        pixels = pipeline.read(image)
    except CorruptImage as error:
        raise UsageError(f"{error}.") from error
    model, size = pipeline.backbone, tuple(pixels.shape[1:])
    # Said before anything is computed.
    stage = max(0, len(model.layers) - 2) if stage is None else stage
    heads = block_of(model, stage, block or 0).attn.num_heads
    block = len(model.layers[stage].blocks) - 1 if block is None else block
    if head is not None and not 0 <= head < heads:
        raise UsageError(f"head={head} is not allowed: stage {stage} of this model has heads 0 to {heads - 1}.")
    query = None if query is None else check_pixel(query, size)
    wanted = _class(target, pipeline)
    with world(device) as here:
        pipeline.task.to(here.device)
        x = pixels[None].to(here.device)
        classified = None if isinstance(pipeline.task, SimMIM) else _classified(pipeline, x, wanted, method)
        if query is None:
            query = _peak(classified.values) if classified else tuple(side // 2 for side in size)
        seen, through = attention(model, x, stage, block, query)[0], rollout(model, x)[0]
        name, place = image.name, ""
        if films:
            frame, strides = query[0], model.config.stage_strides()
            name, place = f"{image.name}, frame {frame} of {size[0]}", f"frame {frame}, "
            seen = seen[:, frame // strides[stage][0]]
            through = through[frame // strides[0][0]] * len(through)  # shares of this frame alone
            pixels = pixels[:, frame]
            classified = classified and dataclasses.replace(classified, values=classified.values[frame])
        found = Explanation(
            name,
            to_picture(pixels, pipeline.mean, pipeline.std),
            (query[-2], query[-1]),
            stage,
            block,
            head,
            seen.cpu().numpy(),
            through.cpu().numpy(),
            classified,
        )
    stem = out / f"{image.stem}_explained"
    draw_explanation(found).save(stem)
    console = Console(highlight=False)
    said = f"{image}: attention of {place}row {found.query[0]}, column {found.query[1]}"
    if classified:
        by_map, chance = float(classified.deletion.auc[0]), classified.deletion.random_auc[:, 0]
        said = (
            f"{image}: {classified.label} {100 * classified.probability:.1f} %. Area under the deletion curve "
            f"{by_map:.3f}, in {len(chance)} random orders {float(chance.mean()):.3f} ({float(chance.min()):.3f} to "
            f"{float(chance.max()):.3f}); lower is better"
        )
    console.print(f"{said}.", soft_wrap=True, markup=False)
    console.print(f"  wrote {stem}.png and {stem.name}.svg", soft_wrap=True, markup=False)
    return found


def _class(target: str | None, pipeline: Pipeline | VideoPipeline) -> int | None:
    """The number of a class from its name or number."""
    if target is None:
        return None
    if isinstance(pipeline.task, SimMIM):
        raise UsageError(f"--target {target}: a SimMIM checkpoint has no classes; leave --target out.")
    names, count = pipeline.classes or [], pipeline.backbone.num_classes
    if target in names:
        return names.index(target)
    if target.isdecimal() and int(target) < count:
        return int(target)
    known = f" The names: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}." if names else ""
    raise UsageError(
        f"--target {target} is not a class of this model.{suggest(target, names)} Allowed are 0 to {count - 1}"
        f"{' and the names of classes' if names else ''}.{known}"
    )


def _classified(pipeline: Pipeline | VideoPipeline, x: Tensor, target: int | None, method: str) -> ClassMap:
    """The class map of one input and its check."""
    model = pipeline.backbone
    with torch.no_grad():
        probabilities = model(x)[0].float().softmax(0)
    target = int(probabilities.argmax()) if target is None else target
    if method == "integrated-gradients":  # of single pixels they are too speckled to look at
        pixels, patch = integrated_gradients(model, x, target), model.config.patch_size
        pool = F.avg_pool2d if len(patch) == 2 else F.avg_pool3d
        patches = pool(pixels[:, None], patch, ceil_mode=True, divisor_override=1)[:, 0]
        maps = enlarge(patches, patch, tuple(x.shape[2:]))
    else:
        maps = cam(model, x, target, method=cast(Method, method))
    label = pipeline.classes[target] if pipeline.classes else f"class {target}"
    checked = deletion(model, x, maps, target)
    return ClassMap(label, float(probabilities[target]), method, maps[0].cpu().numpy(), checked)


def _peak(values: Map) -> tuple[int, ...]:
    """Where the largest value is: row and column, of clips frame first."""
    return tuple(int(place) for place in np.unravel_index(values.argmax(), values.shape))
