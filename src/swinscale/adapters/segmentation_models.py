"""segmentation_models_pytorch: our models as encoders of its networks, named ``swinscale-`` and our name.

    import segmentation_models_pytorch as smp
    import swinscale.adapters.segmentation_models as adapter  # registers the names

    model = smp.Unet("swinscale-swinv2_tiny_window8_256", encoder_weights=None, in_channels=4, classes=3)
    adapter.register("swinscale-mine", "runs/demo/finetuned/best")  # now smp.Unet("swinscale-mine", encoder_weights=None)

The usual models have no map of stride 2; as with smp's own Transformers, an empty one without channels takes its place.
``swinscale.load_weights(model, path)`` puts weights of any layout into a whole encoder.
"""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor, nn

from swinscale.adapters import needs
from swinscale.errors import UsageError
from swinscale.models import create_model
from swinscale.models.pyramid import Pyramid
from swinscale.models.variants import VARIANTS
from swinscale.weights import from_pretrained
from swinscale.weights.resize import adapt_channels

with needs("segmentation_models_pytorch"):
    from segmentation_models_pytorch.encoders import encoders
    from segmentation_models_pytorch.encoders._base import EncoderMixin

PREFIX = "swinscale-"


class SwinscaleEncoder(Pyramid, EncoderMixin):
    """The maps that a decoder reads: the image itself, then one per factor of 2, up to ``depth`` factors.

    Args:
        name: one of our names, for fresh weights.
        path: a directory or file with weights, instead of ``name``.
        depth: as smp counts: the deepest map has stride 2^depth.
        output_stride: 32, or what the deepest map has anyhow: attention windows cannot be dilated.
    """

    _is_torch_scriptable = False

    def __init__(
        self,
        name: str | None = None,
        path: str | os.PathLike[str] | None = None,
        depth: int = 5,
        output_stride: int = 32,
    ):
        backbone = create_model(name, num_classes=0) if name else from_pretrained(path or "", num_classes=0)
        patch, stages = backbone.config.patch_size, len(backbone.layers)
        skipped = patch[0].bit_length() - 2  # factors of 2 that have no map
        if patch not in ((2, 2), (4, 4), (8, 8)):
            raise UsageError(f"patch_size={patch} is not possible here: smp needs strides that are powers of 2.")
        if not 1 <= depth - skipped <= stages:
            raise UsageError(f"encoder_depth={depth} is not allowed: choose {skipped + 1} to {skipped + stages}.")
        super().__init__(backbone, range(depth - skipped))
        self._depth, self._output_stride, self._in_channels = depth, output_stride, backbone.config.in_chans
        self._out_channels, self._skipped = [self._in_channels, *[0] * skipped, *self.channels], skipped
        self._trained = path is not None

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) → ``depth`` + 1 maps, map k with stride 2^k."""
        batch, _, height, width = images.shape
        empty = [images.new_empty((batch, 0, height >> k, width >> k)) for k in range(1, self._skipped + 1)]
        return [images, *empty, *super().forward(images)]

    @torch.no_grad()
    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Another number of input channels: trained filters are repeated, fresh ones drawn anew."""
        old, config = self.backbone.patch_embed.proj, self.backbone.config
        side = config.patch_size[0]
        if in_channels == config.in_chans:
            return
        new = nn.Conv2d(in_channels, config.embed_dim, side, side).to(old.weight)
        if self._trained:
            weight = adapt_channels(old.weight, in_channels, "repeat")
            new.load_state_dict({"weight": weight, "bias": old.bias})
        self.backbone.patch_embed.proj = new
        self.backbone.config = dataclasses.replace(config, in_chans=in_channels)
        self._in_channels = self._out_channels[0] = in_channels

    def make_dilated(self, output_stride: int) -> None:
        """Only confirms a stride that the deepest map has already."""
        if 2**self._depth > output_stride:
            raise UsageError(
                f"output_stride={output_stride} would dilate attention windows, which is not possible: set "
                f"encoder_depth={output_stride.bit_length() - 1}, or a decoder that reads stride {2**self._depth}."
            )


def register(name: str, path: str | os.PathLike[str]) -> None:
    """Makes the weights in ``path`` an encoder called ``name``: any directory or file that ``from_pretrained`` reads."""
    if not os.path.exists(path):
        raise UsageError(f"There is no file or directory '{path}'.")
    if name.startswith("tu-") or encoders.get(name, {}).get("encoder") not in (None, SwinscaleEncoder):
        raise UsageError(f"'{name}' is an encoder of smp: choose another name, such as '{PREFIX}mine'.")
    encoders[name] = {"encoder": SwinscaleEncoder, "pretrained_settings": {}, "params": {"path": os.fspath(path)}}


for _name in (name for name, config in VARIANTS.items() if config.rank == 2):
    encoders[PREFIX + _name] = {"encoder": SwinscaleEncoder, "pretrained_settings": {}, "params": {"name": _name}}
