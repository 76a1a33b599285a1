"""Published tables: the protocol, the order of classes, which number applies, and every reason not to compare."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.random_models import randomise

from swinscale.cli import main
from swinscale.data import ImageDataset, open_source
from swinscale.data.transforms import IMAGENET_MEAN, IMAGENET_STD, published_transform
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer, model_config
from swinscale.suites import IMAGENET, IMAGENET_V2, SUITES, Options, get_suite
from swinscale.suites.classification import (
    IMAGENET_CLASSES,
    RESIZE,
    ImageProtocol,
    _departures,
    hash_of_classes,
    published_protocol,
)
from swinscale.weights import infer_config, save_pretrained
from swinscale.weights.published import IN1K, PUBLISHED, Published, published

WORDNET = ("n01440764", "n01443537", "n01484850")
INDICES = tuple(map(str, range(12)))
PICO = "swinv2_pico_patch4_window4_32"


def entry(name: str, top1: float) -> Published:
    return Published(name, PICO, "a project", "MIT", IN1K, 32, "4", top1, 100.0, top1)


@pytest.fixture(autouse=True)
def tables(monkeypatch) -> None:
    """Two published files of a small model beside the real ones."""
    for one in (entry("pico_published", 50.0), entry("pico_other", 75.0)):
        monkeypatch.setitem(published.__globals__["_BY_NAME"], one.name, one)
        PUBLISHED.append(one)
    yield
    del PUBLISHED[-2:]


def write_images(root: Path, classes: tuple[str, ...], each: int) -> Path:
    """A folder per class of JPEG files, whose colour depends on the class as a number."""
    random = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(each):
            pixels = random.integers(0, 60, (40 + index, 52, 3)) + np.array([15 * label, 90, 180 - 15 * label])
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"ILSVRC2012_val_{label:04}{index:04}.JPEG")
    return root


def write_weights(path: Path, classes: int, seed: int = 0, **fields) -> Path:
    """Weights as published files have them: tensors alone; the name says the window."""
    model = randomise(SwinTransformer(model_config(PICO, num_classes=classes, **fields)), seed)
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture
def imagenet(tmp_path) -> Path:
    """ImageNet in miniature: val with 3 classes of 4 images, and a train part that nobody looks into."""
    write_images(tmp_path / "imagenet" / "train", WORDNET, 1)
    write_images(tmp_path / "imagenet" / "val", WORDNET, 4)
    return tmp_path / "imagenet"


SMALL = dataclasses.replace(IMAGENET, images=12, classes=3, class_list=hash_of_classes(WORDNET))
SMALL_V2 = dataclasses.replace(IMAGENET_V2, images=24, classes=12, class_list=IMAGENET_CLASSES)
OPTIONS = Options(img_size=32, window_size=4, device="cpu", published="pico_published")


@pytest.fixture
def pico(tmp_path) -> Path:
    return write_weights(tmp_path / "mine.pth", 3)


def test_both_numbers_are_printed_and_written(imagenet, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SUITES, "imagenet", SMALL)
    weights, out = write_weights(tmp_path / "pico-published.pth", 3), tmp_path / "results" / "imagenet.json"
    arguments = ["eval", "--suite", "imagenet", "--weights", str(weights), "--data", str(imagenet), "--device", "cpu"]
    assert main([*arguments, "--img-size", "32", "--window", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    top1 = record["measures"]["top1"]

    model = SwinTransformer(model_config(PICO, num_classes=3))
    model.load_state_dict(torch.load(weights)["model"])
    source = open_source(imagenet, "val")
    inputs = ImageDataset(source, published_transform(32, 36, IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        logits = model.eval()(torch.stack([inputs[0, i]["image"] for i in range(12)]))
    assert top1["ours"] == pytest.approx(100 * (logits.argmax(1) == torch.tensor(source.labels)).float().mean().item())
    assert top1["published"] == 50 and top1["difference"] == pytest.approx(top1["ours"] - 50)
    assert top1["interval"][0] < top1["ours"] < top1["interval"][1]
    assert record["measures"]["top5"]["ours"] == 100 and record["measures"]["top5"]["within"] is True
    assert record["images"] == 12 and record["obstacles"] == [] and record["date"] and record["versions"]["torch"]
    assert record["protocol"] == "short side 36 (bicubic), centre crop 32, fp32"
    assert f"{top1['ours']:.2f}" in printed and "±0.1" in printed
    assert f"a project, pico_published ({IN1K}), by the name of the weights" in printed


def test_tolerance(imagenet, pico):
    outcome = SMALL.measure(pico, str(imagenet), OPTIONS)
    top1 = outcome.measures[0]
    for difference, within in ((0.1, True), (-0.1, True), (0.11, False), (-0.3, False)):
        assert dataclasses.replace(top1, published=top1.ours - difference).within is within
    assert (IMAGENET.tolerance, IMAGENET_V2.tolerance) == (0.1, 0.2)


def test_v2_folders_are_classes_by_number(tmp_path, monkeypatch):
    """0, 1, 10, 11, 2 … is how names sort; output 2 is folder 2 all the same."""
    data = write_images(tmp_path / "imagenetv2-matched-frequency-format-val", INDICES, 2)
    monkeypatch.setitem(published.__globals__["_BY_NAME"], "pico_published", entry("pico_published", 100.0))
    weights = write_weights(tmp_path / "pico_published.pth", 12)
    source = open_source(data)
    assert [int(name.split("/")[0]) for name in source.names] == source.labels

    def see(self, images):
        """The class as the colour tells it (``write_images``), whatever the folder is called."""
        red = images[:, 0].mean((1, 2)) * IMAGENET_STD[0] + IMAGENET_MEAN[0]
        return torch.nn.functional.one_hot(((255 * red - 29.5) / 15).round().long().clamp(0, 11), 12).float()

    monkeypatch.setattr(SwinTransformer, "forward", see)
    outcome = SMALL_V2.measure(weights, str(data), dataclasses.replace(OPTIONS, published=None))
    assert outcome.obstacles == () and outcome.measures[0].ours == 100 and outcome.measures[0].within
    assert outcome.measures[1].published is None


def refused(outcome, *words: str) -> None:
    """Measured, and compared with nothing, for exactly one reason."""
    assert all(m.published is None and m.within is None and 0 <= m.ours <= 100 for m in outcome.measures)
    assert outcome.published is None and len(outcome.obstacles) == 1, outcome.obstacles
    for word in words:
        assert word in outcome.obstacles[0]


def test_no_comparison_with_other_images(imagenet, pico):
    first = imagenet / "val" / WORDNET[0]
    kept = (first / "ILSVRC2012_val_00000000.JPEG").read_bytes()
    (first / "ILSVRC2012_val_00000000.JPEG").write_bytes(b"not a picture")
    refused(SMALL.measure(pico, str(imagenet), OPTIONS), "1 of 12 images cannot be read")
    (first / "ILSVRC2012_val_00000000.JPEG").unlink()
    refused(SMALL.measure(pico, str(imagenet), OPTIONS), "images: 11 instead of 12")
    (imagenet / "val" / WORDNET[1] / "again.JPEG").write_bytes(kept)
    refused(SMALL.measure(pico, str(imagenet), OPTIONS), f"class {WORDNET[0]} has 3 instead of 4")


def test_no_comparison_with_other_classes(imagenet, pico, tmp_path):
    (imagenet / "val" / WORDNET[2]).rename(imagenet / "val" / "n01484851")
    refused(SMALL.measure(pico, str(imagenet), OPTIONS), "the WordNet ids are not those of ImageNet-1K")
    data = write_images(tmp_path / "imagenetv2-threshold0.7-format-val", INDICES, 2)
    weights = write_weights(tmp_path / "twelve.pth", 12)
    refused(SMALL_V2.measure(weights, str(data), OPTIONS), "names another set than ImageNet-V2")


def test_no_comparison_with_another_protocol(imagenet, pico, tmp_path):
    resized = dataclasses.replace(OPTIONS, resize=40)
    refused(SMALL.measure(pico, str(imagenet), resized), "short side 40 (bicubic), centre crop 32", "short side 36")
    larger = dataclasses.replace(OPTIONS, img_size=48, window_size=4)
    refused(SMALL.measure(pico, str(imagenet), larger), "img size 48×48 instead of 32×32 of pico_published")

    model = SwinTransformer(model_config(PICO, num_classes=3))
    save_pretrained(model, tmp_path / "recorded")
    transferred = dataclasses.replace(OPTIONS, img_size=None, window_size=8)
    obstacles = SMALL.measure(tmp_path / "recorded", str(imagenet), transferred).obstacles
    assert "weights: stage windows 8×8 4×4 instead of 4×4 4×4 of pico_published" in obstacles
    assert all("instead of" in line for line in obstacles)

    save_pretrained(model, tmp_path / "half", metadata={"preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    usual = dataclasses.replace(OPTIONS, img_size=None, window_size=None)
    refused(SMALL.measure(tmp_path / "half", str(imagenet), usual), "mean (0.5, 0.5, 0.5)", "not ImageNet's")
    with pytest.raises(UsageError, match="--resize 30 is less than the crop of 32"):
        SMALL.measure(pico, str(imagenet), dataclasses.replace(OPTIONS, resize=30))


def test_nothing_is_compared_by_guess(imagenet, pico, tmp_path):
    """Weights without a telling name, ones trained here under a telling name, and a name that denies what is asked for."""
    unsaid = dataclasses.replace(OPTIONS, published=None)
    refused(SMALL.measure(pico, str(imagenet), unsaid), "--published with one of pico_published, pico_other")
    named = write_weights(tmp_path / "pico_other.pth", 3)
    assert SMALL.measure(named, str(imagenet), unsaid).measures[0].published == 75
    refused(SMALL.measure(named, str(imagenet), OPTIONS), "their name says pico_other, not pico_published")
    other = dataclasses.replace(OPTIONS, published="swin_tiny_patch4_window7_224")
    obstacles = SMALL.measure(pico, str(imagenet), other).obstacles
    assert "weights: version 2 instead of 1 of swin_tiny_patch4_window7_224" in obstacles
    unpublished = dataclasses.replace(SMALL, title="a set", numbers=lambda e: (None, None))
    refused(unpublished.measure(pico, str(imagenet), OPTIONS), "no number on a set is published for pico_published")
    refused(unpublished.measure(pico, str(imagenet), unsaid), "a set has no published number for such a model")

    ours = {"task": {"name": "classify"}, "preprocessing": {"classes": list(WORDNET)}}
    save_pretrained(SwinTransformer(model_config(PICO, num_classes=3)), tmp_path / "pico_published", metadata=ours)
    trained_here = dataclasses.replace(unsaid, img_size=None, window_size=None)
    refused(SMALL.measure(tmp_path / "pico_published", str(imagenet), trained_here), "their name does not say")
    with pytest.raises(UsageError, match="Did you mean 'pico_published'"):
        SMALL.measure(pico, str(imagenet), dataclasses.replace(OPTIONS, published="pico_publishd"))


def test_layouts_that_are_not_the_sets_own(imagenet, pico, tmp_path, monkeypatch):
    """One line before any forward pass."""
    monkeypatch.setattr("swinscale.tasks.Classify.update_metrics", lambda *_: pytest.fail("a forward pass"))

    def mistake(match: str, data: Path, suite=SMALL, weights=pico) -> None:
        with pytest.raises(UsageError, match=match) as error:
            suite.measure(weights, str(data), OPTIONS)
        assert "\n" not in str(error.value)

    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (imagenet / "val").rglob("*.JPEG"):
        shutil.copy(path, flat)
    mistake("has no labels: ImageNet-1K's validation set is a folder per class", flat)
    shutil.rmtree(imagenet / "train" / WORDNET[0])
    mistake("has 2 classes, ImageNet-1K's validation set has 3", imagenet / "train")
    mistake("such as 'cat', so it cannot be told", write_images(tmp_path / "words", ("cat", "dog", "eel"), 1))
    mistake(r"not 0 to 2: .* There is no 0\.", write_images(tmp_path / "from1", ("1", "2", "3"), 1))
    missing = write_images(tmp_path / "missing", INDICES[:7] + INDICES[8:], 1)
    mistake(r"has 11 classes, .* has 12: .*There is no 7\.", missing, SMALL_V2, write_weights(tmp_path / "w.pth", 12))
    mistake("has 12 classes, ImageNet-1K's validation set has 3", imagenet, weights=tmp_path / "w.pth")


def test_orders_of_classes_that_weights_record(imagenet, tmp_path):
    """The alphabetical order of numbers, as torchvision's ImageFolder has it, is not taken for the published one."""
    data = write_images(tmp_path / "v2", INDICES, 2)
    options = Options(device="cpu", published="pico_published")

    def recorded(name: str, classes: list[str]) -> Path:
        model = randomise(SwinTransformer(model_config(PICO, num_classes=len(classes))))
        save_pretrained(model, tmp_path / name, metadata={"preprocessing": {"classes": classes}})
        return tmp_path / name

    alphabetical = recorded("alphabetical", sorted(INDICES))
    with pytest.raises(UsageError, match=r"output 2 is '10', in .* it is '2'"):
        SMALL_V2.measure(alphabetical, str(data), options)
    assert SMALL_V2.measure(recorded("natural", list(INDICES)), str(data), options).obstacles == ()
    assert SMALL.measure(recorded("ids", list(WORDNET)), str(imagenet), options).obstacles == ()
    assert SMALL.measure(recorded("told", ["tench", "goldfish", "shark"]), str(imagenet), options).obstacles == ()
    with pytest.raises(UsageError, match="not those of ImageNet-1K's validation set in the published order"):
        SMALL.measure(recorded("swapped", ["1", "0", "2"]), str(imagenet), options)
    words = write_images(tmp_path / "words", ("cat", "dog", "eel"), 4)
    refused(SMALL.measure(recorded("pets", ["cat", "dog", "eel"]), str(words), options), "nothing says that they are")


