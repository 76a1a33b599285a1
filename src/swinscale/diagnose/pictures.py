"""Tensors to pictures: un-normalised images, SimMIM reconstructions, labelled grids, annotated predictions.

A *picture* is a uint8 array (H, W, 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from swinscale.errors import UsageError
from swinscale.tasks.simmim import SimMIM, local_statistics

Picture = NDArray[np.uint8]

PAPER, INK, FAINT, TRACK = "#ffffff", "#1b1f24", "#5b6570", "#e8ebef"
BLUE, GREEN = "#0072b2", "#009e73"  # Okabe and Ito's palette, distinct for colour-blind readers
MASKED = 128  # the grey of masked pixels


class Panels(NamedTuple):
    """One image, or the middle frame of a clip, as SimMIM sees and completes it."""

    input: Picture
    masked: Picture
    """The input with its masked pixels in grey: what the model was given."""
    reconstruction: Picture
    """What the model predicts everywhere (only masked pixels were trained)."""
    composite: Picture
    """Visible pixels of the input, predicted pixels where it was masked."""


def to_picture(
    image: Tensor, mean: Sequence[float], std: Sequence[float], bands: Sequence[int] | None = None
) -> Picture:
    """(C, H, W) normalised image → picture.

    Args:
        mean, std: the normalisation to undo, per channel, for pixels in [0, 1].
        bands: the channels shown as red, green and blue. None: the first three; one channel is shown as grey, and of two
            the second is shown as both green and blue.

    Raises:
        UsageError: for a wrong number of channels, or bands that the image does not have.
    """
    channels = len(image)
    if len(mean) != channels or len(std) != channels:
        raise UsageError(
            f"The image has {channels} channels, but mean and std have {len(mean)} and {len(std)} entries: give one each."
        )
    bands = _shown(channels, bands)
    scale, offset = (torch.tensor(v, dtype=torch.float32, device=image.device)[bands, None, None] for v in (std, mean))
    pixels = (image.detach()[bands].float() * scale + offset).nan_to_num(0.0).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8).movedim(0, -1).cpu().numpy()


def denormalise_locally(target: Tensor, images: Tensor, side: int) -> Tensor:
    """Inverse of ``tasks.normalise_locally``: predicted targets → pixels in the space of ``images``, all of one shape.

    The means and standard deviations are those of the ``side``×``side`` neighbourhoods in ``images``, masked pixels
    included: the model predicts detail relative to surroundings that it is not told.
    """
    mean, deviation = local_statistics(images, side)
    return target.float() * deviation + mean


@torch.no_grad()
def reconstruction_panels(
    task: SimMIM, images: Tensor, mask: Tensor, bands: Sequence[int] | None = None
) -> list[Panels]:
    """What ``task`` makes of masked images.

    Args:
        task: its ``preprocessing`` says with which ``mean`` and ``std`` the images were normalised.
        images: (B, C, H, W), normalised; of clips (B, C, T, H, W) the middle frame is shown.
        mask: (B, H/patch, W/patch) or (B, T/patch, H/patch, W/patch), bool, True = masked.
        bands: which channels are shown, see ``to_picture``.
    """
    if "mean" not in task.preprocessing or "std" not in task.preprocessing:
        raise UsageError("The model does not say how its images are normalised: set preprocessing['mean'] and ['std'].")
    mean, std = task.preprocessing["mean"], task.preprocessing["std"]
    was_training, device = task.training, task.mask_token.device
    images = images.to(device)
    _, prediction, pixel_mask = task.eval().reconstruct(images, mask.to(device))
    task.train(was_training)
    if task.config.norm_target:
        prediction = denormalise_locally(prediction, images, task.config.norm_target)
    if images.ndim == 5:
        images, prediction, pixel_mask = (x[:, :, x.shape[2] // 2] for x in (images, prediction, pixel_mask))
    panels = []
    for image, predicted, hidden in zip(images, prediction, pixel_mask[:, 0].cpu().numpy()[..., None], strict=True):
        before, after = to_picture(image, mean, std, bands), to_picture(predicted, mean, std, bands)
        masked = np.where(hidden, np.uint8(MASKED), before)
        panels.append(Panels(before, masked, after, np.where(hidden, after, before)))
    return panels


def grid(
    rows: Sequence[Sequence[Picture]], titles: Sequence[str], *, scale: int | None = None, gap: int = 8
) -> Image.Image:
    """Pictures in rows and columns, with a title over each column.

    Args:
        scale: how many pixels wide each pixel becomes. None: so many that the largest picture is at least 128 pixels.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise UsageError(f"A grid needs at least one row, and as many pictures in each as titles ({len(titles)}).")
    factor = scale or max(1, math.ceil(128 / max(max(p.shape[:2]) for row in rows for p in row)))
    cells = [[_enlarged(picture, factor) for picture in row] for row in rows]
    widths = [max(row[i].width for row in cells) for i in range(len(titles))]
    heights = [max(cell.height for cell in row) for row in cells]
    size = max(12, min(20, min(widths) // 9))
    head = round(size * 1.9)
    canvas = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), head + sum(heights) + gap * len(heights)), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size)
    x = gap
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        draw.text((x + width / 2, head / 2), cut_to_width(title, font, width), INK, font, anchor="mm")
        y = head
        for row, height in zip(cells, heights, strict=True):
            canvas.paste(row[column], (x, y))
            y += height + gap
        x += width + gap
    return canvas


