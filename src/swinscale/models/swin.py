"""Swin Transformer V1 and V2, for images and video: the whole forward pass, top to bottom.

Inside a stage the tokens stay in *window order*: ``(batch, windows, tokens, channels)``. A ``Layout`` (``windows.py``)
knows which position of the map each slot holds, for the regular and for the shifted windows. Between two blocks one gather
re-orders the residual stream; the block itself is an ordinary Transformer block that knows nothing of height or shift.

Shape letters: B batch, W windows, N tokens of a window, D channels, A heads, d channels of a head, L tokens of the map.

Parameter names are those of the published code (microsoft/Swin-Transformer, MIT), so its files load as they are.
Articles: Swin V1 arXiv 2103.14030, Swin V2 arXiv 2111.09883.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.errors import UsageError
from swinscale.models.chunks import in_chunks
from swinscale.models.config import SwinConfig
from swinscale.models.init import initial_values
from swinscale.models.position import RelativePositionBias, absolute_positions
from swinscale.models.recompute import Checkpointing, recompute
from swinscale.models.stages import check_input, chosen_stages
from swinscale.models.windows import Layout, stage_layouts
from swinscale.ops.attention import choose_backend, window_attention
from swinscale.ops.linear import affine, linear
from swinscale.ops.position import PositionBias

MAX_LOGIT_SCALE = math.log(100)  # the temperature of cosine attention stays above 0.01


class WindowAttention(RelativePositionBias):
    """Multi-head attention inside windows with a relative position bias."""

    def __init__(self, config: SwinConfig, stage: int):
        super().__init__(config, stage)
        dim, self.cosine = config.stage_dims[stage], config.similarity == "cosine"
        self.dropout, self.backend = config.attn_drop_rate, "auto"
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias and not self.cosine)
        if self.cosine:
            # Keys have no bias: under cosine attention it would not cancel in the softmax.
            self.q_bias = nn.Parameter(torch.empty(dim)) if config.qkv_bias else None
            self.v_bias = nn.Parameter(torch.empty(dim)) if config.qkv_bias else None
            self.logit_scale = nn.Parameter(torch.empty(self.num_heads, 1, 1))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, layout: Layout, bias: PositionBias | None = None) -> Tensor:
        """(B, W, N, D) → (B, W, N, D); ``bias`` is ``self.bias(layout.window)`` where the caller has it already."""
        qkv_bias: Tensor | None = self.qkv.bias
        scale: Tensor | float = (x.shape[-1] // self.num_heads) ** -0.5
        if self.cosine:
            scale = self.logit_scale.flatten().clamp(max=MAX_LOGIT_SCALE).exp()
            if self.q_bias is not None and self.v_bias is not None:
                qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = affine(x, self.qkv.weight, qkv_bias)
        bias, dropout = bias or self.bias(layout.window), self.dropout * self.training
        x = window_attention(qkv, bias, layout.regions, scale, self.cosine, dropout, self.backend)
        return self.proj_drop(linear(self.proj, x))


class Mlp(nn.Module):
    """Two linear layers with GELU between them, applied to each token."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(linear(self.fc2, self.drop(linear(self.fc1, x, gelu=True))))


