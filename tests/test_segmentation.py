"""Trained segmenters in use, from Python: what was saved gives the same, pictures of any kind, films, truth and maps."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segment_files import save
from small_segmenters import small_segmenter
from swinscale.data.segment_transforms import segment_eval_transform
from swinscale.data.video import open_video, write_video
from swinscale.errors import UsageError
from swinscale.recipes.segmentation import SegmentationDataConfig, segmentation_preprocessing
from swinscale.segmentation import SegmentationPipeline, evaluate_segmenter, load_segmentation, segment_files
from swinscale.tasks.segment import Segment
from swinscale.weights import save_pretrained

MEAN, STD = [0.5] * 3, [0.25] * 3
NAMES = ["a", "b", "c", "d"]


def pipeline(version: int = 2, classes: int = 4, channels: int = 3, **fields: object) -> SegmentationPipeline:
    segmenter = small_segmenter(version, classes, backbone={"in_chans": channels}, **fields).eval()
    names = NAMES if classes == 4 else [f"class {k}" for k in range(classes)]
    mean, std = MEAN[:1] * channels, STD[:1] * channels
    labels = {"ignore_index": 255, "reduce_zero_label": False}
    preprocessing = {"mean": mean, "std": std, "classes": names, "colours": None, "labels": labels}
    return SegmentationPipeline(Segment(segmenter, names, preprocessing), segment_eval_transform(mean, std))


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize("version", [1, 2])
def test_a_segmenter_that_was_saved_finds_the_same(tmp_path: Path, version: int):
    before = pipeline(version, test_short=40, test_long=90, test_ratios=(0.5, 1.0))
    before.task.save_pretrained(tmp_path)
    after = load_segmentation(tmp_path)
    assert after.task.config == before.task.config and after.classes == NAMES and after.rule == before.rule
    assert after.task.backbone.config == before.task.backbone.config and after.colours == before.colours
    for size in ((60, 90), (37, 20), (1, 1)):
        one, two = before([picture(*size)])[0], after([picture(*size)])[0]
        assert one.shape == size and torch.equal(one, two)


def test_pictures_do_not_depend_on_each_other_and_may_be_bytes_or_floats():
    segment = pipeline()
    pictures = [picture(60, 90), picture(50, 120, 1), picture(8, 8, 2)]
    together = segment(pictures)
    assert all(torch.equal(labels, segment([p])[0]) for labels, p in zip(together, pictures, strict=True))
    assert segment([]) == [] and len(together[0].unique()) > 1
    assert (segment([pictures[0].float() / 255])[0] != together[0]).float().mean() < 0.002


def test_settings_of_use_may_change(tmp_path: Path):
    pipeline(test_short=40, test_long=100).task.save_pretrained(tmp_path)
    at = load_segmentation(tmp_path, short=80, test_flip=True, test_crop=32, test_stride=16)
    assert (at.task.config.test_short, at.task.config.test_long) == (80, 200)  # as much longer
    assert at.task.config.test_flip and at.task.passes({"image": torch.zeros(1), "size": torch.tensor([[0, 0]])} | {
        "image": torch.zeros(1, 3, 40, 40), "size": torch.tensor([[40, 40]])}) == 2 * 16  # fmt: skip
    assert load_segmentation(tmp_path, window_size=8).task.backbone.config.stage_windows[0] == (8, 8)
    with pytest.raises(TypeError):
        load_segmentation(tmp_path, scales=2)


@pytest.mark.parametrize(
    ("height", "width", "mode"),
    [(1, 1, "RGB"), (1, 300, "RGB"), (70, 50, "L"), (70, 50, "I;16"), (70, 50, "RGBA"), (70, 50, "P"), (70, 50, "1")],
    ids=str,
)
def test_pictures_of_any_size_and_kind_are_drawn(tmp_path: Path, height: int, width: int, mode: str):
    pipeline().task.save_pretrained(tmp_path / "saved")
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    wide = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256) if mode == "I;16" else None
    (wide or Image.fromarray(pixels).convert(mode)).save(tmp_path / "photo.png")
    [drawn] = segment_files(
        tmp_path / "saved", [tmp_path / "photo.png"], out=tmp_path / "out", save_maps=True, device="cpu"
    )
    assert drawn.name == "photo_segmented.png" and Image.open(drawn).mode == "RGB"
    labels = np.asarray(Image.open(tmp_path / "out/photo_labels.png"))
    found = load_segmentation(tmp_path / "saved")
    assert np.array_equal(labels, found([found.read(tmp_path / "photo.png")])[0].numpy())


@pytest.mark.parametrize(("classes", "kind"), [(4, np.uint8), (256, np.uint8), (300, np.uint16)])
def test_maps_are_written_with_as_many_bits_as_classes_need(tmp_path: Path, classes: int, kind: type):
    segment = pipeline(classes=classes)
    segment.task.model.decode.predict.bias.data[classes - 1] += 1e4
    segment.task.save_pretrained(tmp_path / "saved")
    save(tmp_path / "photo.png", np.zeros((20, 30, 3), dtype=np.uint8))
    segment_files(tmp_path / "saved", [tmp_path / "photo.png"], out=tmp_path / "out", save_maps=True, device="cpu")
    labels = np.asarray(Image.open(tmp_path / "out/photo_labels.png"))
    assert labels.dtype == kind and (labels == classes - 1).all() and labels.shape == (20, 30)


def test_a_film_becomes_a_film(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With as many frames, of the same size and rate, and some of them beside each other in a picture."""
    pipeline().task.save_pretrained(tmp_path / "saved")
    noise = (Image.fromarray(picture(48, 64, seed).movedim(0, -1).numpy()) for seed in range(9))
    write_video(tmp_path / "walk.mp4", noise, Fraction(10))
    save(tmp_path / "photo.png", np.zeros((20, 30, 3), dtype=np.uint8))
    files = [tmp_path / "walk.mp4", tmp_path / "photo.png"]
    written = segment_files(tmp_path / "saved", files, out=tmp_path / "out", device="cpu")
    assert {path.name for path in written} == {"walk_segmented.mp4", "photo_segmented.png"}
    video = open_video(tmp_path / "out/walk_segmented.mp4")
    frames = list(video.frames)
    assert video.rate == 10 and len(frames) == 9 and frames[0].shape == (3, 48, 64)
    assert "9 frames" in capsys.readouterr().out and (tmp_path / "out/walk_segmented.png").exists()


