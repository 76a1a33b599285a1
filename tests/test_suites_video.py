"""The suite of video classifiers: the published protocol, which number applies, and every reason not to compare (R-CKPT-7, R-DOWN-6)."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from film_files import decoded, write_film
from random_models import randomise
from swinscale.cli import main
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer, model_config
from swinscale.recipes import RECIPES, Recipe, get_recipe
from swinscale.recipes.video import VideoDataConfig
from swinscale.suites import KINETICS400, SUITES, Options, evaluate_suite, get_suite
from swinscale.suites import video as suite
from swinscale.suites.classification import hash_of_classes
from swinscale.suites.dense import find_entry
from swinscale.suites.video import KINETICS_CLASSES, PUBLISHED, PublishedVideo
from swinscale.tasks import ClassifyVideo, VideoConfig
from swinscale.train import TrainConfig
from swinscale.weights import convert_state_dict, save_pretrained
from swinscale.weights.published import published

CLASSES = ("air drumming", "clean and jerk", "zumba")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SAMPLING = {"sample": "stride", "stride": 2, "rate": 0.0}
CPU = Options(device="cpu", published="mine")
SMALL: dict[str, Any] = {
    "version": 1, "img_size": (8, 32, 32), "patch_size": (2, 4, 4), "window_size": (2, 4, 4), "embed_dim": 8, "depths": (2, 2),
    "num_heads": (1, 2), "num_classes": 3, "drop_path_rate": 0.0,
}  # fmt: skip
SIZES = [(48, 64), (40, 36), (64, 40)]
"""Height and width of the films, one of each class."""


def small(**changed: Any) -> Any:
    """The suite for the films in ``kinetics``."""
    fields = {"films": (3, 3), "classes": 3, "class_list": hash_of_classes(CLASSES)}
    return dataclasses.replace(KINETICS400, **{**fields, **changed})


def write_run(path: Path, preprocessing: dict[str, Any] | None = None, **fields: Any) -> SwinTransformer:
    """A random classifier of clips as a run writes it, with the classes that ``kinetics`` has."""
    model = randomise(SwinTransformer(SwinConfig(**{**SMALL, **fields})))
    record = {**IMAGENET, "sampling": SAMPLING, "classes": list(CLASSES), "img_size": list(model.config.img_size)}
    settings = VideoConfig(test_clips=2, test_crops=1)
    ClassifyVideo(model, model.num_classes, settings, {**record, **(preprocessing or {})}).save_pretrained(path)
    return model.eval()


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    """Three films of noise with a moving light, and the table that names them and their classes."""
    root, random = tmp_path / "kinetics", np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    with (root / "annotations" / "val.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
        for number, (label, (height, width)) in enumerate(zip(CLASSES, SIZES, strict=True)):
            frames = random.integers(0, 90, (40, height, width, 3))
            for time, frame in enumerate(frames):
                frame[:, time % width, number] += 160
            name = f"id{number}_000010_000020"
            write_film(root / "val" / f"{name}.mp4", list(frames.astype(np.uint8)))
            rows.writerow([label, f"id{number}", 10, 20, "validate"])
    return root


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's classifier; "mine" is published with 2×3 views, and with windows of 8 at 64 pixels in one view."""
    model = write_run(tmp_path / "mine")
    publish(monkeypatch, model.config, {(4, 32, 2, 3): (62.5, 100.0), (8, 64, 1, 1): (13.0, None)})
    return tmp_path / "mine"


def publish(monkeypatch: pytest.MonkeyPatch, config: SwinConfig, numbers: Any) -> None:
    """Adds a classifier to the published ones, and its recipe, which tests 2 clips in 3 crops."""
    task = VideoConfig(test_clips=2, test_crops=3)
    recipe = Recipe("mine", config, task, VideoDataConfig(stride=2), TrainConfig())
    monkeypatch.setitem(RECIPES, "mine", lambda: recipe)
    monkeypatch.setattr(suite, "PUBLISHED", [*PUBLISHED, PublishedVideo("mine", "mine", "a page", numbers)])


def refused(outcome: Any, *words: str) -> None:
    """Measured, and compared with nothing, for exactly one reason."""
    assert all(m.published is None and 0 <= m.ours <= 100 for m in outcome.measures)
    assert outcome.published is None and len(outcome.obstacles) == 1, outcome.obstacles
    for word in words:
        assert word in outcome.obstacles[0]