class SwinBlock(nn.Module):
    """A Transformer block. V1 normalises the input of each residual branch, V2 its output."""

    def __init__(self, config: SwinConfig, stage: int, block: int):
        super().__init__()
        dim, self.norm_placement = config.stage_dims[stage], config.norm_placement
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        if self.norm_placement == "sandwich":
            self.branch_norm1, self.branch_norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(config, stage)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), config.drop_rate)
        self.drop_path_rate = config.drop_path_rates()[stage][block]
        every = config.main_norm_interval
        self.enorm = nn.LayerNorm(dim) if every and (block + 1) % every == 0 else nn.Identity()
        self.initially_zero = config.initially_zero
        self.checkpointing: Checkpointing = "none"

    def drop_path(self, x: Tensor) -> Tensor:
        """Stochastic depth: drops the branch for whole samples and scales the others up by 1 / (1 - rate)."""
        if not self.training or self.drop_path_rate == 0:
            return x
        keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - self.drop_path_rate)
        return x * keep.div_(1 - self.drop_path_rate)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, W, N, D) → (B, W, N, D)"""
        return cast(Tensor, recompute(self.checkpointing, self.transform, x, layout))

    def transform(self, x: Tensor, layout: Layout) -> Tensor:
        """``forward`` without activation checkpointing."""
        bias = self.attn.bias(layout.window)
        x = in_chunks(self, lambda windows, part: self.residuals(windows, part, bias), x, layout)
        bias.forget()
        return x

    def residuals(self, x: Tensor, layout: Layout, bias: PositionBias) -> Tensor:
        """Attention and MLP on any number of windows: (B, W, N, D) → (B, W, N, D)"""

        def attention(tokens: Tensor) -> Tensor:
            tokens = tokens if layout.zero is None else tokens.masked_fill(layout.zero, 0)
            return self.attn(tokens, layout, bias)

        x = self.residual(x, attention, "norm1")
        return self.enorm(self.residual(x, self.mlp, "norm2"))

    def residual(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: str) -> Tensor:
        """``x`` plus a branch, with the norm in its place: "pre" in V1, "res-post" in V2, the others for comparison."""
        normalise = getattr(self, norm)
        if self.norm_placement == "res-post":
            return x + self.drop_path(normalise(branch(x)))
        if self.norm_placement == "post":
            return normalise(x + self.drop_path(branch(x)))
        out = branch(normalise(x))
        return x + self.drop_path(getattr(self, f"branch_{norm}")(out) if self.norm_placement == "sandwich" else out)


class PatchEmbed(nn.Module):
    """Pixels to tokens: a strided convolution over patches; the image is padded with zeros to whole patches."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        conv = nn.Conv2d if config.rank == 2 else nn.Conv3d
        self.patch_size = config.patch_size
        self.proj = conv(config.in_chans, config.embed_dim, cast(Any, config.patch_size), cast(Any, config.patch_size))
        self.norm = nn.LayerNorm(config.embed_dim) if config.patch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) → (B, *map, D)"""
        missing = [(n + p - 1) // p * p - n for n, p in zip(x.shape[2:], self.patch_size, strict=True)]
        if torch.compiler.is_compiling() or any(missing):  # a compiler shall not make two graphs of it
            x = F.pad(x, [v for m in reversed(missing) for v in (0, m)])
        return self.norm(self.proj(x).movedim(1, -1))


class PatchMerging(nn.Module):
    """Joins 2×2 neighbours (never along time): D → 2D channels. V1 normalises before the projection, V2 after it."""

    def __init__(self, config: SwinConfig, stage: int):
        super().__init__()
        dim = config.stage_dims[stage]
        self.post_norm = config.version == 2
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if self.post_norm else 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *map, D) → (B, *half map, 2D); an odd height or width is padded by a row or column of zeros."""
        *before, height, width, dim = x.shape
        rows, columns = (height + 1) // 2, (width + 1) // 2
        if torch.compiler.is_compiling() or height % 2 or width % 2:  # as above
            x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        x = x.reshape(math.prod(before) * rows, 2, columns, 2, dim)
        x = x.permute(0, 2, 3, 1, 4).reshape(*before, rows, columns, 4 * dim)  # the row of the 2x2 varies first
        return self.norm(linear(self.reduction, x)) if self.post_norm else linear(self.reduction, self.norm(x))


