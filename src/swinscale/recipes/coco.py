"""COCO detection and instance segmentation with the published hyper-parameters.

Sources: SwinTransformer/Swin-Transformer-Object-Detection (Mask and Cascade R-CNN), the appendix of the V1 article (HTC++), the V2
article (its ablation, HTC++ of L and G). Measures are the published ones; none of these runs was done with this code. ``COCO``
is a folder in COCO's layout and ``FILE`` a classifier pre-trained on ImageNet, or another detector.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from swinscale.heads.config import DetectConfig
from swinscale.models import SwinConfig
from swinscale.optim import OptimConfig
from swinscale.recipes.base import Recipe
from swinscale.recipes.detection import DetectionDataConfig
from swinscale.recipes.parts import dense_model
from swinscale.recipes.simmim import GIANT_MEMORY
from swinscale.train import TrainConfig

IMAGES = 118_287
"""Of COCO's training set."""
MASK_RCNN = DetectConfig()
CASCADE = DetectConfig(
    head="cascade", box_loss="giou", rpn_box_loss="smooth_l1", anchors_inside=True,
    proposals=(2000, 1000), proposals_per_level=(2000, 1000),
)  # fmt: skip
HTC = replace(CASCADE, head="htc", box_loss="smooth_l1", class_agnostic=True, semantic=True)
HTC_PLUS = replace(HTC, global_attention=True, soft_nms="linear", score=0.001)
CROP = DetectionDataConfig()
MULTISCALE = DetectionDataConfig(augment="multiscale")