def annotated(picture: Picture, predictions: Sequence[tuple[str, float]], truth: str | None = None) -> Image.Image:
    """A picture with its most probable classes as a list of bars underneath.

    Args:
        predictions: (label, probability in 0…1), most probable first.
        truth: the true class, if it is known; it is named under the picture and its bar is green.
    """
    longest = max(picture.shape[:2])
    image = _enlarged(picture, max(1, math.ceil(320 / longest)))
    image.thumbnail((768, 768), Image.Resampling.LANCZOS)
    width = max(320, image.width)
    size = max(18, width // 20)
    pad, line = size * 3 // 4, round(size * 2.15)
    font, small = ImageFont.load_default(size), ImageFont.load_default(round(size * 0.87))
    head = image.height + pad * 2 + (round(size * 1.4) if truth is not None else 0)
    canvas = Image.new("RGB", (width + 2 * pad, pad + head + line * len(predictions)), PAPER)
    canvas.paste(image, (pad + (width - image.width) // 2, pad))
    draw = ImageDraw.Draw(canvas)
    if truth is not None:
        draw.text(
            (pad, image.height + pad * 2), cut_to_width(f"true class: {truth}", small, width), FAINT, small, anchor="lt"
        )
    for index, (label, probability) in enumerate(predictions):
        y = pad + head + index * line
        percent = f"{100 * probability:.1f} %"
        room = width - font.getlength(percent) - size
        draw.text((pad, y), cut_to_width(label, font, room), INK, font, anchor="lt")
        draw.text((pad + width, y), percent, INK, font, anchor="rt")
        top, bottom = y + round(size * 1.15), y + round(size * 1.5)
        draw.rectangle((pad, top, pad + width, bottom), TRACK)
        if length := round(width * min(max(probability, 0.0), 1.0)):
            draw.rectangle((pad, top, pad + length, bottom), GREEN if label == truth else BLUE)
    return canvas


def _enlarged(picture: Picture, factor: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(picture))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def cut_to_width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """``text`` on one line, cut with an ellipsis where it is too wide."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def drawable(picture: Tensor, bands: Sequence[int] | None = None) -> Tensor:
    """(C, H, W) of any number of channels as (3, H, W) uint8; ``bands`` as in ``to_picture``."""
    shown = picture[_shown(len(picture), bands)]
    return shown if shown.dtype == torch.uint8 else (shown.clamp(0, 1) * 255).round().to(torch.uint8)


def _shown(channels: int, bands: Sequence[int] | None) -> list[int]:
    """The three channels that are shown."""
    bands = [min(i, channels - 1) for i in range(3)] if bands is None else list(bands)
    if len(bands) != 3 or not all(0 <= band < channels for band in bands):
        raise UsageError(f"bands={bands}: name three of the channels 0 to {channels - 1}, for red, green and blue.")
    return bands


def keep_picture(picture: Image.Image, folder: Path, step: int) -> list[tuple[str, str]]:
    """Writes ``folder/step-….png``, which appears once it is whole. What the disk does not take is a warning, (kind, text)."""
    path = folder / f"step-{step:08d}.png"
    half_written = path.with_name(f".{path.name}.writing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(half_written, "PNG")
        half_written.replace(path)
    except OSError as error:
        return [("no_picture", f"{path} cannot be written ({error.strerror}); training goes on.")]
    return []
