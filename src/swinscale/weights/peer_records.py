"""Writing the ``config.json`` of transformers and timm, and saying what their models cannot hold.

Reading them is in ``records.py``; what is written here is read there as the same configuration.
"""

from __future__ import annotations

from typing import Any

from swinscale.errors import UsageError
from swinscale.models.config import Size, SwinConfig, format_size

TIMM_MODELS = (
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "swin_base_patch4_window12_384",
    "swin_large_patch4_window7_224",
    "swin_large_patch4_window12_384",
    "swinv2_tiny_window8_256",
    "swinv2_tiny_window16_256",
    "swinv2_small_window8_256",
    "swinv2_small_window16_256",
    "swinv2_base_window8_256",
    "swinv2_base_window16_256",
    "swinv2_base_window12_192",
    "swinv2_base_window12to16_192to256",
    "swinv2_base_window12to24_192to384",
    "swinv2_large_window12_192",
    "swinv2_large_window12to16_192to256",
    "swinv2_large_window12to24_192to384",
)
"""Names that are timm's and ours. Any other model is one of them with other arguments."""


def check_peer(title: str, config: SwinConfig) -> None:
    """Raises ``UsageError`` for what no other project's models have, beside what ``from_official`` refuses.

    Args:
        title: the project, "timm", "transformers", "torchvision" or "OpenMMLab".
    """

    def refuse(what: str) -> None:
        raise UsageError(f"{title} cannot hold this model: {what}.")

    if not config.patch_norm:
        refuse("its patch embedding always has a norm (patch_norm=False here)")
    if not config.qkv_bias and title == "torchvision":
        refuse("its query, key and value always have a bias (qkv_bias=False here)")
    if title == "torchvision":
        return
    if config.rank == 3:
        if title != "OpenMMLab":
            refuse("it has no Swin Transformer for video")
        return
    if title != "timm" and any(len(set(window)) > 1 for window in config.stage_windows):
        refuse(f"its windows are square, not {_windows(config.stage_windows)}")
    if title == "OpenMMLab":
        return
    if any(n % p for n, p in zip(config.img_size, config.patch_size, strict=True)):
        refuse(f"its maps leave out what is beyond whole patches (img_size {config.img_size}); pass --img-size")
    maps = _maps(config)
    built = {"timm": config.stage_windows, "transformers": (_window(config),) * len(maps)}[title]
    if title == "timm" or config.version == 2:  # these shrink a window to its map; the V1 of transformers does not
        built = tuple(tuple(map(min, window, size)) for window, size in zip(built, maps, strict=True))
    if built != config.stage_windows:
        refuse(
            f"at {format_size(config.img_size)} pixels it would build windows {_windows(built)}, the weights have "
            f"{_windows(config.stage_windows)}; pass --window or --img-size to fit them"
        )


def padding_note(title: str, config: SwinConfig) -> str:
    """A line where maps at the trained size are not whole windows and the project pads them otherwise; "" where not.

    Others let the padding take part in attention, as ours does with ``pad="legacy"``; timm pads after the shift.
    """
    pairs = zip(config.stage_maps(), config.stage_windows, strict=True)
    padded = any(n % w for size, window in pairs for n, w in zip(size, window, strict=True))
    if not padded or (config.pad == "legacy" and title != "timm"):
        return ""
    how = "after the shift" if title == "timm" else "and attends to the padding"
    return (
        f"at {format_size(config.img_size)} pixels some map is not whole windows: {title} pads it {how}, which this model "
        f"(pad='{config.pad}') does not, so outputs will differ there"
    )


