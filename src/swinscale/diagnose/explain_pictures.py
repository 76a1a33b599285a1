"""``explain`` as pictures: one of everything about an image, and those of position bias, temperature and distance.

Colours are viridis, of even steps for the eye and distinct for colour-blind readers; light is much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor, nn

from swinscale.diagnose.explain_deletion import Deletion
from swinscale.diagnose.explain_position import log_offsets, position_bias, temperatures
from swinscale.diagnose.pictures import Picture
from swinscale.diagnose.plots import COLOURS, INK, Drawing, Line, colours_of, heat_maps, lines, style
from swinscale.errors import UsageError

MAP_COLOURS = "viridis"
UNITS = {
    "integrated-gradients": "each patch adds to the logit",
    "grad-cam": "activation × gradient, logit",
    "exact": "each token adds to the logit",
}
SHOWN_HEADS = 16

Map = NDArray[np.float32]


@dataclass(frozen=True)
class ClassMap:
    """What speaks for a class.

    Args:
        label, probability: the class and what the model gives it, in 0…1.
        method: how the map was made, a name in ``UNITS``.
        values: (H, W), a value per pixel in units of the logit.
        deletion: of one image, the check of the map.
    """

    label: str
    probability: float
    method: str
    values: Map
    deletion: Deletion


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found about one image.

    Args:
        query: (row, column) of the pixel whose attention is shown.
        stage, block, head: which attention; head None: the mean of all.
        attention: (A, rows, columns) of the tokens of the stage.
        rollout: (rows, columns) of the tokens of the first stage.
        classified: None for a model without classifier.
    """

    name: str
    picture: Picture
    query: tuple[int, int]
    stage: int
    block: int
    head: int | None
    attention: Map
    rollout: Map
    classified: ClassMap | None


@style()
def draw_explanation(found: Explanation) -> Drawing:
    """Input, class map, deletion curve, attention of the query (mean or one head, and each head), and rollout."""
    columns = 3 if found.classified else 2
    height, width = found.picture.shape[:2]
    ratio = min(max(height / width, 0.5), 2.0)
    figure = Figure(figsize=(3.3 * columns, 2 * (3.0 * ratio + 0.95) + 0.35), layout="constrained")
    panels = iter(figure.subplots(2, columns).flat)
    axes = next(panels)
    axes.imshow(found.picture, interpolation="nearest")
    _finish(axes, "Input")
    _mark(axes, found.query)
    axes.set_xlabel(f"× is the query: row {found.query[0]}, column {found.query[1]}", fontsize=9.5)
    if found.classified:
        axes = next(panels)
        unit = UNITS[found.classified.method]
        _overlay(axes, found.picture, found.classified.values, unit, smooth=True)
        _finish(axes, f"For “{_short(found.classified.label)}” ({100 * found.classified.probability:.0f} %)")
        _draw_deletion(next(panels), found.classified, ratio)
    axes = next(panels)
    shown = found.attention.mean(0) if found.head is None else found.attention[found.head]
    _overlay(axes, found.picture, 100 * shown, "% of the attention of ×")
    _finish(axes, f"Attention of ×, {'mean of heads' if found.head is None else f'head {found.head}'}")
    _mark(axes, found.query)
    _draw_heads(next(panels), found, ratio)
    axes = next(panels)
    _overlay(axes, found.picture, found.rollout * found.rollout.size, "times an equal share")
    _finish(axes, "Rollout through all blocks")
    title = f"What the model looks at in {_short(found.name, 36 if found.classified else 18)}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold")
    return Drawing(figure, _description(found))


def _description(found: Explanation) -> str:
    text = f"Attention of row {found.query[0]}, column {found.query[1]} in stage {found.stage}, block {found.block}, and rollout"
    if found.classified is None:
        return f"{found.name}. {text}."
    c = found.classified
    return (
        f"{found.name}: {c.label} {100 * c.probability:.0f} %. {c.method}, deletion area {float(c.deletion.auc[0]):.3f}, "
        f"random order {float(c.deletion.random_auc.mean()):.3f}. {text}."
    )


