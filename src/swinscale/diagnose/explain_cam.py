"""Which places of an image speak for a class: class-activation maps and integrated gradients.

Values are signed: positive places speak for the class, negative ones against it (Grad-CAM's article sets those to 0). Models
are channels last and their blocks in window order; a *point* is a name of ``explain_maps.intermediate_names``, and nothing
has to be reshaped by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from swinscale.diagnose.explain_maps import capture, enlarge, evaluating, swin_of
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer
from swinscale.models.config import Size

Method = Literal["grad-cam", "exact"]


def cam(
    model: nn.Module,
    x: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    *,
    method: Method = "grad-cam",
    point: str | None = None,
    upsample: bool = True,
) -> Tensor:
    """How much each place of an image adds to the logit of a class.

    * "grad-cam" (Selvaraju et al., arXiv 1610.02391): activations at ``point``, weighted by the mean of their gradients.
    * "exact" (Zhou et al., arXiv 1512.04150): the classifier reads the mean of the last map, so the logit is a mean over
      its tokens of what the classifier makes of each; the values sum to the logit less its bias. No gradient is needed. The
      norm before it makes all tokens equally loud, so that those with nothing to say may take part as much as the others.

    Args:
        model: a SwinTransformer with a classifier, or a task around one. It is run in evaluation mode; gradients of its
            parameters stay as they are.
        x: (B, C, H, W) or (B, C, T, H, W) of any size.
        target: a class, one for each image, or None: the class that the model predicts.
        point: where Grad-CAM reads, a name of ``intermediate_names``. Default: the stream after the last block, through
            which everything passes. What a norm inside a block gives is a part of it: in V1 what the MLP reads, in V2 what
            the MLP adds.
        upsample: one value per pixel, linear between tokens; otherwise one per token of the map at ``point``.

    Returns:
        (B, *size), or (B, *map): a share of the logit ("exact"), or activation times gradient, on the scale of the logit.

    Raises:
        UsageError: for a model without classifier, a class or point that does not exist, or a point with method "exact".
    """
    if method not in get_args(Method):
        raise UsageError(f"method='{method}' is not allowed: choose one of {', '.join(get_args(Method))}.")
    model = classifier_of(model)
    if method == "exact" and point not in (None, "pre_pool"):
        raise UsageError(f"point='{point}': method='exact' reads 'pre_pool'; other points need method='grad-cam'.")
    point = "pre_pool" if method == "exact" else point or f"layers.{len(model.layers) - 1}"
    gradients = method != "exact"
    with torch.inference_mode(False), evaluating(model), capture(model, [point]) as points:
        x = x.detach().clone().to(model.norm.weight.device).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            logits = model(x)
            classes = targets(logits, target)
            if gradients:
                (slopes,) = torch.autograd.grad(_score(logits, classes), points[point].value)
                weights = points[point].to_map(slopes).flatten(1, -2).mean(1)
            else:
                weights = cast(Tensor, model.head.weight)[classes] / math.prod(points[point].value.shape[1:-1])
    maps = torch.einsum("b...d,bd->b...", points[point].to_map().detach(), weights.detach()).float()
    return enlarge(maps, _strides(model, point), tuple(x.shape[2:])) if upsample else maps


def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    *,
    baseline: Tensor | None = None,
    steps: int = 32,
) -> Tensor:
    """What each pixel adds to the logit of a class on the way from a baseline to the image.

    Integrated gradients (Sundararajan et al., arXiv 1703.01365), by the midpoint rule; the channels of a pixel are added up.
    The values of an image sum to the difference of the logits, the better the more steps.

    Args:
        model, x, target: as in ``cam``.
        baseline: broadcasts to ``x``; None: each image's mean colour.

    Returns:
        (B, *size) in units of the logit.
    """
    if steps < 1:
        raise UsageError(f"steps={steps} must be at least 1.")
    model = classifier_of(model)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        x = x.detach().clone().to(model.norm.weight.device)
        start = mean_colour(x) if baseline is None else baseline.to(x)
        classes = targets(model(x).detach(), target)
        total = torch.zeros_like(x)
        for step in range(steps):
            between = (start + (x - start) * ((step + 0.5) / steps)).requires_grad_()
            total += torch.autograd.grad(_score(model(between), classes), between)[0]
    return ((x - start) * total / steps).float().sum(1)


def mean_colour(x: Tensor) -> Tensor:
    """(B, C, 1, …): each channel's mean."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def classifier_of(model: nn.Module) -> SwinTransformer:
    """The Swin in ``model``; UsageError if it does not classify."""
    model = swin_of(model)
    if not isinstance(model.head, nn.Linear):
        raise UsageError(
            "The model has no classifier, so there is no class to explain: attention and rollout need none."
        )
    return model


def targets(logits: Tensor, target: int | Sequence[int] | Tensor | None) -> Tensor:
    """(B,) classes: the predicted ones for None. UsageError for one that does not exist."""
    if target is None:
        return logits.argmax(1)
    classes = torch.as_tensor(target, device=logits.device)
    count = logits.shape[1]
    if classes.is_floating_point() or classes.ndim > 1 or (classes.ndim and len(classes) != len(logits)):
        raise UsageError(f"target={target}: give a class, or one for each of {len(logits)} images.")
    if bool(((classes < 0) | (classes >= count)).any()):
        raise UsageError(f"target={target} is not a class of this model: allowed are 0 to {count - 1}.")
    return classes.expand(len(logits)).long()


def _score(logits: Tensor, classes: Tensor) -> Tensor:
    """The sum of the logits of ``classes``: images do not see each other, so its gradient is each one's own."""
    return logits.gather(1, classes[:, None]).sum()


def _strides(model: SwinTransformer, point: str) -> Size:
    """Pixels per token of the map at ``point``."""
    strides = model.config.stage_strides()
    if point == "embed":
        return strides[0]
    return strides[-1] if point == "pre_pool" else strides[int(point.split(".")[1])]