def _maps(config: SwinConfig) -> list[Size]:
    """Maps as timm and transformers count them: an odd side loses its last token when it is halved."""
    first = [n // p for n, p in zip(config.img_size, config.patch_size, strict=True)]
    return [tuple(n // 2**stage for n in first) for stage in range(len(config.depths))]


def _window(config: SwinConfig) -> Size:
    """The largest window of a stage: the one that a model with a single setting has, and shrinks where a map is smaller."""
    return max(config.stage_windows)


def _windows(windows: tuple[Size, ...]) -> str:
    return ", ".join(map(format_size, windows))


def _plain(size: Size) -> int | list[int]:
    """One number for equal sides, as these projects write them."""
    return size[0] if len(set(size)) == 1 else list(size)


def transformers_record(config: SwinConfig, preprocessing: dict[str, Any], masked_stride: int = 0) -> dict[str, Any]:
    """``config.json`` of a transformers model with every field that its configuration class has.

    Args:
        preprocessing: its "classes" become the labels.
        masked_stride: pixels that one token of the decoder paints, for masked image modelling; 0: none.
    """
    name = "Swin" if config.version == 1 else "Swinv2"
    kind = "ForMaskedImageModeling" if masked_stride else "ForImageClassification" if config.num_classes else "Model"
    classes = preprocessing.get("classes") or [f"LABEL_{index}" for index in range(config.num_classes)]
    stages = [f"stage{stage + 1}" for stage in range(len(config.depths))]
    record: dict[str, Any] = {
        "architectures": [name + kind],
        "model_type": name.lower(),
        "image_size": _plain(config.img_size),
        "patch_size": _plain(config.patch_size),
        "num_channels": config.in_chans,
        "embed_dim": config.embed_dim,
        "hidden_size": config.num_features,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "num_layers": len(config.depths),
        "window_size": _window(config)[0],
        "mlp_ratio": float(config.mlp_ratio),
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": config.drop_rate,
        "attention_probs_dropout_prob": config.attn_drop_rate,
        "drop_path_rate": config.drop_path_rate,
        "hidden_act": "gelu",
        "use_absolute_embeddings": config.ape,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "encoder_stride": masked_stride or config.stage_strides()[-1][0],
        "stage_names": ["stem", *stages],
        "out_features": stages[-1:],
        "out_indices": [len(stages)],
    }
    if config.version == 2:
        record["pretrained_window_sizes"] = [window[0] for window in config.pretrained_window_sizes]
    if config.num_classes:
        record["id2label"] = {str(index): label for index, label in enumerate(classes)}
        record["label2id"] = {label: index for index, label in enumerate(classes)}
    return record


def transformers_preprocessor(config: SwinConfig, preprocessing: dict[str, Any]) -> dict[str, Any] | None:
    """``preprocessor_config.json``; None where mean and deviation are not known."""
    if not {"mean", "std"} <= preprocessing.keys():
        return None
    height, width = config.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }


def timm_record(config: SwinConfig, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of a timm model: the nearest of timm's own names, and every argument that makes it this one."""
    from swinscale.models.variants import VARIANTS

    def distance(name: str) -> tuple[bool, ...]:
        near = VARIANTS[name]
        fields = ("version", "embed_dim", "depths", "stage_windows", "img_size", "trained_windows")
        return tuple(getattr(near, field) != getattr(config, field) for field in fields)

    shrinks = config.small_map == "shrink"
    arguments: dict[str, Any] = {
        "img_size": list(config.img_size),
        "patch_size": _plain(config.patch_size),
        "window_size": [list(w) for w in (config.window_size if shrinks else config.stage_windows)],
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "mlp_ratio": float(config.mlp_ratio),
        "qkv_bias": config.qkv_bias,
        "proj_drop_rate": config.drop_rate,
        "attn_drop_rate": config.attn_drop_rate,
        "drop_path_rate": config.drop_path_rate,
    }
    if config.version == 2:
        arguments["pretrained_window_sizes"] = [list(window) for window in config.pretrained_window_sizes]
    settings: dict[str, Any] = {
        "input_size": [config.in_chans, *config.img_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": preprocessing.get("crop_ratio", 1.0),
        "pool_size": list(_maps(config)[-1]),
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "num_classes": config.num_classes,
    }
    settings |= {name: list(preprocessing[name]) for name in ("mean", "std") if name in preprocessing}
    record: dict[str, Any] = {
        "architecture": min(TIMM_MODELS, key=distance),
        "num_classes": config.num_classes,
        "num_features": config.num_features,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": settings,
    }
    if preprocessing.get("classes"):
        record["label_names"] = list(preprocessing["classes"])
    return record