def _adamw(lr: float, batch: int, milestones: tuple[float, ...], images: int = IMAGES, **more: Any) -> OptimConfig:
    """AdamW at ``lr`` for this batch, 500 steps of warm-up, a tenth after each milestone, no clipping."""
    warmup = 500 / (images // batch)
    return OptimConfig(
        lr=lr, lr_reference_batch=batch, lr_scaling="linear", warmup_lr=lr / 1000, min_lr=0.0, schedule="multistep",
        warmup_epochs=warmup, milestones=milestones, clip_grad=0.0, **more,
    )  # fmt: skip


def _train(epochs: float, batch: int = 16, lr: float = 1e-4, **more: Any) -> TrainConfig:
    """12 epochs ("1×") with drops after 8 and 11, 36 ("3×") after 27 and 33, 72 ("6×") after 63 and 69."""
    milestones = {12: (8.0, 11.0), 36: (27.0, 33.0), 72: (63.0, 69.0)}[round(epochs)]
    optim = _adamw(lr, batch, milestones, **more)
    return TrainConfig(epochs=epochs, batch_size=batch, optim=optim, num_workers=4, eval_every=1)


def mask_rcnn_swin_tiny_1x() -> Recipe:
    """swinscale train mask_rcnn_swin_tiny_1x --data COCO --init FILE — 8 GPUs × 2; 43.7 box, 39.8 mask AP (published)."""
    model = dense_model("swin_tiny_patch4_window7_224", 0.1)
    return Recipe("mask_rcnn_swin_tiny_1x", model, MASK_RCNN, CROP, _train(12))


def mask_rcnn_swin_tiny_3x() -> Recipe:
    """swinscale train mask_rcnn_swin_tiny_3x --data COCO --init FILE — 8 GPUs × 2; 46.0 box, 41.6 mask AP (published)."""
    model = dense_model("swin_tiny_patch4_window7_224", 0.2)
    return Recipe("mask_rcnn_swin_tiny_3x", model, MASK_RCNN, CROP, _train(36))


def mask_rcnn_swin_small_3x() -> Recipe:
    """swinscale train mask_rcnn_swin_small_3x --data COCO --init FILE — 8 GPUs × 2; 48.5 box, 43.3 mask AP (published)."""
    model = dense_model("swin_small_patch4_window7_224", 0.2)
    return Recipe("mask_rcnn_swin_small_3x", model, MASK_RCNN, CROP, _train(36))


def mask_rcnn_swinv2_tiny() -> Recipe:
    """swinscale train mask_rcnn_swinv2_tiny --data COCO --init FILE — Swin V2-T with window 16, 3×; 8 GPUs × 2.

    FILE is a V2-T of 256 pixels and window 8 (or another); its position bias keeps its values at window 16. No measure is
    published for this combination.
    """
    model = dense_model("swinv2_tiny_window8_256", 0.2, window=16)
    return Recipe("mask_rcnn_swinv2_tiny", model, MASK_RCNN, CROP, _train(36))


def cascade_swin_tiny_1x() -> Recipe:
    """swinscale train cascade_swin_tiny_1x --data COCO --init FILE — 8 GPUs × 2; 48.1 box, 41.7 mask AP (published)."""
    model = dense_model("swin_tiny_patch4_window7_224", 0.0)
    return Recipe("cascade_swin_tiny_1x", model, CASCADE, CROP, _train(12))


def cascade_swin_tiny_3x() -> Recipe:
    """swinscale train cascade_swin_tiny_3x --data COCO --init FILE — 8 GPUs × 2; 50.4 box, 43.7 mask AP (published)."""
    model = dense_model("swin_tiny_patch4_window7_224", 0.2)
    return Recipe("cascade_swin_tiny_3x", model, CASCADE, CROP, _train(36))


def cascade_swin_small_3x() -> Recipe:
    """swinscale train cascade_swin_small_3x --data COCO --init FILE — 8 GPUs × 2; 51.9 box, 45.0 mask AP (published)."""
    model = dense_model("swin_small_patch4_window7_224", 0.2)
    return Recipe("cascade_swin_small_3x", model, CASCADE, CROP, _train(36))


def cascade_swin_base_3x() -> Recipe:
    """swinscale train cascade_swin_base_3x --data COCO --init FILE — 8 GPUs × 2; 51.9 box, 45.0 mask AP (published)."""
    model = dense_model("swin_base_patch4_window7_224", 0.3)
    return Recipe("cascade_swin_base_3x", model, CASCADE, CROP, _train(36))


def _ablation(name: str, model: str, window: int) -> Recipe:
    """The V2 article's ablation: Cascade R-CNN, short side 480 to 800, 3×, from a V2 of 256 pixels and window 8."""
    return Recipe(name, dense_model(model, 0.2, window), CASCADE, MULTISCALE, _train(36))


def cascade_swinv2_tiny_window16() -> Recipe:
    """swinscale train cascade_swinv2_tiny_window16 --data COCO --init FILE — 8 GPUs × 2; 51.1 box AP (published)."""
    return _ablation("cascade_swinv2_tiny_window16", "swinv2_tiny_window8_256", 16)


def cascade_swinv2_tiny_window32() -> Recipe:
    """swinscale train cascade_swinv2_tiny_window32 --data COCO --init FILE — 8 GPUs × 2; 51.8 box AP (published)."""
    return _ablation("cascade_swinv2_tiny_window32", "swinv2_tiny_window8_256", 32)


def cascade_swinv2_small_window16() -> Recipe:
    """swinscale train cascade_swinv2_small_window16 --data COCO --init FILE — 8 GPUs × 2; measures not in our sources."""
    return _ablation("cascade_swinv2_small_window16", "swinv2_small_window8_256", 16)


def cascade_swinv2_base_window16() -> Recipe:
    """swinscale train cascade_swinv2_base_window16 --data COCO --init FILE — 8 GPUs × 2; measures not in our sources."""
    return _ablation("cascade_swinv2_base_window16", "swinv2_base_window8_256", 16)


def _htc_v1(name: str, model: str, epochs: float) -> Recipe:
    """HTC++ of the V1 article: InstaBoost, short side 400 to 1400, soft-NMS, one global attention, stochastic depth 0.2.

    Evaluated at 1600 × 1400 (ViT-Adapter's reproduction).
    """
    sizes = tuple(range(400, 1401, 50))
    data = replace(MULTISCALE, short=sizes, long=1600, paste=0.5, test_short=1400, test_long=1600)
    return Recipe(name, dense_model(model, 0.2), HTC_PLUS, data, _train(epochs))


def htc_swin_base_6x() -> Recipe:
    """swinscale train htc_swin_base_6x --data COCO --init FILE — from ImageNet-22K; 56.4 box, 49.1 mask AP (published)."""
    return _htc_v1("htc_swin_base_6x", "swin_base_patch4_window7_224", 72)


def htc_swin_large_3x() -> Recipe:
    """swinscale train htc_swin_large_3x --data COCO --init FILE — from ImageNet-22K; 57.1 box, 49.5 mask AP (published).

    With task.test_short=(600,800,1000,1200,1400,1600) task.test_long=3000 task.test_flip=true: 58.0 and 50.4 (published).
    """
    return _htc_v1("htc_swin_large_3x", "swin_large_patch4_window7_224", 36)


def _htc_v2(model: SwinConfig, name: str, train: TrainConfig, **task: Any) -> Recipe:
    """HTC++ of the V2 article: crops of 1536 with scales 0.1 to 2, window 32, tested at 1100."""
    data = DetectionDataConfig(
        augment="large-scale-jitter", jitter_size=(1536, 1536), jitter=(0.1, 2.0), paste=0.5, test_short=1100,
        test_long=1830,
    )  # fmt: skip
    return Recipe(name, model, replace(HTC_PLUS, **task), data, train)


def htc_swinv2_large() -> Recipe:
    """swinscale train htc_swinv2_large --data COCO --init FILE — from 22K at 192/12; 58.8 box, 51.1 mask AP (published).

    3×, batch 64, rate 4e-4, a tenth of it in the backbone. Evaluated with window 48 (``swinscale eval --window 48``): 58.9 and
    51.2; and at several scales: 60.2 and 52.1 (published).
    """
    model = dense_model("swinv2_large_window12_192", 0.2, window=32, img_size=1536)
    train = replace(_train(36, 64, 4e-4, backbone_lr=0.1), micro_batch=1, memory=GIANT_MEMORY)
    return _htc_v2(model, "htc_swinv2_large", train)


def _giant(name: str, steps: int, images: int, batch: int, lr: float, **task: Any) -> Recipe:
    model = dense_model("swinv2_giant_window12_192", 0.3, window=32, img_size=1536)
    epochs = steps * batch / images
    optim = _adamw(lr, batch, (epochs * 27 / 36, epochs * 33 / 36), images, backbone_lr=0.1)
    train = TrainConfig(epochs, batch, 1, optim, num_workers=4, eval_every=0, checkpoint_every=0.2, memory=GIANT_MEMORY)
    return _htc_v2(model, name, train, **task)


def htc_swinv2_giant_objects365() -> Recipe:
    """Swin V2-G, first step of the article: Objects365 v2, boxes alone, 67,500 steps of 96 images, window 32.

    torchrun … -m swinscale train htc_swinv2_giant_objects365 --data OBJECTS365 --init DIRECTORY — short sides 800 to 1024.
    The semantic branch, which needs masks, is left out. Drops of the rate as in 3×, a tenth of it in the backbone as for L: neither
    is published.
    """
    recipe = _giant(
        "htc_swinv2_giant_objects365", 67_500, 1_742_289, 96, 1.2e-3, masks=False, semantic=False, score=0.001
    )
    data = replace(MULTISCALE, short=tuple(range(800, 1025, 32)), long=1707, test_short=1024, test_long=1707)
    return replace(recipe, data=data)


def htc_swinv2_giant() -> Recipe:
    """Swin V2-G on COCO after Objects365: 45,000 steps, crops of 1536; 61.7 box, 53.3 mask AP (published).

    torchrun … -m swinscale train htc_swinv2_giant --data COCO --init runs/htc_swinv2_giant_objects365/last — mask branch new.
    With window 48 (``swinscale eval --window 48``) 61.9 and 53.4, at several scales 62.5 and 53.7 (published).
    """
    return _giant("htc_swinv2_giant", 45_000, IMAGES, 96, 6e-4)


def _desk(name: str, model: str, task: DetectConfig) -> Recipe:
    """Two CPU cores and minutes: small backbones, pictures of 192 pixels, narrow heads, smaller anchors."""
    small = replace(
        task, channels=64, fc_channels=256, anchor_scale=4.0, regions=64, proposals=(300, 200),
        proposals_per_level=(300, 200),
    )  # fmt: skip
    data = DetectionDataConfig(augment="multiscale", short=(160, 192, 224), long=336, test_short=192, test_long=288)
    optim = OptimConfig(lr=5e-4, lr_scaling="none", warmup_lr=5e-6, min_lr=5e-6, warmup_epochs=1, weight_decay=0.05)
    train = TrainConfig(epochs=30, batch_size=4, optim=optim, num_workers=2, eval_every=0, checkpoint_every=2)
    return Recipe(name, dense_model(model, 0.1, img_size=192), small, data, train)


def desk_mask_rcnn_swin() -> Recipe:
    """swinscale train desk_mask_rcnn_swin --data COCO — Mask R-CNN with a small V1, for two CPU cores."""
    return _desk("desk_mask_rcnn_swin", "swin_nano_patch4_window7_112", MASK_RCNN)


def desk_mask_rcnn_swinv2() -> Recipe:
    """swinscale train desk_mask_rcnn_swinv2 --data COCO — Mask R-CNN with a small V2, for two CPU cores."""
    return _desk("desk_mask_rcnn_swinv2", "swinv2_nano_window8_128", MASK_RCNN)


def desk_cascade_swin() -> Recipe:
    """swinscale train desk_cascade_swin --data COCO — Cascade Mask R-CNN with a small V1, for two CPU cores."""
    return _desk("desk_cascade_swin", "swin_nano_patch4_window7_112", CASCADE)


def desk_cascade_swinv2() -> Recipe:
    """swinscale train desk_cascade_swinv2 --data COCO — Cascade Mask R-CNN with a small V2, for two CPU cores."""
    return _desk("desk_cascade_swinv2", "swinv2_nano_window8_128", CASCADE)


def desk_htc_swin() -> Recipe:
    """swinscale train desk_htc_swin --data COCO — HTC++ with a small V1, for two CPU cores."""
    return _desk("desk_htc_swin", "swin_nano_patch4_window7_112", HTC_PLUS)


def desk_htc_swinv2() -> Recipe:
    """swinscale train desk_htc_swinv2 --data COCO — HTC++ with a small V2, for two CPU cores."""
    return _desk("desk_htc_swinv2", "swinv2_nano_window8_128", HTC_PLUS)
