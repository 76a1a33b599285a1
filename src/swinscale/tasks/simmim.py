"""SimMIM: predict the pixels of masked patches with one linear layer (arXiv 2111.09886), in images and in clips.

A mask token replaces the embeddings of masked patches, the encoder runs as usual, a 1×1 convolution predicts the
pixels under each token of its last map, and the loss is the mean absolute error over masked pixels. Shapes below are those
of images; a clip has time before the height, (B, C, T, H, W), and its tokens predict the pixels of all their frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.config import check_ranges, to_dict
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer
from swinscale.tasks.base import Batch, Task
from swinscale.tasks.neighbours import paint_from_neighbours
from swinscale.weights import save_pretrained


@dataclass(frozen=True)
class SimMIMConfig:
    """Options of masked image modelling.

    Args:
        mask_patch: side of a masked square in pixels; divides the image, and the model's patch divides it.
        mask_ratio: share of squares that are masked.
        mask_mode: "random" squares, contiguous "block" regions, or for clips "tube", the same squares in all frames; see
            ``data.MaskConfig``.
        loss: "l1", "l2" or "smooth_l1".
        masked_only: measure the loss on masked pixels alone (predicting visible ones too is worse: 81.7 against 82.8
            top-1 in the article).
        norm_target: side of the neighbourhood that normalises each target pixel, odd; 0: plain pixels. The published
            V2 models use 47.
        head_layers: layers of the decoder; each but the last has the width of the features and a GELU after it. The published
            one has 1, and deeper ones are no better (82.8 against 82.8 with 2 in the article).
        legacy_decay: let weight decay act on position biases and logit scales during pre-training, as the published code
            does (its exemption list never matches).
        probe_every: in epochs: how often a run classifies held-out images from the features of the frozen encoder, where
            the images have labels (``diagnose.mim``); 0: never. It changes nothing in the training.
        probe_stage: the stage whose features are probed; negative ones count from the end.
    """

    mask_patch: int = 32
    mask_ratio: float = 0.6
    mask_mode: Literal["random", "block", "tube"] = "random"
    loss: Literal["l1", "l2", "smooth_l1"] = "l1"
    masked_only: bool = True
    norm_target: int = 0
    head_layers: int = 1
    legacy_decay: bool = False
    probe_every: float = 0.0
    probe_stage: int = -1

    def __post_init__(self) -> None:
        at_least_0 = dict.fromkeys(("norm_target", "probe_every"), "[0, inf)")
        check_ranges(self, "task.", mask_patch="[1, inf)", mask_ratio="(0, 1)", head_layers="[1, inf)", **at_least_0)
        if self.norm_target and self.norm_target % 2 == 0:
            raise UsageError(
                f"task.norm_target={self.norm_target} must be odd, so that a pixel is the centre of its "
                f"neighbourhood, or 0."
            )


class Reconstruction(NamedTuple):
    """What ``SimMIM.reconstruct`` returns."""

    loss: Tensor
    """Scalar."""
    prediction: Tensor
    """(B, C, H, W) in the space of the (normalised) input, or of the normalised target with ``norm_target``."""
    mask: Tensor
    """(B, 1, H, W) bool, True = masked."""


class ClipShuffle(nn.Module):
    """``nn.PixelShuffle`` for clips: (B, C·t·s², T, H, W) → (B, C, T·t, H·s, W·s). With t = 1 it is that of each frame."""

    def __init__(self, time: int, stride: int):
        super().__init__()
        self.time, self.stride = time, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, self.time, self.stride, self.stride)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class SimMIM(Task):
    """An encoder, a mask token and a one-layer decoder.

    Reads ``batch["image"]`` (B, C, H, W), normalised, and ``batch["mask"]`` (B, H/patch, W/patch) bool, True = masked; or
    clips (B, C, T, H, W) with masks (B, T/patch, H/patch, W/patch), where the encoder is one of clips. The encoder is a
    ``SwinTransformer``, or the ViT of ``adapters``, which has what is used of one.
    """

    metric = "loss"
    higher_is_better = False

    def __init__(
        self, encoder: SwinTransformer, config: SimMIMConfig | None = None, preprocessing: dict[str, Any] | None = None
    ):
        super().__init__()
        self.config = config or SimMIMConfig()
        self.preprocessing = preprocessing or {}
        clips, (*_, stride, across) = encoder.config.rank == 3, encoder.config.stage_strides()[-1]
        if stride != across:
            raise UsageError(
                f"patch_size={encoder.config.patch_size}: masked image modelling needs patches that are square in height and "
                f"width."
            )
        if encoder.num_classes:
            raise UsageError(
                f"num_classes={encoder.num_classes}: the encoder of SimMIM has no classifier; set num_classes=0."
            )
        self.stride = stride
        self.encoder = encoder
        device = encoder.norm.weight.device
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.config.embed_dim, device=device))
        conv, frames = (nn.Conv3d, encoder.config.patch_size[0]) if clips else (nn.Conv2d, 1)
        shuffle = ClipShuffle(frames, stride) if clips else nn.PixelShuffle(stride)
        pixels = frames * stride**2 * encoder.config.in_chans
        width, layers = encoder.num_features, list[nn.Module]()
        for _ in range(self.config.head_layers - 1):
            layers += [conv(width, width, 1, device=device), nn.GELU()]
        self.decoder = nn.Sequential(*layers, conv(width, pixels, 1, device=device), shuffle)
        if device.type != "meta":
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W) images and (B, H/patch, W/patch) mask → (B, C, H, W) predicted pixels."""
        tokens = self.encoder.embed(images)
        if mask.shape != tokens.shape[:-1]:
            raise UsageError(
                f"The mask has shape {tuple(mask.shape)}, but the image has {tuple(tokens.shape[:-1])} patches: "
                f"give one entry per patch of {self.encoder.config.patch_size} pixels, True where it is masked."
            )
        tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        features = self.encoder.forward_tokens(tokens)
        return _without_padding(self.decoder(features.movedim(-1, 1)), images)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Reconstruction:
        """Loss, predicted pixels and pixel mask."""
        prediction = self.predict(images, mask)
        for axis, patch in enumerate(self.encoder.config.patch_size, 1):
            mask = mask.repeat_interleave(patch, axis)
        mask = _without_padding(mask[:, None], images)
        return Reconstruction(self._loss(prediction, self.target(images), mask), prediction, mask)

    def features(self, images: Tensor, stage: int = -1) -> Tensor:
        """(B, C, H, W) whole images → (B, D) features of ``stage``, the mean over its map; normalised after the last stage.

        What a linear classifier on the frozen encoder sees.

        Raises:
            UsageError: for a stage that the encoder does not have.
        """
        options: dict[str, Any] = {"norm": True, "stop_early": True, "output_fmt": "NHWC", "intermediates_only": True}
        [features] = self.encoder.forward_intermediates(images, [stage], **options)
        return features.flatten(1, -2).mean(1)

    def target(self, images: Tensor) -> Tensor:
        """What the decoder should predict: the pixels, or with ``norm_target`` the pixels relative to their surroundings."""
        return normalise_locally(images, self.config.norm_target) if self.config.norm_target else images

    def _loss(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        distance = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[self.config.loss]
        error = distance(prediction.float(), target.float(), reduction="none")
        if not self.config.masked_only:
            return error.mean()
        return (error * mask).sum() / (mask.sum() + 1e-5) / target.shape[1]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.reconstruct(batch["image"], batch["mask"]).loss, {}

    def new_metrics(self) -> dict[str, Any]:
        """Means over images of the measures that ``update_metrics`` describes.

        PSNR is there if ``preprocessing`` says by which ``std`` pixels were divided; it is at most 100 dB.
        """
        from torchmetrics import MeanMetric
        from torchmetrics.metric import CompositionalMetric

        losses = {name: MeanMetric() for name in ("loss", "mean_predictor_loss", "neighbour_loss")}
        if not self.preprocessing.get("std"):
            return losses
        return losses | {n: CompositionalMetric(_decibels, MeanMetric(), None) for n in ("psnr", "neighbour_psnr")}

    def update_metrics(self, metrics: dict[str, Any], batch: Batch) -> None:
        """Loss and PSNR of the model, and of two predictors that learn nothing.

        * ``loss``; ``mean_predictor_loss``, of predicting each image's (or clip's) mean visible target; ``neighbour_loss``, of
          painting hidden targets from the visible ones around them in the same frame (``paint_from_neighbours``);
        * ``psnr``, ``neighbour_psnr``: 10·log10(1 / mean squared error) in dB, over masked pixels and channels of all images,
          with pixels in [0, 1] and predictions not clipped. With ``norm_target`` the prediction is scaled back by the
          deviation of each pixel's surroundings in the whole image, which the model was not told.
        """
        images = batch["image"]
        loss, prediction, mask = self.reconstruct(images, batch["mask"])
        target = self.target(images)
        visible = (~mask).expand_as(target)
        axes = tuple(range(2, target.ndim))
        mean = (target * visible).sum(axes, keepdim=True) / visible.sum(axes, keepdim=True).clamp(min=1)
        neighbours = paint_from_neighbours(target, mask)
        values = {"loss": loss, "mean_predictor_loss": self._loss(mean.expand_as(target), target, mask)}
        values["neighbour_loss"] = self._loss(neighbours, target, mask)
        if "psnr" in metrics:
            scale = torch.tensor(self.preprocessing["std"], device=images.device).view(-1, *[1] * len(axes))
            if self.config.norm_target:
                scale = scale * local_statistics(images, self.config.norm_target)[1]
            for name, predicted in (("psnr", prediction), ("neighbour_psnr", neighbours)):
                error = ((predicted.float() - target.float()) * scale).square() * mask
                values[name] = error.sum() / mask.sum().clamp(min=1) / target.shape[1]
        for name, value in values.items():
            metrics[name].update(value, len(images))

    @property
    def backbone(self) -> nn.Module:
        return self.encoder

    @property
    def num_layers(self) -> int:
        return self.encoder.config.num_layers

    def layer_id(self, name: str) -> int:
        if name == "mask_token":
            return 0
        root, _, rest = name.partition(".")
        return self.encoder.config.layer_id(rest) if root == "encoder" else self.num_layers

    def no_weight_decay(self) -> set[str]:
        exempt = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        if self.config.legacy_decay:
            exempt &= {"encoder.absolute_pos_embed"}
        return exempt | {"mask_token"}

    def save_pretrained(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        task = {"name": "simmim", **to_dict(self.config)}
        metadata = {"task": task, "preprocessing": self.preprocessing}
        save_pretrained(self, directory, metadata=metadata, state=state)


def _without_padding(x: Tensor, images: Tensor) -> Tensor:
    """``x`` cut to the frames, height and width of ``images``, which the encoder pads at the end."""
    for axis, length in enumerate(images.shape[2:], 2):
        x = x.narrow(axis, 0, length)
    return x


def _decibels(squared_error: Tensor) -> Tensor:
    return -10 * squared_error.clamp(min=1e-10).log10()


def local_statistics(images: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) → mean and standard deviation of each pixel's ``side``×``side`` neighbourhood, in fp32.

    In clips, (B, C, T, H, W), it lies within the frame. The variance is the unbiased one over the pixels that exist, with
    1e-6 added; microsoft/SimMIM, simmim.py of the V2 models.
    """
    shape, pad = images.shape, side // 2
    images = images.float().flatten(1, -3)

    def local_mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, stride=1, padding=pad, count_include_pad=False)

    count = F.avg_pool2d(torch.ones_like(images[:1, :1]), side, stride=1, padding=pad) * side**2
    mean = local_mean(images)
    variance = (local_mean(images.square()) - mean.square()) * count / (count - 1).clamp(min=1)
    return mean.view(shape), (variance.clamp(min=0) + 1e-6).sqrt().view(shape)


def normalise_locally(images: Tensor, side: int) -> Tensor:
    """Each pixel minus the mean of its ``side``×``side`` neighbourhood, over its standard deviation; see ``local_statistics``."""
    mean, deviation = local_statistics(images, side)
    return (images - mean) / deviation