def test_a_list_file_may_name_classes_by_index_or_id(imagenet, pico, tmp_path):
    results = []
    for classes in (WORDNET, INDICES):
        with (tmp_path / "val.csv").open("w", newline="") as file:
            for path in sorted((imagenet / "val").rglob("*.JPEG")):
                csv.writer(file).writerow([path.relative_to(tmp_path), classes[WORDNET.index(path.parent.name)]])
        results.append(SMALL.measure(pico, str(tmp_path / "val.csv"), OPTIONS))
    assert results[0].obstacles == results[1].obstacles == ()
    assert results[0].measures == results[1].measures == SMALL.measure(pico, str(imagenet), OPTIONS).measures


def test_orientation_is_left_as_published(tmp_path):
    """Published evaluations read pixels as they are stored; the rest of this library turns them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name / "0.jpg", exif=exif)
    source = open_source(tmp_path)
    assert ImageDataset(source, None, orient=False).decode(0).shape == (3, 10, 20)
    assert ImageDataset(source, None).decode(0).shape == (3, 20, 10)


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (256, 256), (120, 90)])
def test_preprocessing_is_the_published_one(height, width):
    """microsoft's steps through timm's eval transform, and torchvision's own for its weights: bit for bit."""
    timm = pytest.importorskip("timm.data")
    from torchvision import models, transforms

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def ours(protocol: ImageProtocol) -> torch.Tensor:
        return published_transform(protocol.size, protocol.resize, IMAGENET_MEAN, IMAGENET_STD)(pixels)

    for size, resize in ((224, 256), (256, 292), (192, 219)):
        assert published_protocol(size).resize == resize
        theirs = timm.create_transform(
            size, is_training=False, interpolation="bicubic", crop_pct=224 / 256, mean=IMAGENET_MEAN, std=IMAGENET_STD
        )
        torch.testing.assert_close(ours(published_protocol(size)), theirs(picture), atol=1e-6, rtol=0)
    direct = transforms.Compose(
        [
            transforms.Resize((384, 384), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    assert published_protocol(384) == ImageProtocol(384, None)
    torch.testing.assert_close(ours(published_protocol(384)), direct(picture), atol=1e-6, rtol=0)
    for name in RESIZE:
        weights = models.get_model_weights(name).DEFAULT
        found = published(weights.url.rpartition("/")[2])
        assert found is not None
        protocol = published_protocol(found.img_size, found)
        torch.testing.assert_close(ours(protocol), weights.transforms()(picture), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:The windows of this Swin V2", "ignore:.*the name says classes")
def test_published_models_are_recognised():
    """A file with nothing but tensors under its published name has the published size and windows."""
    compared = 0
    for one in PUBLISHED:
        if one.model != PICO and one.top1 is not None:
            with torch.device("meta"):
                state = SwinTransformer(model_config(one.model)).state_dict()
            assert _departures(infer_config(state, name=f"{one.name}.pth"), one) == [], one.name
            compared += 1
    assert compared == 33 + 15  # of images and of clips


def test_published_numbers_are_those_of_torchvision():
    from torchvision import models

    for name in RESIZE:
        weights = models.get_model_weights(name).DEFAULT
        found = published(weights.url.rpartition("/")[2])
        assert found is not None
        assert IMAGENET.numbers(found) == tuple(weights.meta["_metrics"]["ImageNet-1K"][k] for k in ("acc@1", "acc@5"))
    video = published("swin3d_t-7615ae03.pth")
    assert video is not None and IMAGENET.numbers(video) == (None, None)


def test_classes_are_those_of_imagenet():
    timm = pytest.importorskip("timm.data")
    names = timm.ImageNetInfo().label_names()
    assert len(names) == 1000 and hash_of_classes(sorted(names)) == IMAGENET_CLASSES


def test_an_unknown_suite_is_told_which_there_are(capsys):
    assert main(["eval", "--suite", "kinetics", "--weights", "x", "--data", "y"]) == 2
    error = capsys.readouterr().err
    assert "imagenet, imagenet-v2, coco, ade20k, kinetics400" in error and error.count("\n") == 1
    with pytest.raises(UsageError, match="Did you mean 'imagenet"):
        get_suite("imagnet")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["eval"], "eval needs weights"),
        (["eval", "a", "--weights", "b"], "eval needs weights"),
        (["eval", "a", "--suite", "imagenet"], "--suite imagenet needs its images"),
        (["eval", "a", "--resize", "232"], "--resize belongs to a suite"),
    ],
)
def test_options_that_do_not_fit_together(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
