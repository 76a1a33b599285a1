"""Feature maps of chosen stages for dense tasks: what detectors, segmenters and the adapters have in common.

Each map is normalised: the last stage by the final norm of the backbone, an earlier one by a LayerNorm of its own, as in the
published detection and segmentation code. Nothing is kept that has no part in the maps asked for, so that every parameter
gets a gradient (DistributedDataParallel needs no ``find_unused_parameters``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from swinscale.errors import UsageError
from swinscale.models.swin import SwinTransformer


def keep_stages(backbone: SwinTransformer, stages: Sequence[int]) -> None:
    """Removes from ``backbone``, in place, what features of ``stages`` do not need: the classifier and later stages.

    Args:
        stages: numbers of stages from 0, ascending.

    Raises:
        UsageError: for stages that do not exist or are not ascending.
    """
    if not isinstance(backbone, SwinTransformer):
        raise UsageError(
            f"{type(backbone).__name__} cannot be the backbone of a dense model here: choose a Swin Transformer."
        )
    count = len(backbone.layers)
    if not stages or list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < count:
        raise UsageError(f"stages={list(stages)} is not allowed: name some of {list(range(count))}, ascending.")
    backbone.reset_classifier(0)
    if stages[-1] < count - 1:
        backbone.layers = backbone.layers[: stages[-1] + 1]
        backbone.layers[-1].downsample = nn.Identity()
        drop_norm(backbone)  # it belongs to the last stage


def drop_norm(backbone: SwinTransformer) -> None:
    """Removes the final norm, in place."""
    setattr(backbone, "norm", nn.Identity())  # noqa: B010  (to the type checker it is a LayerNorm)


def stage_norms(backbone: SwinTransformer, stages: Sequence[int]) -> nn.ModuleDict:
    """A LayerNorm for each of ``stages`` but the last of the backbone, whose maps the final norm normalises."""
    dims, like = backbone.config.stage_dims, backbone.patch_embed.proj.weight
    return nn.ModuleDict({str(i): nn.LayerNorm(dims[i]).to(like) for i in stages if i < len(dims) - 1})


def stage_maps(backbone: SwinTransformer, norms: nn.ModuleDict, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
    """Images (B, C, H, W) → one map (B, D, H / stride, W / stride) per stage, rounded up, contiguous, normalised."""
    maps = backbone.forward_intermediates(
        images, list(stages), norm=True, stop_early=True, output_fmt="NHWC", intermediates_only=True
    )
    normed = (norms[str(i)](x) if str(i) in norms else x for i, x in zip(stages, maps, strict=True))
    return [x.movedim(-1, 1).contiguous() for x in normed]


class Pyramid(nn.Module):
    """A backbone that returns a list of feature maps. ``backbone`` is trimmed in place.

    Args:
        backbone: a model with the weights that it shall have.
        stages: numbers of the stages whose maps are returned, from 0, ascending.
        frozen_stages: the patch embedding and so many of the first stages are not trained and stay in evaluation mode
            (no dropout, no stochastic depth), their norms included; 0: everything is trained.
    """

    def __init__(self, backbone: SwinTransformer, stages: Sequence[int], frozen_stages: int = 0):
        super().__init__()
        keep_stages(backbone, stages)
        if not 0 <= frozen_stages <= len(backbone.layers):
            raise UsageError(f"frozen_stages={frozen_stages} is not allowed: choose 0 to {len(backbone.layers)}.")
        self.backbone, self.norms = backbone, stage_norms(backbone, stages)
        self.stages, self.frozen_stages = list(stages), frozen_stages
        self.channels = [backbone.config.stage_dims[stage] for stage in stages]
        for module in self._frozen():
            module.requires_grad_(False)
        if frozen_stages and backbone.absolute_pos_embed is not None:
            backbone.absolute_pos_embed.requires_grad_(False)
        self.train(backbone.training)

    def _frozen(self) -> Iterator[nn.Module]:
        if self.frozen_stages:
            yield from (self.backbone.patch_embed, self.backbone.pos_drop)
            yield from self.backbone.layers[: self.frozen_stages]
            yield from (norm for name, norm in self.norms.items() if int(name) < self.frozen_stages)
        if self.frozen_stages == len(self.backbone.config.depths):
            yield self.backbone.norm

    def train(self, mode: bool = True) -> Pyramid:
        """As ever, but frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) → one (B, D, H / stride, W / stride) per stage."""
        return stage_maps(self.backbone, self.norms, images, self.stages)
