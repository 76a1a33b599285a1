"""Street scenes of CamVid, in the split with 11 classes of the SegNet authors, for two CPU cores; and any other small data set.

``CAMVID`` is a folder with ``train``, ``trainannot``, ``val``, ``valannot``, ``test`` and ``testannot``. For other images and maps leave
the settings of CamVid out: ``swinscale train desk_upernet_swinv2 --data PATH``.
"""

from __future__ import annotations

from dataclasses import replace

from swinscale.heads.config import SegmentConfig
from swinscale.models import model_config
from swinscale.optim import OptimConfig
from swinscale.recipes.base import DataConfig, Recipe
from swinscale.recipes.parts import dense_model
from swinscale.recipes.segmentation import SegmentationDataConfig
from swinscale.tasks import SimMIMConfig
from swinscale.train import TrainConfig

_SMALL = SegmentationDataConfig(crop=(224, 224), short=224, long=896)
_NARROW = SegmentConfig(channels=64, aux_channels=32, test_short=224, test_long=896)
_CAMVID = replace(
    _SMALL, classes="camvid", ignore_index=11, eval_split="test", crop=(240, 320), short=240, long=320, max_share=0.75,
)  # fmt: skip


def _adamw(lr: float, warmup_epochs: float, layer_decay: float = 1.0) -> OptimConfig:
    low = lr / 100
    return OptimConfig(
        lr=lr, lr_scaling="none", warmup_lr=low, min_lr=low, schedule="linear", warmup_epochs=warmup_epochs,
        layer_decay=layer_decay,
    )  # fmt: skip


def _desk(name: str, model: str) -> Recipe:
    train = TrainConfig(epochs=30, batch_size=8, optim=_adamw(1e-3, 1), num_workers=2, eval_every=5, checkpoint_every=5)
    return Recipe(name, dense_model(model, 0.1, img_size=224), _NARROW, _SMALL, train)


def desk_upernet_swin() -> Recipe:
    """swinscale train desk_upernet_swin --data PATH — UPerNet with a small V1 on any images with label maps, for two CPU cores."""
    return _desk("desk_upernet_swin", "swin_nano_patch4_window7_112")


def desk_upernet_swinv2() -> Recipe:
    """swinscale train desk_upernet_swinv2 --data PATH — UPerNet with a small V2 on any images with label maps, for two CPU cores."""
    return _desk("desk_upernet_swinv2", "swinv2_nano_window8_128")


def camvid_simmim() -> Recipe:
    """SimMIM on CamVid's training images, at 128 × 160: the start of ``camvid_upernet``.

    swinscale train camvid_simmim --data CAMVID — its length on two cores is in docs/segmentation.md.
    """
    model = model_config("swinv2_nano_window8_128", img_size=(128, 160), num_classes=0, drop_path_rate=0.0)
    train = TrainConfig(
        epochs=80, batch_size=16, optim=replace(_adamw(1e-3, 5), schedule="cosine"), num_workers=1, eval_every=0,
        checkpoint_every=10,
    )  # fmt: skip
    return Recipe("camvid_simmim", model, SimMIMConfig(mask_patch=16), DataConfig(), train)


def camvid_upernet() -> Recipe:
    """UPerNet with a small V2 on CamVid at half its size, evaluated on the test images at full size.

    swinscale train camvid_upernet --data CAMVID [--init runs/camvid_simmim/last] — its length on two cores is in docs/segmentation.md.
    """
    task = replace(_NARROW, test_short=240, test_long=320)
    train = TrainConfig(epochs=30, batch_size=8, optim=_adamw(1e-3, 2), num_workers=1, eval_every=0, checkpoint_every=2)
    return Recipe(
        "camvid_upernet", dense_model("swinv2_nano_window8_128", 0.1, img_size=(240, 320)), task, _CAMVID, train
    )


def camvid_upernet_tiny() -> Recipe:
    """swinscale train camvid_upernet_tiny --data CAMVID — with the width and depth of Swin V2-T and heads of 128 channels.

    For a GPU; on two CPU cores with ``--overfit 8``.
    """
    recipe = camvid_upernet()
    task = replace(_NARROW, channels=128, aux_channels=64, test_short=240, test_long=320)
    return replace(
        recipe,
        name="camvid_upernet_tiny",
        model=dense_model("swinv2_tiny_window8_256", 0.2, img_size=(240, 320)),
        task=task,
    )
