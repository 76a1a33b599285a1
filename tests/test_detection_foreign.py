"""Detectors of OpenMMLab and of the published Swin code in use: the same detections, evaluation, and training that starts from them.

The files are written here under the published names (R-DOWN-3, R-CKPT-1, R-CKPT-2).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coco_files import rectangles
from random_models import randomise
from small_detectors import DENSE
from swinscale.cli import main
from swinscale.config import override
from swinscale.data.detection_transforms import detection_eval_transform
from swinscale.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from swinscale.detection import DetectionPipeline, coco_names, load_detection
from swinscale.heads.config import DetectConfig
from swinscale.heads.detector import Detector
from swinscale.inference import task_of
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.recipes import coco, get_recipe
from swinscale.recipes.base import build
from swinscale.tasks.detect import Detect
from swinscale.weights.detectors import detector_to_mm

SWIN: dict[str, Any] = {**DENSE, "version": 1, "pad": "legacy", "window_size": 7}
NARROW: dict[str, Any] = {"channels": 16, "fc_channels": 32}
LOOK: dict[str, Any] = {"test_short": (96,), "test_long": 160}
KINDS = {"mask_rcnn": coco.MASK_RCNN, "cascade": coco.CASCADE}
DOG = 16
REAL = Path(__file__).parents[2] / "shared" / "data" / "coco"


def published(
    path: Path, kind: str = "mask_rcnn", classes: int = 80, layout: Any = "official-dense", **meta: Any
) -> Detector:
    """Writes a random V1 detector as a published file, settings and all; most that it sees are dogs. Returns it."""
    config = dataclasses.replace(KINDS[kind], **NARROW)
    return write(Detector(SwinTransformer(SwinConfig(**SWIN)), classes, config), path, layout, **meta)


def write(model: Detector, path: Path, layout: Any = "official-dense", **meta: Any) -> Detector:
    randomise(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("rpn.", "roi.", "fpn.")) and parameter.ndim > 1:
                parameter.mul_(0.3)
        for head in model.roi.box_heads:  # type: ignore[union-attr]
            head.classify.bias[min(DOG, model.num_classes - 1)] += 4  # type: ignore[index, union-attr, operator]
    torch.save({"state_dict": detector_to_mm(dict(model.state_dict()), layout), "meta": meta}, path)
    return model


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (70, 92, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("layout", ["official-dense", "mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_file_finds_what_the_detector_found(kind: str, layout: str, photo: Path, tmp_path: Path) -> None:
    """Boxes, scores, classes and masks within 1e-5 of the detector that the file was written from."""
    model = published(tmp_path / "detector.pth", kind, layout=layout)
    theirs = load_detection(tmp_path / "detector.pth", **LOOK)
    settings = {"test_short", "test_long"}
    found = {n: v for n, v in dataclasses.asdict(theirs.task.config).items() if n not in settings}
    assert found == {n: v for n, v in dataclasses.asdict(model.config).items() if n not in settings}
    assert theirs.classes == coco_names(80) and theirs.classes[DOG] == "dog"
    assert theirs.task.backbone.config.pad == "legacy" and theirs.task.backbone.config.small_map == "pad"
    model.config = dataclasses.replace(model.config, **LOOK)
    task = Detect(model, coco_names(80)).eval()
    ours = DetectionPipeline(task, detection_eval_transform(IMAGENET_MEAN, IMAGENET_STD, None))
    picture = ours.read(photo)
    [expected], [seen] = ours([picture]), theirs([picture])
    assert len(expected) > 3 and DOG in expected.labels
    assert torch.equal(seen.labels, expected.labels)
    for name in ("boxes", "scores", "masks"):
        torch.testing.assert_close(getattr(seen, name), getattr(expected, name), rtol=0, atol=1e-5)


def test_the_command_line_takes_a_published_file(photo: Path, tmp_path: Path, capsys: Any) -> None:
    """predict draws and names what is there, eval gives COCO's measures, info says what it is."""
    path = tmp_path / "mask_rcnn.pth"
    published(path)
    assert task_of(path) == "detect"
    use = ["--weights", str(path), "--scales", "96", "--device", "cpu"]
    assert main(["predict", str(photo), *use, "--out", str(tmp_path / "drawn"), "--score", "0.1"]) == 0
    assert "dog 0." in capsys.readouterr().out
    assert Image.open(tmp_path / "drawn" / "photo_detected.png").size[0] >= 92
    data = rectangles(tmp_path / "coco", 3)
    file = data / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(coco_names(80))]
    file.write_text(json.dumps(content))
    assert main(["eval", *use, "--data", str(data), "--split", "train"]) == 0
    assert "3 images" in capsys.readouterr().out
    assert main(["info", str(path)]) == 0
    assert "object detection: Mask R-CNN, 80 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "meta", [{"CLASSES": ("dog", "cat")}, {"dataset_meta": {"classes": ["dog", "cat"], "palette": [[1, 2, 3]]}}]
)
def test_the_file_says_its_classes(meta: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    """OpenMMLab's versions 2 and 3 keep the names in different places; without them classes are numbers."""
    published(tmp_path / "pets.pth", classes=2, **meta)
    assert load_detection(tmp_path / "pets.pth").classes == ["dog", "cat"]
    data = rectangles(tmp_path / "coco", 3)
    use = ["--scales", "96", "--device", "cpu", "--data", str(data), "--split", "train"]
    assert main(["eval", "--weights", str(tmp_path / "pets.pth"), *use]) == 0
    published(tmp_path / "nameless.pth", classes=2, CLASSES=("dog", "cat", "elk"))
    assert load_detection(tmp_path / "nameless.pth").classes == ["class 0", "class 1"]
    capsys.readouterr()
    assert main(["eval", "--weights", str(tmp_path / "nameless.pth"), *use]) == 2
    assert "Evaluate on annotations with the same list" in capsys.readouterr().err


SETTINGS = (
    *("model.embed_dim=8", "model.depths=(1,1,1,1)", "model.num_heads=(1,1,2,2)", "model.window_size=7"),
    *("task.channels=16", "task.fc_channels=32", "task.regions=16", "data.short=(64,)", "data.long=96"),
    *("data.test_short=64", "data.test_long=96", "data.limit=2", "train.epochs=1", "train.num_workers=0"),
    *("train.optim.warmup_epochs=0", "train.device=cpu", "train.precision=fp32", "train.batch_size=2"),
)


@pytest.mark.parametrize("recipe", ["desk_mask_rcnn_swin", "desk_cascade_swin"])
def test_training_starts_from_a_published_file(recipe: str, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    """--init loads all but the last layers, which count other classes; the command says so, and the run goes on from there."""
    data = rectangles(tmp_path / "coco", 4)
    made = override(get_recipe(recipe), *SETTINGS, f"data.train={data}")
    assert isinstance(made.task, DetectConfig)
    model = write(Detector(SwinTransformer(made.model), 80, made.task), tmp_path / "file.pth")
    made = dataclasses.replace(made, init=str(tmp_path / "file.pth"))
    built = build(made)
    own, there = built.task.state_dict(), model.state_dict()
    counted = tuple(f"{head}.{s}.{layer}" for s in range(3) for head, layer in
                    (("roi.box_heads", "classify"), ("roi.box_heads", "regress"), ("roi.mask_heads", "predict")))  # fmt: skip
    for name, tensor in there.items():
        assert torch.equal(own[f"model.{name}"], tensor) != name.startswith(counted), name
    assert built.loaded is not None and set(built.loaded.fresh) == {n for n in there if n.startswith(counted)}
    arguments = ["train", recipe, "--init", made.init, "--data", str(data), "--out", str(tmp_path / "run"), *SETTINGS]
    assert main(arguments) == 0
    assert "new last layer: 80 classes in the file, 2 in the model" in caplog.text
    trained = load_detection(tmp_path / "run" / "best")
    assert trained.classes == ["dog", "cat"]
    fpn = "fpn.inner_blocks.0.0.weight"
    moved = trained.task.model.state_dict()[fpn] - there[fpn]
    assert 0 < moved.abs().max() < 0.02


@pytest.mark.slow
def test_a_published_file_on_real_photos(tmp_path: Path, capsys: Any) -> None:
    """COCO's own annotations and 80 categories, which are the classes of the file."""
    if not REAL.is_dir():
        pytest.skip("shared/data/coco is absent")
    published(tmp_path / "mask_rcnn.pth")
    use = ["--weights", str(tmp_path / "mask_rcnn.pth"), "--scales", "64", "--device", "cpu"]
    assert main(["eval", *use, "--data", str(REAL)]) == 0
    assert "49 images" in capsys.readouterr().out
    photos = sorted((REAL / "val2017").iterdir())[:2]
    assert main(["predict", *map(str, photos), *use, "--out", str(tmp_path), "--score", "0.1"]) == 0
    assert len(list(tmp_path.glob("*_detected.png"))) == 2
