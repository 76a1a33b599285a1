"""Published weight files: what they are, where they come from, and what was published about them.

A file is known by its name. No project publishes hashes in a list; torchvision and OpenMMLab write the first eight digits
of a file's SHA-256 into its name, which is checked when such a file is read. The other files have no published hash.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from swinscale.errors import UsageError
from swinscale.weights.filenames import telling_name
from swinscale.weights.hashes import sha256

MICROSOFT = "github.com/microsoft/Swin-Transformer"
SIMMIM = "github.com/microsoft/SimMIM"
TORCHVISION = "github.com/pytorch/vision"
VIDEO_SWIN = "github.com/SwinTransformer/Video-Swin-Transformer"
MMACTION = "github.com/open-mmlab/mmaction2"


@dataclass(frozen=True)
class Published:
    """A published file.

    Args:
        name: its name without extension, in lower case with ``_`` between the words.
        model: the name here (``swinscale list``).
        source: the project that published it.
        licence: of the weights, as that project's repository states it. Data sets have terms of their own.
        data: what it was trained with.
        img_size: pixels.
        windows: of the attention, and the trained one before it where the weights were transferred.
        top1, top5: published accuracy in per cent on ``data``'s last set; None where none was published.
        top1_v2: on ImageNet-V2.
    """

    name: str
    model: str
    source: str
    licence: str
    data: str
    img_size: int
    windows: str
    top1: float | None
    top5: float | None = None
    top1_v2: float | None = None


IN1K, IN22K = "ImageNet-1K", "ImageNet-22K"
K400, K600, K700, SSV2 = "Kinetics-400", "Kinetics-600", "Kinetics-700", "Something-Something V2"
TO_1K = f"{IN22K}, then {IN1K}"
VIDEO = "swin3d_{}_patch244_window{}_224"
"""Names of video models here."""


Accuracy = tuple[float | None, float | None]
"""Top-1 and top-5 in per cent."""

NONE: Accuracy = (None, None)
IMAGENET_V2 = {
    "swin_base_patch4_window12_384_22kto1k": 76.58,
    "swin_large_patch4_window12_384_22kto1k": 77.46,
    "swinv2_base_patch4_window12to24_192to384_22kto1k_ft": 78.08,
    "swinv2_large_patch4_window12to24_192to384_22kto1k_ft": 78.31,
}
"""Top-1 on ImageNet-V2 (arXiv 2111.09883, table 2)."""


def _microsoft() -> list[Published]:
    """(file name without extension, model, data, accuracy) of the tables of microsoft/Swin-Transformer (MODELHUB.md)."""
    v1, v2 = "swin_{}_patch4_window{}_{}", "swinv2_{}_window{}_{}"
    rows: list[tuple[str, str, str, Accuracy]] = []
    for size, window, image, own, large in (
        ("tiny", 7, 224, (81.2, 95.5), (80.9, 96.0)),
        ("small", 7, 224, (83.2, 96.2), (83.2, 97.0)),
        ("base", 7, 224, (83.5, 96.5), (85.2, 97.5)),
        ("base", 12, 384, (84.5, 97.0), (86.4, 98.0)),
        ("large", 7, 224, None, (86.3, 97.9)),
        ("large", 12, 384, None, (87.3, 98.2)),
    ):
        model = v1.format(size, window, image)
        rows += [(model, model, IN1K, own)] if own else []
        rows += [(f"{model}_22k", model, IN22K, NONE), (f"{model}_22kto1k", model, TO_1K, large)]
        rows += [(f"{model}_22kto1k_finetune", model, TO_1K, large)] if size in ("tiny", "small") else []
    rows.append(("swin_tiny_c24_patch4_window8_256",) * 2 + (IN1K, (81.6, 95.7)))
    for size, window, accuracy in (
        ("tiny", 8, (81.8, 95.9)),
        ("tiny", 16, (82.8, 96.2)),
        ("small", 8, (83.7, 96.6)),
        ("small", 16, (84.1, 96.8)),
        ("base", 8, (84.2, 96.9)),
        ("base", 16, (84.6, 97.0)),
    ):
        rows.append((f"swinv2_{size}_patch4_window{window}_256", v2.format(size, window, 256), IN1K, accuracy))
    for size, at_256, at_384 in (("base", (86.2, 97.9), (87.1, 98.2)), ("large", (86.9, 98.0), (87.6, 98.3))):
        rows.append((f"swinv2_{size}_patch4_window12_192_22k", f"swinv2_{size}_window12_192", IN22K, NONE))
        for change, accuracy in (("window12to16_192to256", at_256), ("window12to24_192to384", at_384)):
            rows.append((f"swinv2_{size}_patch4_{change}_22kto1k_ft", f"swinv2_{size}_{change}", TO_1K, accuracy))
    return [_of_microsoft(MICROSOFT, *row) for row in rows]


def _simmim() -> list[Published]:
    """Fine-tuned models of the table of microsoft/SimMIM; a name is that of the configuration."""
    name, data = "simmim_finetune__swin_{}__{}ep", "SimMIM on {} for {} epochs, then {}"
    rows = (
        ("base__img192_window6", 100, "swin_base_patch4_window6_192", 82.8),
        ("base__img224_window7", 100, "swin_base_patch4_window7_224", 83.5),
        ("base__img224_window7", 800, "swin_base_patch4_window7_224", 84.0),
        ("large__img224_window14", 800, "swin_large_patch4_window14_224", 85.4),
    )
    return [
        _of_microsoft(SIMMIM, name.format(size, epochs), model, data.format(IN1K, epochs, IN1K), (top1, None))
        for size, epochs, model, top1 in rows
    ]


def _of_microsoft(source: str, name: str, model: str, data: str, accuracy: Accuracy) -> Published:
    pixels = int(re.findall(r"\d{3}", model)[-1])
    return Published(name, model, source, "MIT", data, pixels, _window(model), *accuracy, IMAGENET_V2.get(name))


def _window(model: str) -> str:
    found = re.search(r"window(\d+)(?:to(\d+))?", model)
    return "" if found is None else f"{found[2]} (trained with {found[1]})" if found[2] else found[1]


def _torchvision() -> list[Published]:
    rows = [
        ("swin_t", "swin_tiny_patch4_window7_224", IN1K, 224, "7", 81.474, 95.776),
        ("swin_s", "swin_small_patch4_window7_224", IN1K, 224, "7", 83.196, 96.360),
        ("swin_b", "swin_base_patch4_window7_224", IN1K, 224, "7", 83.582, 96.640),
        ("swin_v2_t", "swinv2_tiny_window8_256", IN1K, 256, "8", 82.072, 96.132),
        ("swin_v2_s", "swinv2_small_window8_256", IN1K, 256, "8", 83.712, 96.816),
        ("swin_v2_b", "swinv2_base_window8_256", IN1K, 256, "8", 84.112, 96.864),
        ("swin3d_t", VIDEO.format("tiny", 877), f"{IN1K}, then {K400}", 224, "8×7×7", 77.715, 93.519),
        ("swin3d_s", VIDEO.format("small", 877), f"{IN1K}, then {K400}", 224, "8×7×7", 79.521, 94.158),
        ("swin3d_b_1k", VIDEO.format("base", 877), f"{IN1K}, then {K400}", 224, "8×7×7", 79.427, 94.386),
        ("swin3d_b_22k", VIDEO.format("base", 877), f"{IN22K}, then {K400}", 224, "8×7×7", 81.643, 95.574),
    ]
    return [Published(name, model, TORCHVISION, "BSD-3-Clause", *rest) for name, model, *rest in rows]  # type: ignore[arg-type]


def _video() -> list[Published]:
    """The tables of Video-Swin (README.md), whose files are called as its configurations, and of mmaction2."""
    theirs, mm = "swin_{}_patch244_window{}_{}", "swin_{}_p244_w877_{}_pre_{}xb8_amp_32x2x1_30e_{}_rgb"
    rows = [
        (VIDEO_SWIN, theirs.format("tiny", 877, "kinetics400_1k"), "tiny", 877, f"{IN1K}, then {K400}", (78.8, 93.6)),
        (VIDEO_SWIN, theirs.format("small", 877, "kinetics400_1k"), "small", 877, f"{IN1K}, then {K400}", (80.6, 94.5)),
        (VIDEO_SWIN, theirs.format("base", 877, "kinetics400_1k"), "base", 877, f"{IN1K}, then {K400}", (80.6, 94.6)),
        (VIDEO_SWIN, theirs.format("base", 877, "kinetics400_22k"), "base", 877, f"{IN22K}, then {K400}", (82.7, 95.5)),
        (VIDEO_SWIN, theirs.format("base", 1677, "kinetics400_22k"), "base", 1677, f"{IN22K}, then {K400}", NONE),
        (VIDEO_SWIN, theirs.format("base", 877, "kinetics600_22k"), "base", 877, f"{IN22K}, then {K600}", (84.0, 96.5)),
        (
            VIDEO_SWIN,
            theirs.format("base", 1677, "sthv2"),
            "base",
            1677,
            f"{IN22K}, then {K400}, then {SSV2}",
            (69.6, 92.7),
        ),
        (MMACTION, mm.format("tiny", "in1k", 8, "kinetics400"), "tiny", 877, f"{IN1K}, then {K400}", (78.90, 93.77)),
        (MMACTION, mm.format("small", "in1k", 8, "kinetics400"), "small", 877, f"{IN1K}, then {K400}", (80.54, 94.46)),
        (MMACTION, mm.format("base", "in1k", 8, "kinetics400"), "base", 877, f"{IN1K}, then {K400}", (80.57, 94.49)),
        (
            MMACTION,
            mm.format("large", "in22k", 8, "kinetics400"),
            "large",
            877,
            f"{IN22K}, then {K400}",
            (83.46, 95.91),
        ),
        (
            MMACTION,
            mm.format("large", "in22k", 16, "kinetics700"),
            "large",
            877,
            f"{IN22K}, then {K700}",
            (75.92, 92.72),
        ),
    ]
    windows = {877: "8×7×7", 1677: "16×7×7"}
    return [
        Published(name, VIDEO.format(size, window), source, "Apache-2.0", data, 224, windows[window], *accuracy)
        for source, name, size, window, data, accuracy in rows
    ]


PUBLISHED = [*_microsoft(), *_simmim(), *_torchvision(), *_video()]
_BY_NAME = {entry.name: entry for entry in PUBLISHED}
_CARRIES_HASH = re.compile(r"(?i).*swin.*-([0-9a-f]{8})\.pth")
_DATED = re.compile(r"_20\d{6}(_\d{6})?-[0-9a-f]{8}\.pth$")  # OpenMMLab's names: _20210616_090925-66df6be6.pth


def published(path: str | os.PathLike[str]) -> Published | None:
    """What was published about a file of this name; copies of timm, transformers and OpenMMLab count as their originals."""
    name = re.sub(r"[-.]", "_", re.sub(r"-[0-9a-f]{8}$", "", telling_name(path).lower()))
    name = re.sub(r"^(microsoft|timm)__?", "", name)
    timm = re.fullmatch(r"(swin(?:v2)?)_(.*?)_ms_(in1k|in22k|in22k_ft_in1k)", name)
    if timm:
        middle = timm[2] if timm[1] == "swin" else re.sub(r"^([a-z]+)_", r"\1_patch4_", timm[2])
        middle = middle.removesuffix("_22k")
        tuned = "_22kto1k" if timm[1] == "swin" else "_22kto1k_ft"
        name = f"{timm[1]}_{middle}" + {"in1k": "", "in22k": "_22k", "in22k_ft_in1k": tuned}[timm[3]]
    name = re.sub(r"_in22k$", "_22k", name)
    return _BY_NAME.get(name) or _BY_NAME.get(_of_openmmlab(name))


def _of_openmmlab(name: str) -> str:
    """``swinv2_base_w16_in21k_pre_3rdparty_in1k_256px_20220803`` → the name of the file that it was made from."""
    found = re.fullmatch(r"swinv2_(\w+?)_w(\d+)_(in21k_pre_)?3rdparty_(in1k|in21k)_(\d{3})px(?:_\d+)?", name)
    if found is None:
        return re.sub(r"_20\d{6}$", "", name)
    size, window, pre, data, image = found.groups()
    if pre:
        return f"swinv2_{size}_patch4_window12to{window}_192to{image}_22kto1k_ft"
    return f"swinv2_{size}_patch4_window{window}_{image}" + ("_22k" if data == "in21k" else "")


def name_hash(path: Path) -> str | None:
    """The first digits of a SHA-256 in the name of a published file, as torchvision and OpenMMLab write them."""
    found = _CARRIES_HASH.fullmatch(path.name)
    if found is None or not (_DATED.search(path.name) or published(path)):
        return None
    return found[1].lower()


def check_hash(path: Path) -> None:
    """Raises ``UsageError`` for a published file that is not what its name says."""
    expected = name_hash(path)
    if expected is None:
        return
    found = sha256(path)
    if not found.startswith(expected):
        raise UsageError(
            f"{path} is not the published file: its name says that its SHA-256 begins with {expected}, but it begins with "
            f"{found[:8]}. Download it again, or give a file that you changed another name."
        )
