"""What renaming cannot say about other projects: tensors that are split, joined or in another order there."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.models.windows import relative_coords, relative_position_index
from swinscale.weights.files import State

MERGING = re.compile(r"layers\.\d+\.downsample\.(reduction\.weight|norm\.(weight|bias))")
PHASES = [0, 2, 1, 3]  # the 2×2 neighbours: we take columns of two (00, 10, 01, 11), nn.Unfold rows (00, 01, 10, 11)


def split_qkv(state: State) -> State:
    """One projection → three, q, k and v."""
    out: State = {}
    for name, tensor in state.items():
        block, _, leaf = name.partition(".attn.")
        if leaf in ("qkv.weight", "qkv.bias"):
            kind = leaf.removeprefix("qkv.")
            out.update({f"{block}.attn.{x}.{kind}": t.clone() for x, t in zip("qkv", tensor.chunk(3), strict=True)})
        elif leaf in ("q_bias", "v_bias"):
            out[f"{block}.attn.{leaf[0]}.bias"] = tensor
        else:
            out[name] = tensor
    return out


def join_qkv(state: State) -> State:
    """Three projections → one; biases of q and v alone become ``q_bias`` and ``v_bias``.

    Raises:
        UsageError: for a weight without the other two.
    """
    out: State = {}
    for name, tensor in state.items():
        split = re.fullmatch(r"(.*\.attn)\.([qkv])\.(weight|bias)", name)
        if split is None:
            out[name] = tensor
            continue
        attn, letter, kind = split.groups()
        parts = [state[part] for part in (f"{attn}.{x}.{kind}" for x in "qkv") if part in state]
        if len(parts) == 3:
            if letter == "q":
                out[f"{attn}.qkv.{kind}"] = torch.cat(parts)
        elif kind == "bias" and letter != "k":
            out[f"{attn}.{letter}_bias"] = tensor
        else:
            raise UsageError(f"The weights hold {attn}.{letter}.{kind} without the other two of query, key and value.")
    return out


def split_v2_bias(state: State, drop_k_bias: bool) -> tuple[State, str]:
    """V2 has no bias of the keys: q_bias and v_bias instead of one qkv.bias.

    Returns: the tensors, and a line about a bias that was dropped ("" if there was none).

    Raises:
        UsageError: for a bias of the keys that is not zero, unless ``drop_k_bias``.
    """
    out, largest = dict(state), 0.0
    for name, bias in state.items():
        found = re.fullmatch(r"(.*\.attn)\.(qkv\.bias|k_bias)", name)
        if found is None or f"{found[1]}.logit_scale" not in state:
            continue
        if found[2] == "qkv.bias":
            out[f"{found[1]}.q_bias"], bias, out[f"{found[1]}.v_bias"] = (t.clone() for t in out.pop(name).chunk(3))
        largest = max(largest, bias.abs().max().item())
    if largest and not drop_k_bias:
        raise UsageError(
            f"The keys of this V2 model have a bias (largest {largest:.3g}), which cosine attention does not cancel and "
            f"Swin V2 does not have. Pass drop_k_bias=True to leave it out and accept different results."
        )
    return out, f"the bias of the keys (largest {largest:.3g}), which Swin V2 does not have" if largest else ""


def join_v2_bias(state: State) -> State:
    """q_bias and v_bias → one qkv.bias whose middle third is zero."""
    out: State = {}
    for name, tensor in state.items():
        attn, _, leaf = name.rpartition(".")
        if leaf == "q_bias":
            out[f"{attn}.qkv.bias"] = torch.cat((tensor, torch.zeros_like(tensor), state[f"{attn}.v_bias"]))
        elif leaf != "v_bias":
            out[name] = tensor
    return out


def merging_to_unfold(state: State) -> State:
    """Patch mergings in the channel order of ``nn.Unfold``: each channel's four neighbours together, row by row."""
    return {
        name: t.unflatten(-1, (4, -1))[..., PHASES, :].transpose(-1, -2).flatten(-2) if _merges(state, name) else t
        for name, t in state.items()
    }


def merging_from_unfold(state: State) -> State:
    """The way back: the four neighbours one after the other, each with all its channels, column by column."""
    return {
        name: t.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., PHASES, :].flatten(-2) if _merges(state, name) else t
        for name, t in state.items()
    }


def _merges(state: State, name: str) -> bool:
    """Whether the last axis of a tensor counts the channels of four neighbours (V2 normalises after the projection)."""
    if MERGING.fullmatch(name) is None:
        return False
    reduction = state.get(re.sub(r"(reduction|norm)\.\w+$", "reduction.weight", name))
    return reduction is not None and state[name].shape[-1] == reduction.shape[-1]