def by_hand(model: SwinTransformer, film: Path, clips: int, crops: int) -> Tensor:
    """Probabilities by the published steps, one after the other: decode, choose, resize, crop, average."""
    frames = decoded(film)
    height, width = frames.shape[-2:]
    factor = 32 / min(height, width)
    frames = F.interpolate(frames, (round(height * factor), round(width * factor)), mode="bilinear")
    frames = (frames / 255 - torch.tensor(IMAGENET["mean"])[:, None, None]) / torch.tensor(IMAGENET["std"])[
        :, None, None
    ]
    total = torch.zeros(3)
    for clip in range(clips):
        start = int((len(frames) - 16 + 1) / clips * (clip + 0.5))
        shown = frames[start : start + 16 : 2].movedim(1, 0)
        rows, columns = shown.shape[-2] - 32, shown.shape[-1] - 32
        for crop in range(crops):
            share = crop / (crops - 1) if crops > 1 else 0.5
            top, left = round(rows * share), round(columns * share)
            view = shown[None, ..., top : top + 32, left : left + 32]
            with torch.no_grad():
                total += model(view)[0].softmax(-1)
    return total / (clips * crops)


def test_both_numbers_are_printed_and_written(
    kinetics: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By the command line, with the published views instead of the run's."""
    monkeypatch.setitem(SUITES, "kinetics400", small())
    out = tmp_path / "results" / "kinetics.json"
    arguments = ["eval", "--suite", "kinetics400", "--weights", str(mine), "--data", str(kinetics), "--device", "cpu"]
    assert main([*arguments, "--published", "mine", "--out", str(out)]) == 0
    printed, record = capsys.readouterr().out, json.loads(out.read_text())
    assert record["obstacles"] == [] and record["films"] == 3 and record["date"] and record["absent"] == 0
    assert record["protocol"] == (
        "2×3 views (clips × crops) of 8 frames, one in 2; short side 32, bilinear without antialiasing, crops of 32×32; mean "
        "of the probabilities; fp32"
    )
    top1 = record["measures"]["top1"]
    assert top1["published"] == 62.5 and top1["difference"] == pytest.approx(top1["ours"] - 62.5)
    assert top1["interval"][0] < top1["ours"] + 1e-9 and record["measures"]["top5"]["within"] is True
    assert record["views"] == {"clips": 2, "crops": 3} and len(record["sha256"]) == 64
    assert "on 3 films of" in printed and "a page, mine, as --published says" in printed and "62.5" in printed
    assert main([*arguments, "--published", "mine", "--clips", "1", "--crops", "1"]) == 0
    assert "views: 1×1 (clips × crops); published with 2×3" in capsys.readouterr().out


@pytest.mark.parametrize(("clips", "crops"), [(2, 3), (1, 1), (3, 2)])
def test_views_are_the_published_ones(
    clips: int, crops: int, kinetics: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probabilities of each film are those of the published steps by hand, whatever the run recorded."""
    seen: list[Tensor] = []
    probabilities = ClassifyVideo.probabilities

    def keep(self: ClassifyVideo, batch: Any) -> Tensor:
        seen.append(probabilities(self, batch))
        return seen[-1]

    monkeypatch.setattr(ClassifyVideo, "probabilities", keep)
    small().measure(mine, str(kinetics), dataclasses.replace(CPU, clips=clips, crops=crops))
    model = randomise(SwinTransformer(SwinConfig(**SMALL))).eval()
    films = [kinetics / "val" / f"id{number}_000010_000020.mp4" for number in range(3)]
    for found, film in zip(torch.cat(seen), films, strict=True):
        assert (found - by_hand(model, film, clips, crops)).abs().max() <= 1e-5


def test_no_comparison_with_other_films(kinetics: Path, mine: Path) -> None:
    film = kinetics / "val" / "id1_000010_000020.mp4"
    kept = film.read_bytes()
    film.write_bytes(b"not a film")
    refused(small().measure(mine, str(kinetics), CPU), "films: 2 instead of the 3", "1 cannot be read")
    film.unlink()
    refused(small().measure(mine, str(kinetics), CPU), "films: 2 instead of the 3", "1 are not there")
    assert small(films=(2, 3)).measure(mine, str(kinetics), CPU).obstacles == ()
    film.write_bytes(kept)
    refused(small(films=(1, 2)).measure(mine, str(kinetics), CPU), "films: 3 instead of the 1 to 2")
    for path in (kinetics / "val").iterdir():
        path.write_bytes(b"not a film")
    with pytest.raises(UsageError, match="None of the 3"):
        small().measure(mine, str(kinetics), CPU)


def test_no_comparison_with_other_settings(kinetics: Path, mine: Path, tmp_path: Path) -> None:
    larger = small().measure(mine, str(kinetics), dataclasses.replace(CPU, img_size=64))
    refused(larger, "image size: 64; published with 32")
    window = small().measure(mine, str(kinetics), dataclasses.replace(CPU, window_size=2))
    refused(window, "windows 2×2×2 2×2×2 instead of 2×4×4 2×4×4 or 2×8×8 2×8×8 of mine")
    enlarged = dataclasses.replace(CPU, img_size=64, window_size=8, clips=1, crops=1)
    outcome = small().measure(mine, str(kinetics), enlarged)
    assert outcome.obstacles == () and [m.published for m in outcome.measures] == [13.0, None]
    write_run(tmp_path / "slow", {"sampling": {**SAMPLING, "stride": 4}})
    refused(
        small().measure(tmp_path / "slow", str(kinetics), CPU), "clips of 8 frames, one in 4 instead of", "one in 2"
    )
    write_run(tmp_path / "half", {"mean": [0.5] * 3, "std": [0.5] * 3})
    refused(small().measure(tmp_path / "half", str(kinetics), CPU), "not ImageNet's")
    write_run(tmp_path / "wide", window_size=(4, 4, 4))
    refused(small().measure(tmp_path / "wide", str(kinetics), CPU), "windows 4×4×4 4×4×4 instead of 2×4×4")
    write_run(tmp_path / "deep", depths=(2, 4))
    refused(small().measure(tmp_path / "deep", str(kinetics), CPU), "depths 2 4 instead of 2 2")
    write_run(tmp_path / "started", window_size=(2, 8, 8), img_size=(8, 64, 64))
    started = small().measure(tmp_path / "started", str(kinetics), enlarged)
    refused(started, "trained with windows 2×8×8 2×8×8 instead of 2×4×4 2×4×4")


def test_nothing_is_compared_by_guess(kinetics: Path, mine: Path) -> None:
    unsaid = dataclasses.replace(CPU, published=None)
    refused(small().measure(mine, str(kinetics), unsaid), "--published with one of", "swin3d_t", "mine")
    with pytest.raises(UsageError, match="Did you mean 'swin3d_t'"):
        small().measure(mine, str(kinetics), dataclasses.replace(CPU, published="swin3d_tt"))


def test_what_cannot_be_measured_is_one_line(kinetics: Path, mine: Path, tmp_path: Path) -> None:
    def mistake(match: str, weights: Path = mine, data: Path = kinetics, this: Any = None, **options: Any) -> None:
        with pytest.raises(UsageError, match=match) as error:
            (this or small()).measure(weights, str(data), dataclasses.replace(CPU, **options))
        assert "\n" not in str(error.value)

    mistake("--scales and --flip: the views of --suite kinetics400 are clips and crops", flip=True)
    mistake("--scales and --flip", scales=(1.0, 2.0))
    mistake("--resize belongs to classifiers of images", resize=256)
    mistake("has 3 classes, Kinetics-400's validation set has 400", this=KINETICS400)
    images = tmp_path / "images"
    save_pretrained(SwinTransformer(model_config("swin_pico_patch4_window4_32", num_classes=3)), images)
    mistake("is no video model", images)
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(kinetics / "val" / "id0_000010_000020.mp4", flat)
    mistake("has no labels", data=flat)
    with pytest.raises(UsageError, match="--clips and --crops are views of films"):
        evaluate_suite("imagenet", mine, str(kinetics), Options(clips=2))


def test_the_order_of_classes(kinetics: Path, mine: Path, tmp_path: Path) -> None:
    """Folders with underscores and numbers in a list are the published classes; any other order is refused or said."""
    folders = tmp_path / "folders"
    (tmp_path / "list.txt").write_text("")
    for number, label in enumerate(CLASSES):
        film = kinetics / "val" / f"id{number}_000010_000020.mp4"
        place = folders / "val" / label.replace(" ", "_") / film.name
        place.parent.mkdir(parents=True)
        shutil.copy(film, place)
        with (tmp_path / "list.txt").open("a") as file:
            file.write(f"{place.relative_to(tmp_path)} {number}\n")
    expected = small().measure(mine, str(kinetics), CPU)
    for data in (folders, tmp_path / "list.txt"):
        outcome = small().measure(mine, str(data), CPU)
        assert outcome.obstacles == () and outcome.measures == expected.measures
    write_run(tmp_path / "reversed", {"classes": list(reversed(CLASSES))})
    with pytest.raises(UsageError, match=r"output 0 is 'zumba', in .* it is 'air drumming'"):
        small().measure(tmp_path / "reversed", str(kinetics), CPU)
    refused(small().measure(tmp_path / "reversed", str(tmp_path / "list.txt"), CPU), "not those of Kinetics-400")
    refused(small(class_list="0" * 64).measure(mine, str(kinetics), CPU), "not those of Kinetics-400")


@pytest.mark.parametrize("layout", ["mm", "official-video", "torchvision"])
def test_a_file_of_another_project(
    layout: str, kinetics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It records nothing: clips and size are those of the published model, classes those of the films."""
    model = randomise(SwinTransformer(SwinConfig(**SMALL)))
    state = convert_state_dict(model.state_dict(), layout, config=model.config)
    torch.save({"state_dict": state}, tmp_path / "mine.pth")
    publish(monkeypatch, model.config, {(4, 32, 2, 3): (62.5, 100.0)})
    outcome = small().measure(tmp_path / "mine.pth", str(kinetics), Options(device="cpu"))
    assert outcome.obstacles == () and outcome.published == "a page, mine, by the name of the weights"
    write_run(tmp_path / "run")
    assert outcome.measures == small().measure(tmp_path / "run", str(kinetics), CPU).measures


def test_published_entries_are_those_of_recipes_and_files() -> None:
    """Every number belongs to windows, a size and views that its recipe has or a transfer reaches; SPEC 7.4, 4.3."""
    assert get_suite("kinetics400") is KINETICS400
    for entry in PUBLISHED:
        recipe = get_recipe(entry.recipe)
        assert isinstance(recipe.task, VideoConfig) and isinstance(recipe.data, VideoDataConfig)
        assert recipe.data.stride == 2 and recipe.data.sample == "stride"
        own = (recipe.model.window_size[0][1], recipe.model.img_size[1])
        assert own in [key[:2] for key in entry.numbers]
        views = (recipe.task.test_clips, recipe.task.test_crops)
        assert views in [key[2:] for key in entry.numbers]
        assert find_entry(entry.name, PUBLISHED) is entry
    numbers = {entry.name: entry.numbers for entry in PUBLISHED}
    assert numbers["swin_tiny_patch244_window877_kinetics400_1k"] == {(7, 224, 4, 3): (78.8, 93.6)}
    assert numbers["swin3d_b_22k"] == {(7, 224, 4, 3): (82.7, 95.5)}
    assert numbers["kinetics400_swin_large_384"] == {(12, 384, 10, 5): (84.9, 96.7)}
    assert numbers["kinetics400_swinv2_giant_320"][24, 384, 4, 5] == (86.8, None)
    for file in (
        "swin_base_patch244_window877_kinetics400_22k.pth",
        "swin-small-p244-w877_in1k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb_20220930-e91ab986.pth",
        "swin3d_t-7615ae03.pth",
    ):
        entry, known = find_entry(file.removesuffix(".pth"), PUBLISHED), published(file)
        assert entry is not None and known is not None and known.name == entry.name
        assert model_config(known.model) == dataclasses.replace(
            get_recipe(entry.recipe).model, num_classes=400, drop_path_rate=model_config(known.model).drop_path_rate
        )


def test_the_classes_are_torchvisions() -> None:
    from swinscale.torchvision_cpu import ensure_torchvision

    ensure_torchvision()
    from torchvision.models import get_model_weights

    names = get_model_weights("swin3d_t").DEFAULT.meta["categories"]
    assert len(names) == 400 and hash_of_classes(names) == KINETICS_CLASSES


def test_three_real_films_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Films of Kinetics-400 in its table, by a random model with 400 classes under a published name."""
    clips = Path(__file__).parents[2] / "shared" / "data" / "clips"
    films = sorted(clips.glob("*.mp4"))
    if not films:
        pytest.skip("the real films are not beside this checkout")
    from swinscale.torchvision_cpu import ensure_torchvision

    ensure_torchvision()
    from torchvision.models import get_model_weights

    names = get_model_weights("swin3d_t").DEFAULT.meta["categories"]
    with (tmp_path / "val.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
        for number, name in enumerate(names):
            youtube = films[number].stem if number < len(films) else f"gone{number}"
            rows.writerow([name, youtube, 0, 10, "validate"])
    for film in films:
        shutil.copy(film, tmp_path)
    config = dataclasses.replace(SwinConfig(**SMALL), img_size=(16, 64, 64), window_size=(4, 4, 4), num_classes=400)
    model = randomise(SwinTransformer(config))
    torch.save({"state_dict": convert_state_dict(model.state_dict(), "mm")}, tmp_path / "random.pth")
    line = ["eval", "--suite", "kinetics400", "--weights", str(tmp_path / "random.pth"), "--data", str(tmp_path)]
    assert main([*line, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"on {len(films)} films" in printed and f"{400 - len(films)} are not there" in printed
    assert "4×3 views (clips × crops) of 8 frames" in printed and "19,700 to 20,000" in printed