def _draw_deletion(axes: Axes, classified: ClassMap, ratio: float) -> None:
    """The curve of the map, and the mean of random orders with the range of all of them."""
    curve = classified.deletion
    share, random = 100 * curve.share.numpy(), 100 * curve.random[:, 0].numpy()
    auc, chance = float(curve.auc[0]), float(curve.random_auc.mean())
    by_map = 100 * curve.probability[0].numpy()
    axes.fill_between(share, random.min(0), random.max(0), color=COLOURS[1], alpha=0.16, linewidth=0)
    axes.plot(share, random.mean(0), "--", color=COLOURS[1], linewidth=2, label=f"random order: area {chance:.2f}")
    axes.plot(share, by_map, color=COLOURS[0], linewidth=2, label=f"by the map: area {auc:.2f}")
    axes.set(xlabel="deleted, % of the image", ylabel="probability, %", xlim=(0, 100))
    axes.set_ylim(0, 1.3 * max(by_map.max(), random.max()))  # with room for the legend
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
    axes.set_title("Deletion: lower is better")
    axes.set_box_aspect(ratio)
    axes.grid(True)
    axes.legend(fontsize=9.5, loc="upper left", borderaxespad=0.1)


def _draw_heads(axes: Axes, found: Explanation, ratio: float) -> None:
    """Small maps of every head, on one scale."""
    count = min(len(found.attention), SHOWN_HEADS)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    axes.set_box_aspect(ratio)
    _finish(axes, f"Each head: stage {found.stage}, block {found.block}")
    high = float(100 * found.attention[:count].max())
    image: Any = None
    for head in range(count):
        place = ((head % columns) / columns, 1 - (head // columns + 1) / rows, 0.95 / columns, 0.95 / rows)
        inside = axes.inset_axes(place)
        values = 100 * found.attention[head]
        image = inside.imshow(values, cmap=MAP_COLOURS, vmin=0, vmax=high, interpolation="nearest")
        inside.set(xticks=[], yticks=[])
        inside.spines[:].set_visible(head == found.head)
        inside.spines[:].set(linewidth=3, color=COLOURS[1])
        outline = [Stroke(linewidth=2, foreground=INK), Normal()]  # read on any colour
        inside.text(
            0.03,
            0.96,
            f"{head}",
            color="white",
            transform=inside.transAxes,
            va="top",
            fontsize=9.5,
            path_effects=outline,
        )
    more = "" if count == len(found.attention) else f"; {count} of {len(found.attention)} heads"
    _scale(axes, image, f"% of the attention of ×{more}")


def _overlay(axes: Axes, picture: Picture, values: Map, unit: str, smooth: bool = False) -> None:
    """A map over the grey picture, with its scale; its cells may be larger than a pixel."""
    height, width = picture.shape[:2]
    place = (-0.5, width - 0.5, height - 0.5, -0.5)
    grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=place, interpolation="nearest")
    low, high = float(min(values.min(), 0.0)), float(values.max())
    image = axes.imshow(
        values,
        cmap=MAP_COLOURS,
        alpha=0.68,
        vmin=low,
        vmax=high if high > low else low + 1,
        extent=place,
        interpolation="bilinear" if smooth else "nearest",
    )
    _scale(axes, image, unit)


def _scale(axes: Axes, image: Any, unit: str) -> None:
    """The colours of a map under it."""
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((0, -0.075, 1, 0.04)), orientation="horizontal")
    bar.set_label(unit, fontsize=9.5, labelpad=2)
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set(rasterized=True)  # translucent neighbours drawn as shapes would show seams


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _mark(axes: Axes, query: tuple[int, int]) -> None:
    """A cross that is seen on light and dark."""
    row, column = query
    axes.plot(column, row, "x", color="white", markersize=12, markeredgewidth=4.5, clip_on=False)
    axes.plot(column, row, "x", color=COLOURS[1], markersize=11, markeredgewidth=2.2, clip_on=False)