class SwinStage(nn.Module):
    """The blocks of one resolution; every second one with shifted windows. ``downsample`` leads to the next stage."""

    def __init__(self, config: SwinConfig, stage: int):
        super().__init__()
        self.config, self.stage = config, stage
        self.blocks = nn.ModuleList(SwinBlock(config, stage, block) for block in range(config.depths[stage]))
        self.downsample = nn.Identity() if stage == len(config.depths) - 1 else PatchMerging(config, stage)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *map, D) → (B, *map, D), before ``downsample``."""
        size = tuple(x.shape[1:-1])
        regular, shifted, to_regular, to_shifted = stage_layouts(self.config, self.stage, size, x.device)
        x = x.flatten(1, -2).index_select(1, regular.source)
        for index, block in enumerate(self.blocks):
            layout = shifted if index % 2 else regular
            if index and shifted is not regular:
                x = x.index_select(1, to_shifted if index % 2 else to_regular)
            x = block(x.unflatten(1, (-1, math.prod(layout.window))), layout).flatten(1, 2)
        return x.index_select(1, layout.slot).unflatten(1, size)


class SwinTransformer(nn.Module):
    """Swin Transformer V1 or V2: images (B, C, H, W) or clips (B, C, T, H, W) of any size to class logits.

    ``forward_intermediates`` gives the feature pyramid for dense tasks, ``forward_features`` the last map.
    """

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.config = config
        self.num_classes, self.num_features = config.num_classes, config.num_features
        self.head_hidden_size = config.num_features
        self.patch_embed = PatchEmbed(config)
        tokens = math.prod(config.stage_maps()[0])
        self.absolute_pos_embed = nn.Parameter(torch.empty(1, tokens, config.embed_dim)) if config.ape else None
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.layers: Any = nn.ModuleList(SwinStage(config, stage) for stage in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.num_features)
        self.head = nn.Linear(config.num_features, config.num_classes) if config.num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": dim, "reduction": strides[-1], "module": f"layers.{stage}"}
            for stage, (dim, strides) in enumerate(zip(config.stage_dims, config.stage_strides(), strict=True))
        ]
        if self.norm.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value (``init.py``); ``seed`` None: one from PyTorch's random state."""
        seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        for name, value in initial_values(self, seed):
            self.get_parameter(name).copy_(value)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, *size) → (B, *map, D): the patch embeddings that the first stage reads."""
        check_input(x, self.config.rank, self.config.in_chans)
        return self.patch_embed(x)

    def _enter(self, x: Tensor) -> Tensor:
        """Adds the absolute position embedding, resized to the map if needed, and dropout."""
        if self.absolute_pos_embed is not None:
            x = x + absolute_positions(self.absolute_pos_embed, self.config.stage_maps()[0], tuple(x.shape[1:-1]))
        return self.pos_drop(x)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """(B, *map, D) patch embeddings → (B, *last map, num_features), normalised."""
        x = self._enter(x)
        for stage in self.layers:
            x = stage.downsample(stage(x))
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, *size) → (B, *last map, num_features), channels last, normalised."""
        return self.forward_tokens(self.embed(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map, then the classifier: (B, *map, num_features) → (B, num_classes)."""
        x = x.flatten(1, -2).mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) → (B, num_classes); pooled features when there is no classifier."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of chosen stages, with strides 4, 8, 16, 32 for the usual patch size.

        Args:
            indices: stages to return (negative ones count from the end), the last n for an integer, None for all.
            norm: apply the final norm to the last stage's entry.
            stop_early: do not run stages after the last one asked for.
            output_fmt: channels first ("NCHW") or last ("NHWC"); time, for video, precedes height.

        Returns: (last features, channels last, and the list of features), or the list alone.
        """
        last = len(self.layers) - 1
        wanted = chosen_stages(indices, output_fmt, last + 1)
        x, maps = self._enter(self.embed(x)), []
        for index, stage in enumerate(self.layers[: max(wanted) + 1] if stop_early else self.layers):
            x = stage(self.layers[index - 1].downsample(x) if index else x)
            maps.append(x)
        x = self.norm(x) if len(maps) > last else x
        maps = [x if norm and i == last else maps[i] for i in wanted]
        features = [y.movedim(-1, 1).contiguous() for y in maps] if output_fmt == "NCHW" else maps
        return features if intermediates_only else (x, features)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one; 0 removes it."""
        like = self.norm.weight
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
        if num_classes and like.device.type != "meta":
            nn.init.trunc_normal_(cast(Tensor, self.head.weight), std=0.02)
            nn.init.zeros_(cast(Tensor, self.head.bias))

    def units(self) -> list[nn.Module]:
        """Blocks and patch mergings in forward order: what is compiled, and spread over devices, one by one."""
        return [unit for stage in self.layers for unit in (*stage.blocks, stage.downsample) if list(unit.parameters())]

    def _per_stage(self, setting: str, value: Any) -> list[Any]:
        """One value per stage, from one for all or a sequence."""
        values = [value] * len(self.layers) if isinstance(value, (bool, str)) else list(value)
        if len(values) != len(self.layers):
            raise UsageError(f"{setting}={value}: give one value, or {len(self.layers)}, one per stage.")
        return values

    def set_grad_checkpointing(self, mode: bool | Checkpointing | Sequence[Checkpointing] = True) -> None:
        """Compute activations again in the backward pass instead of keeping them.

        Args:
            mode: "block" or True: only inputs of blocks are kept; "selective": also the results of linear layers and fused
                attention; "none" or False: all. One for the whole model, or one per stage.
        """
        for stage, chosen in zip(self.layers, self._per_stage("grad_checkpointing", mode), strict=True):
            chosen = {True: "block", False: "none"}.get(chosen, chosen)
            if chosen not in get_args(Checkpointing):
                raise UsageError(f"Unknown checkpointing '{chosen}': choose {', '.join(get_args(Checkpointing))}.")
            for block in stage.blocks:
                block.checkpointing = chosen

    def set_attention_backend(self, name: str | Sequence[str]) -> None:
        """Chooses how attention is computed: "auto" or a name in ``swinscale.ops.BACKENDS``; or one per stage."""
        for stage, chosen in zip(self.layers, self._per_stage("attention", name), strict=True):
            choose_backend(chosen, "cuda" if torch.cuda.is_available() else self.norm.weight.device.type)
            for block in stage.blocks:
                block.attn.backend = chosen

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must not pull to zero, besides biases and norms."""
        marks = ("absolute_pos_embed", "relative_position_bias_table", "cpb_mlp", "logit_scale")
        return {name for name, _ in self.named_parameters() if any(mark in name for mark in marks)}