def test_a_segmenter_of_other_channels_reads_its_kind_of_picture_and_no_films(tmp_path: Path):
    pipeline(channels=1).task.save_pretrained(tmp_path / "grey")
    save(tmp_path / "photo.png", np.zeros((20, 30), dtype=np.uint16))
    assert load_segmentation(tmp_path / "grey").read(tmp_path / "photo.png").shape == (1, 20, 30)
    assert len(segment_files(tmp_path / "grey", [tmp_path / "photo.png"], out=tmp_path / "out", device="cpu")) == 1
    write_video(tmp_path / "walk.mp4", iter([Image.new("RGB", (32, 32))]), Fraction(10))
    with pytest.raises(UsageError, match="a film has 3 channels, this segmenter reads 1"):
        segment_files(tmp_path / "grey", [tmp_path / "walk.mp4"], out=tmp_path / "out", device="cpu")


def test_names_end_as_in_training(tmp_path: Path):
    """Cityscapes calls a picture ulm_leftImg8bit.png and its map ulm_gtFine_labelTrainIds.png, beside other maps."""
    segment, ends = pipeline(), ("_leftImg8bit", "_gtFine_labelTrainIds")
    data = SegmentationDataConfig(image_suffix=ends[0], map_suffix=ends[1])
    preprocessing = segmentation_preprocessing(segment.task.backbone.config, data, NAMES)
    Segment(segment.task.model, NAMES, preprocessing).save_pretrained(tmp_path / "saved")
    maps = tmp_path / "data/gtFine/val/ulm"
    for town in ("ulm", "bonn"):
        save(tmp_path / f"data/leftImg8bit/val/ulm/{town}{ends[0]}.png", np.zeros((20, 30, 3), dtype=np.uint8))
        save(maps / f"{town}{ends[1]}.png", np.zeros((20, 30), dtype=np.uint8))
        save(maps / f"{town}_gtFine_instanceIds.png", np.zeros((20, 30), dtype=np.uint8))
    measured = evaluate_segmenter(tmp_path / "saved", data=str(tmp_path / "data"), device="cpu")
    assert measured["per_class"][0]["pixels"] == 2 * 20 * 30
    photo = tmp_path / f"data/leftImg8bit/val/ulm/ulm{ends[0]}.png"
    [drawn] = segment_files(tmp_path / "saved", [photo], out=tmp_path / "out", truth=maps, device="cpu")
    with Image.open(drawn) as panels:
        assert panels.width > 4 * 300  # the truth is there


def test_other_weights_are_no_segmenter(tmp_path: Path):
    from random_models import random_swin

    save_pretrained(random_swin(), tmp_path / "classifier")
    for place in (tmp_path / "classifier", tmp_path / "nowhere"):
        with pytest.raises(UsageError) as error:
            load_segmentation(place)
        assert "\n" not in str(error.value)


def test_evaluation_of_real_street_scenes(tmp_path: Path, shared_data: Path):
    """CamVid's 11 classes in the layout of the SegNet authors; an untrained model is right about as often as chance."""
    from swinscale.data.class_lists import class_list
    from swinscale.data.segments import open_segments

    place = shared_data / "camvid"
    if not place.is_dir():
        pytest.skip("CamVid is not beside this checkout")
    names = list(class_list("camvid").names)
    segment = pipeline(classes=len(names), test_short=48, test_long=64)
    labels = {"ignore_index": 11, "reduce_zero_label": False}
    task = Segment(segment.task.model, names, segment.task.preprocessing | {"classes": names, "labels": labels})
    source = open_segments(place, "test", classes="camvid", ignore_index=11).take(range(2))
    for index, name in enumerate(source.names):
        save(tmp_path / "some/images" / f"{index}.png", Image.open(place / name))
        save(tmp_path / "some/labels" / f"{index}.png", Image.open(place / source.maps[index]))
    task.save_pretrained(tmp_path / "saved")
    measured = evaluate_segmenter(tmp_path / "saved", data=str(tmp_path / "some"), device="cpu")
    assert [row["name"] for row in measured["per_class"]] == names and 0 <= measured["miou"] < 0.5
    assert sum(row["pixels"] for row in measured["per_class"]) > 2 * 300 * 400