def _short(text: str, length: int = 18) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def draw_position_bias(model: nn.Module, stage: int, block: int) -> Drawing:
    """Maps of ``position_bias`` for up to 16 heads, less the mean of each head, which the softmax does not see.

    Raises:
        UsageError: for a stage or block that does not exist, or a model of clips.
    """
    bias = _of_pictures(position_bias(model, stage, block))
    bias = bias - bias.mean((1, 2), keepdim=True)
    more = "" if len(bias) <= SHOWN_HEADS else f"The first {SHOWN_HEADS} of {len(bias)} heads. "
    return heat_maps(
        f"Position bias of stage {stage}, block {block}",
        [(f"head {head}", values.cpu().numpy()) for head, values in enumerate(bias[:SHOWN_HEADS])],
        unit="added to the logit, less the head's mean",
        diverging=True,
        columns=min(4, len(bias)),
        note=f"{more}A cell is where a key lies as seen from the query in the middle; one cell is one token.",
    )


def draw_bias_curves(model: nn.Module, stage: int, block: int) -> Drawing:
    """``position_bias`` along both axes of the window over the log-spaced offset; the range of the heads if they are many.

    Raises:
        UsageError: as ``draw_position_bias``.
    """
    bias = _of_pictures(position_bias(model, stage, block)).cpu()
    rows, columns = log_offsets(model, stage)
    across, down = bias[:, len(rows) // 2], bias[:, :, len(columns) // 2]
    series = []
    if len(bias) <= 6:
        for head in range(len(bias)):
            series.append(Line(f"head {head}, columns", columns.tolist(), across[head].tolist(), group=head))
            series.append(Line(f"head {head}, rows", rows.tolist(), down[head].tolist(), dashed=True, group=head))
    else:
        for group, (name, x, y) in enumerate((("columns", columns, across), ("rows", rows, down))):
            low, high = y.amin(0).tolist(), y.amax(0).tolist()
            series.append(Line(f"along {name}", x.tolist(), y.mean(0).tolist(), low, high, group=group))
    return lines(
        f"Position bias of stage {stage}, block {block}",
        series,
        x="offset of the key, log-spaced: sign(Δ) log₂(1 + 8|Δ| / (w - 1)) / 3",
        y="added to the logit",
        note="" if len(bias) <= 6 else f"Mean and range of {len(bias)} heads.",
    )


@style()
def draw_temperatures(model: nn.Module) -> Drawing:
    """How many heads have which logit scale, by stage.

    Raises:
        UsageError: for a model without cosine attention.
    """
    stages: dict[int, list[float]] = {}
    for name, values in temperatures(model).items():
        stages.setdefault(int(name.split(".")[1]), []).extend(values.tolist())
    known = np.concatenate([np.array(values) for values in stages.values()])
    edges = np.geomspace(min(known.min(), 5.0) * 0.98, 100 * 1.02, 25)
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(
        list(stages.values()),
        edges.tolist(),
        stacked=True,
        color=colours_of(list(stages)),
        label=[f"stage {stage}" for stage in stages],
    )
    axes.axvline(100, color=INK, linewidth=1.3, linestyle="dotted", label="the largest allowed (100)")
    axes.set(
        title="Logit scale of cosine attention", xlabel="logit scale (1 / temperature)", ylabel="heads", xscale="log"
    )
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100) if t >= edges[0]]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower left", ncols=3, fontsize=10)
    return Drawing(figure, f"Logit scales of {len(known)} heads, {known.min():.3g} to {known.max():.3g}.")


def draw_attention_distance(distances: Mapping[str, Tensor]) -> Drawing:
    """The mean distance of each block's heads, with their range; ``distances`` is what ``attention_distance`` returns."""
    values = [head.cpu() for head in distances.values()]
    names = [".".join(name.split(".")[1::2]) for name in distances]
    line = Line(
        "mean and range of the heads",
        list(range(len(values))),
        [float(head.mean()) for head in values],
        [float(head.min()) for head in values],
        [float(head.max()) for head in values],
    )
    return lines("How far attention looks", [line], x="stage.block", y="mean distance, pixels", x_labels=names)


def _of_pictures(bias: Tensor) -> Tensor:
    if bias.ndim != 3:
        raise UsageError(
            "The window has three axes: a drawing shows two, take a frame's offset from position_bias instead."
        )
    return bias