def check_merging_order(state: State, unfold: bool) -> None:
    """Refuses patch mergings whose numbers say that their channels are in the other order.

    In trained weights the columns that read the same channel in four neighbours have similar norms. Where columns agree
    as the other order groups them, by six standard deviations of chance, and do not as the claimed order does, the
    tensors were stored in the other order. Random weights and small models show nothing and pass.

    Args:
        unfold: the order that their names claim.

    Raises:
        UsageError: for the other order.
    """
    within = {True: 0.0, False: 0.0}  # by order: squared differences inside groups of four, relative to all differences
    freedom = 0
    for name, weight in state.items():
        wrong = weight.is_meta or weight.ndim != 2 or weight.shape[-1] % 4
        if not name.endswith("downsample.reduction.weight") or wrong:
            continue
        norms = weight.float().norm(dim=0)
        # That one of the four neighbours matters more than the others says nothing about the order of channels.
        by_neighbour = norms.view(-1, 4).t() if unfold else norms.view(4, -1)
        by_neighbour = by_neighbour - by_neighbour.mean(1, keepdim=True)
        norms = by_neighbour.t().flatten() if unfold else by_neighbour.flatten()
        total = norms.var().item()
        if not total > 0 or not math.isfinite(total):
            continue
        groups = weight.shape[1] // 4
        within[True] += norms.view(-1, 4).var(1).sum().item() / total
        within[False] += norms.view(4, -1).var(0).sum().item() / total
        freedom += groups
    if not freedom:
        return
    claimed, other = within[unfold] / freedom, within[not unfold] / freedom
    if claimed > 0.8 and 1 - other > 6 * math.sqrt(2 / (3 * freedom)):
        theirs, ours = ("concatenated", "nn.Unfold (OpenMMLab)") if unfold else ("nn.Unfold (OpenMMLab)", "published")
        raise UsageError(
            f"The patch mergings of these weights are in the channel order '{theirs}', but their names are those of the "
            f"order '{ours}': somebody renamed them without re-ordering. Get the file in its first form."
        )


def flatten_position_embedding(state: State) -> State:
    """Absolute position embeddings of dense models, (1, D, H, W), as (1, H*W, D)."""
    table = state.get("absolute_pos_embed")
    if table is None or table.ndim != 4:
        return state
    return {**state, "absolute_pos_embed": table.flatten(2).transpose(1, 2).contiguous()}


def norms_of_transformers_backbone(state: State, stages: int) -> tuple[State, list[str]]:
    """The V1 backbone of transformers has a norm of its own after each stage, and one that nothing reads, ``layernorm``.

    Returns: the tensors, in which the norm after the last stage is ``layernorm`` where there is one, and a line about the other.
    """
    last = f"hidden_states_norms.stage{stages}."
    if not any(name.startswith(last) for name in state):
        return state, []
    spare = [name for name in state if name.startswith("layernorm.")]
    kept = {name.replace(last, "layernorm."): tensor for name, tensor in state.items() if name not in spare}
    return kept, [f"{', '.join(spare)}: this backbone reads the norms after its stages"] if spare else []


def with_torchvision_buffers(state: State, config: SwinConfig | None) -> State:
    """Adds the buffers that torchvision stores, and gives q, k and v one bias; names stay the published ones."""
    if config is None:
        raise UsageError("torchvision's files depend on the windows: pass config=model.config.")
    if len(set(config.stage_windows)) > 1:
        raise UsageError(
            f"torchvision has one window for all stages, but this model has {config.stage_windows}. "
            f"Export to timm or transformers, or transfer it to one window with small_map='pad-noshift'."
        )
    indices = index_buffers(config)
    indices = {name: index.flatten() if config.rank == 2 else index for name, index in indices.items()}
    return {**join_v2_bias(state), **indices, **coordinate_buffers(config)}


def index_buffers(config: SwinConfig) -> State:
    """The positions (N, N) in the bias table that published files store in each block: they say the windows."""
    out: State = {}
    for stage, depth in enumerate(config.depths):
        window = config.stage_windows[stage]
        index = relative_position_index(window, window, torch.device("cpu")).view(2 * (math.prod(window),))
        for block in range(depth):
            out[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = index.clone()
    return out


def coordinate_buffers(config: SwinConfig) -> State:
    """The coordinates that published V2 files store, (1, 2h-1, 2w-1, 2) in each block: they say the windows. None for V1."""
    if config.position_bias != "log":
        return {}
    out: State = {}
    for stage, depth in enumerate(config.depths):
        window = config.stage_windows[stage]
        coords = relative_coords(window, config.trained_windows[stage], "log", torch.device("cpu"))
        for block in range(depth):
            table = coords.view(1, *(2 * w - 1 for w in window), config.rank).clone()
            out[f"layers.{stage}.blocks.{block}.attn.relative_coords_table"] = table
    return out


def window_of_index(index: Tensor, rank: int) -> tuple[int, ...] | None:
    """The window whose relative position index (N, N), or flattened, this is; None where it is none.

    The first row holds, for the token in the corner, the distances to all tokens: they grow by 1 along the last axis,
    by 2w-1 along the one before, and so on.
    """
    tokens = math.isqrt(index.numel())
    if tokens**2 != index.numel():
        return None
    row = index.reshape(tokens, tokens)[0]
    distance = (row[0] - row).tolist()
    window: list[int] = []
    run, stride, left = 1, 1, tokens
    for _ in range(rank - 1):
        side = 1
        while side < left and distance[side * run] == side * stride:
            side += 1
        if left % side:
            return None
        window.insert(0, side)
        run, stride, left = run * side, stride * (2 * side - 1), left // side
    window.insert(0, left)
    expected = relative_position_index(tuple(window), tuple(window), torch.device("cpu"))
    return tuple(window) if torch.equal(expected, index.flatten().long()) else None
