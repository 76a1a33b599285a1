"""Trained video models in use, from Python: views, films of any kind, other windows, evaluation, drawings (R-DOWN-6)."""

from __future__ import annotations

import csv
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from random_models import random_swin
from small_video_models import MEAN, NAMES, STD, moving, save_classifier, save_simmim
from swinscale.data import CorruptImage
from swinscale.data.clips import Cover, Sampling
from swinscale.data.frames import Timeline, read_frames
from swinscale.data.video import open_video
from swinscale.errors import UsageError
from swinscale.films import _one_after_the_other, attention_over, classify_films, draw_film
from swinscale.inference import load_pipeline, reads_films, task_of
from swinscale.tasks import VideoConfig
from swinscale.video import VideoPipeline, evaluate_videos, load_video
from swinscale.weights import save_pretrained

pytest.importorskip("av")
from film_files import decoded, turned, write_film


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three classes."""
    return save_classifier(tmp_path_factory.mktemp("video") / "model")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames of 40×56 pixels."""
    return write_film(tmp_path_factory.mktemp("films") / "film.mp4", moving())


def folders(root: Path, sizes: list[tuple[int, int]] | None = None) -> Path:
    """A film of each class, of these sizes, in folders that name the classes."""
    for number, (name, size) in enumerate(zip(NAMES, sizes or [(40, 56)] * 3, strict=True)):
        write_film(root / name / f"{number}.mp4", moving(12, size, 3 * (1 - number), seed=number))
    return root


def by_hand(pipeline: VideoPipeline, film: Path, clips: int, crops: int) -> Tensor:
    """The mean over all views, one after the other; crops go along the longer side."""
    total, count = torch.zeros(len(NAMES)), len(decoded(film))
    room = count - 4 * 2 + 1
    for clip in range(clips):
        start = int((clip + 0.5) * room / clips)
        numbers = [(start + 2 * step) % count for step in range(4)]
        frames = read_frames(film, "film", lambda timeline, numbers=numbers: numbers, 3, Cover((32, 32)))
        clip_pixels = ((frames / 255 - MEAN) / STD).movedim(1, 0)
        free = [side - 32 for side in clip_pixels.shape[-2:]]
        for crop in range(crops):
            share = 0.5 if crops == 1 else crop / (crops - 1)
            top, left = (round(f * (share if f == max(free) else 0.5)) for f in free)
            view = clip_pixels[None, :, :, top : top + 32, left : left + 32]
            with torch.no_grad():
                total += pipeline.task.model(view)[0].softmax(-1)
    return total / (clips * crops)


@pytest.mark.parametrize(("clips", "crops"), [(None, None), (1, 1), (4, 3), (2, 5)])
@pytest.mark.parametrize("size", [(40, 56), (56, 40)])
def test_the_answer_is_the_mean_over_every_clip_and_every_crop(
    saved: Path, tmp_path: Path, clips: int | None, crops: int | None, size: tuple[int, int]
):
    film = write_film(tmp_path / "film.mp4", moving(20, size))
    pipeline, passes = load_video(saved, clips=clips, crops=crops), []
    pipeline.task.model.register_forward_hook(lambda *_: passes.append(1))
    pipeline.task.model.norm.register_forward_hook(lambda *_: passes.append(1))
    found = pipeline(film)
    assert len(passes) == (clips or 2) * (crops or 3)  # the task calls the parts of the model
    expected = by_hand(pipeline, film, clips or 2, crops or 3)
    assert found.shape == (3,) and found.sum().item() == pytest.approx(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_classifier_that_was_saved_is_as_it_was(saved: Path, film: Path):
    pipeline = load_video(str(saved))
    assert pipeline.classes == NAMES and pipeline.sampling == Sampling(4, "stride", 2, 0.0)
    assert pipeline.clips == 2 and pipeline.task.crops == 3 and not pipeline.task.training
    assert torch.equal(pipeline(film), pipeline(str(film))) and task_of(saved) == "video" and reads_films(saved)
    record = json.loads((saved / "config.json").read_text())
    assert VideoConfig(**{k: v for k, v in record["task"].items() if k != "name"}) == pipeline.task.config


def test_frames_are_as_good_as_a_file(saved: Path, tmp_path: Path):
    """Of a film that needs no resizing to the last digit, as bytes or floats."""
    same = write_film(tmp_path / "same.mp4", moving(20, (32, 48)))
    pipeline = load_video(saved)
    frames = decoded(same)
    torch.testing.assert_close(pipeline(frames), pipeline(same), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pipeline(frames / 255), pipeline(same), atol=1e-6, rtol=1e-5)
    large = F.interpolate(frames.float(), scale_factor=3, mode="nearest").byte()
    torch.testing.assert_close(pipeline(large), pipeline(frames), atol=0.1, rtol=0.1)
    for wrong in (frames[:0], frames[:, :1], frames[0]):
        with pytest.raises(UsageError, match="give at least one frame"):
            pipeline(wrong)


def test_frames_count_at_their_rate_where_the_model_was_trained_with_one(tmp_path: Path):
    pipeline = load_video(save_classifier(tmp_path / "m", sampling={"rate": 10.0}), clips=1)
    frames = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    for rate, step in ((10.0, 2), (20.0, 4), (30.0, 6)):
        seen = pipeline.look(frames, 1, rate)[0, 0, :, 0, 0] * STD + MEAN
        assert (seen * 255).round().diff().tolist() == [step] * 3


@pytest.mark.parametrize(("count", "size"), [(1, (40, 56)), (3, (40, 56)), (8, (34, 34)), (9, (8, 8)), (12, (32, 200))])
@pytest.mark.parametrize("version", [1, 2])
def test_films_of_any_length_and_size(tmp_path: Path, count: int, size: tuple[int, int], version: int):
    """Shorter than a clip, hardly larger than a crop, smaller, and very wide."""
    pipeline = load_video(save_classifier(tmp_path / "m", version))
    found = pipeline(write_film(tmp_path / "film.mp4", moving(count, size)))
    assert found.isfinite().all() and found.sum().item() == pytest.approx(1, abs=1e-5)


def test_an_upright_film_is_looked_at_upright(saved: Path, tmp_path: Path):
    """A telephone records sideways and says so."""
    lying = write_film(tmp_path / "lying.mp4", moving(20, (32, 48)))
    upright = turned(lying, tmp_path / "upright.mp4", 90)
    pipeline = load_video(saved)
    clockwise = decoded(lying).rot90(-1, (-2, -1))
    torch.testing.assert_close(pipeline(upright), pipeline(clockwise), atol=1e-5, rtol=1e-5)
    assert (pipeline(upright) - pipeline(lying)).abs().max() > 1e-3


def test_a_grey_model_sees_grey_and_one_of_other_channels_says_so(film: Path, tmp_path: Path):
    grey = load_video(save_classifier(tmp_path / "grey", in_chans=1))
    assert grey.look(film, 2).shape[:3] == (2, 1, 4) and grey(film).isfinite().all()
    classify_films(tmp_path / "grey", [film], out=tmp_path / "out", device="cpu")
    assert (tmp_path / "out/film_predicted.mp4").exists()
    save_classifier(tmp_path / "five", in_chans=5)
    with pytest.raises(UsageError, match="3 channels where 5 are needed"):
        classify_films(tmp_path / "five", [film], device="cpu")


@pytest.mark.parametrize("version", [1, 2])
def test_the_window_may_grow_for_the_test(tmp_path: Path, film: Path, version: int):
    """One number is height and width; time stays. V2 keeps the scale of its position bias, V1 resizes its tables."""
    place = save_classifier(tmp_path / "m", version)
    plain = load_video(place).backbone
    wide = load_video(place, img_size=64, window_size=8)
    config = wide.backbone.config
    assert config.img_size == (4, 64, 64) and wide.fit == Cover((64, 64))
    assert config.window_size == ((2, 8, 8), (2, 8, 8))
    if version == 2:
        assert config.pretrained_window_sizes == plain.config.stage_windows
    else:
        table = wide.backbone.layers[0].blocks[0].attn.relative_position_bias_table
        assert len(table) == 3 * 15 * 15
    assert wide(film).isfinite().all()
    longer = load_video(place, img_size=(8, 32, 48), window_size=(4, 4, 4)).backbone.config
    assert longer.img_size == (8, 32, 48) and longer.window_size[0] == (4, 4, 4)
    assert load_video(place, img_size=(8, 32, 48)).sampling.frames == 8


def torchvision_file(place: Path, classes: int = 400) -> Path:
    """A small Swin of torchvision for clips, as its weights are kept."""
    from torchvision.models.video.swin_transformer import PatchMerging, SwinTransformer3d

    torch.manual_seed(0)
    model = SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[8, 7, 7], num_classes=classes,
        downsample_layer=PatchMerging,
    )  # fmt: skip
    torch.save(model.state_dict(), place)
    return place


@pytest.mark.filterwarnings("ignore:.*swin3d:UserWarning")
def test_a_file_of_torchvision_needs_nothing_beside_it(tmp_path: Path):
    place = torchvision_file(tmp_path / "swin3d.pth")
    assert task_of(place) == "video" and reads_films(place)
    pipeline = load_video(place)
    assert (pipeline.clips, pipeline.task.crops, len(pipeline.classes)) == (4, 3, 400)
    assert pipeline.sampling.stride == 2 and pipeline.classes[7] == "class 7"
    assert pipeline.mean == pytest.approx((0.485, 0.456, 0.406))
    small = load_video(place, img_size=(16, 56, 56), clips=1, crops=1)
    film = write_film(tmp_path / "film.mp4", moving())
    [(_, ranked)] = classify_films(place, [film], img_size=(16, 56, 56), clips=1, crops=1, device="cpu", top=3)
    assert len(ranked) == 3 and ranked[0][1] == pytest.approx(small(film).max().item(), abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*swin3d:UserWarning")
def test_real_films_go_through_a_model_of_400_classes(tmp_path: Path, shared_data: Path):
    """Those of Kinetics-400, HMDB51 and UCF101, one of which has a record that is no text."""
    films = shared_data / "clips"
    if not films.is_dir():
        pytest.skip("the real films are not beside this checkout")
    place = torchvision_file(tmp_path / "swin3d.pth")
    found = classify_films(place, [films], img_size=(16, 56, 56), clips=1, crops=2, device="cpu")
    assert len(found) == 9 and all(len(ranked) == 5 and 0 < ranked[0][1] < 1 for _, ranked in found)


@pytest.mark.slow
def test_real_films_are_drawn_to_their_end(tmp_path: Path, shared_data: Path, saved: Path):
    films = sorted((shared_data / "clips").glob("[RT]*.*"))
    if not films:
        pytest.skip("the real films are not beside this checkout")
    classify_films(saved, films, out=tmp_path, device="cpu", clips=1, crops=1)
    for film in films:
        written = open_video(tmp_path / f"{film.stem}_predicted.mp4")
        before = open_video(film)
        assert float(written.rate) == pytest.approx(float(before.rate), rel=1e-3)
        assert sum(1 for _ in written.frames) == sum(1 for _ in before.frames)


def test_evaluation_counts_the_films_of_each_class(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Films of several sizes share a batch, and the batch does not matter."""
    data = folders(tmp_path / "data", [(40, 56), (56, 40), (34, 90)])
    one = evaluate_videos(saved, data=str(data), device="cpu", out=tmp_path / "deep/m.json")
    written = capsys.readouterr().out
    three = evaluate_videos(saved, data=str(data), device="cpu", batch_size=3)
    pipeline = load_video(saved)
    answers = [pipeline(data / name / f"{number}.mp4") for number, name in enumerate(NAMES)]
    right = [int(answer.argmax()) == label for label, answer in enumerate(answers)]
    assert one["top1"] == pytest.approx(sum(right) / 3) and one["top5"] == 1
    expected = -sum(float(answer[label].log()) for label, answer in enumerate(answers)) / 3
    assert one["loss"] == pytest.approx(expected, rel=1e-4) == three["loss"]
    assert one["confusion"] == three["confusion"] and np.sum(one["confusion"]) == 3
    assert "3 films" in written and "2 × 3 views of 4×32×32" in written and "top-5" not in written
    record = json.loads((tmp_path / "deep/m.json").read_text())
    assert record["films"] == 3 and record["top1"] == one["top1"] and record["classes"] == NAMES
    assert record["machine"]["cpus"] and record["versions"]["torch"] and "m.svg" not in written
    assert evaluate_videos(saved, data=str(data), device="cpu", clips=1, crops=1)["views"] == "1 × 1 views"


def test_films_that_cannot_be_read_or_are_not_there_are_counted(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = folders(tmp_path / "data")
    (data / "left" / "broken.mp4").write_bytes(b"no film")
    found = evaluate_videos(saved, data=str(data), device="cpu")
    assert found["unreadable"] == 1 and np.sum(found["confusion"]) == 3
    assert "cannot be read" in capsys.readouterr().out
    with (tmp_path / "val.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
        table.writerows([name, number, 0, 10, "val"] for number, name in enumerate([*NAMES, "left"]))
    found = evaluate_videos(saved, data=str(tmp_path), device="cpu")
    assert found["absent"] == 1 and "films that are not there" in capsys.readouterr().out
    only = tmp_path / "only"
    for name in NAMES:
        (only / name).mkdir(parents=True)
        (only / name / "a.mp4").write_bytes(b"no film")
    with pytest.raises(UsageError, match="None of the 3 "):
        evaluate_videos(saved, data=str(only), device="cpu")


def test_evaluation_needs_films_of_the_same_classes(saved: Path, tmp_path: Path):
    write_film(tmp_path / "two/run/a.mp4", 4)
    write_film(tmp_path / "two/walk/a.mp4", 4)
    write_film(tmp_path / "none/a.mp4", 4)
    with pytest.raises(UsageError, match=r"has the classes run, walk \(2\), but .* films of the same classes"):
        evaluate_videos(saved, data=str(tmp_path / "two"), device="cpu")
    with pytest.raises(UsageError, match="has no labels"):
        evaluate_videos(saved, data=str(tmp_path / "none"), device="cpu")
    with pytest.raises(UsageError, match="add --data PATH"):
        evaluate_videos(saved, device="cpu")


def numbers_of(count: int, kind: str = "stride", rate: float = 0.0, own: float = 25.0) -> list[list[int]]:
    sampling = Sampling(4, kind, 2, rate)  # type: ignore[arg-type]
    return _one_after_the_other(sampling, Timeline([number / own for number in range(count)]))


def test_clips_follow_each_other_over_the_whole_film():
    assert numbers_of(16) == [[0, 2, 4, 6], [8, 10, 12, 14]]
    assert numbers_of(19) == [[0, 2, 4, 6], [8, 10, 12, 14], [11, 13, 15, 17]]
    assert numbers_of(8) == [[0, 2, 4, 6]] and numbers_of(9) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert numbers_of(3) == [[0, 2, 1, 0]] and numbers_of(1) == [[0, 0, 0, 0]]
    assert numbers_of(100, "segments") == [[12, 37, 62, 87]]
    for own in (10.0, 24.0, 30.0):
        clips = numbers_of(97, rate=10.0, own=own)
        assert np.abs(np.diff(clips[0]) - own / 5).max() < 1.01
        assert clips[0][0] == 0 and clips[-1][-1] >= 97 - own / 5 - 2
        assert len(clips) == int(np.ceil(97 / round(own * 0.8)))


@pytest.mark.parametrize(("version", "kind", "count"), [(1, "stride", 19), (2, "stride", 3), (2, "segments", 20)])
def test_the_attention_covers_the_film_and_sums_to_one_share_for_each_place(
    tmp_path: Path, version: int, kind: str, count: int
):
    pipeline = load_video(save_classifier(tmp_path / "m", version, sampling={"sample": kind}))
    film = write_film(tmp_path / "film.mp4", moving(count, (32, 64)))
    clips = list(attention_over(pipeline, film))
    numbers = [number for some, _ in clips for number in some]
    assert numbers == sorted(set(numbers)) and numbers[0] >= 0 and numbers[-1] < count
    if kind == "stride":
        assert numbers == {19: [*range(0, 16, 2), 15, 17], 3: [0, 1, 2]}[count]
    maps = np.concatenate([maps for _, maps in clips])
    assert maps.shape == (len(numbers), 32, 64) and (maps > 0).all() and maps.std() > 0.01
    if len(clips[0][0]) == 4:  # a whole clip; enlarging spreads values, but not evenly at the edges
        assert clips[0][1].mean() == pytest.approx(1, abs=0.2)


def test_every_frame_of_a_film_is_drawn(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    film = write_film(tmp_path / "films/film.mp4", moving(21, (40, 56)), rate=Fraction(10))
    (tmp_path / "films/broken.mp4").write_bytes(b"no film")
    (tmp_path / "films/text.txt").write_text("no film either")
    found = classify_films(saved, [tmp_path / "films"], out=tmp_path / "out", device="cpu", top=2)
    said = capsys.readouterr().out
    expected = load_video(saved)(film).topk(2)
    assert [path for path, _ in found] == [film]
    assert [p for _, p in found[0][1]] == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert [name for name, _ in found[0][1]] == [NAMES[i] for i in expected.indices.tolist()]
    assert f"{found[0][1][0][0]} {100 * found[0][1][0][1]:.1f} %" in said
    assert "skipped broken.mp4" in said and {p.name for p in (tmp_path / "out").iterdir()} == {
        "film_predicted.mp4",
        "film_predicted.png",
    }
    video = open_video(tmp_path / "out/film_predicted.mp4")
    frames = list(video.frames)
    assert len(frames) == 21 and video.rate == 10 and frames[0].shape == (3, 240, 336)  # six times as large
    assert Image.open(tmp_path / "out/film_predicted.png").width > 900


def test_a_film_that_breaks_off_is_classified_but_not_drawn(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    film, after = write_film(tmp_path / "film.mp4", moving()), write_film(tmp_path / "next.mp4", moving())
    from swinscale import films

    def breaks_off(path: Path) -> Any:
        raise UsageError(f"{path} is damaged after frame 3.")

    monkeypatch.setattr(films, "open_video", lambda path: breaks_off(path) if path == film else open_video(path))
    found = classify_films(saved, [film, after], out=tmp_path / "out", device="cpu")
    said = capsys.readouterr().out
    assert len(found) == 2 and "not drawn" in said and "damaged after frame 3" in said
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["next_predicted.mp4", "next_predicted.png"]


def test_a_frame_between_two_that_are_seen_has_the_nearer_map(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from swinscale import films

    film, maps = write_film(tmp_path / "film.mp4", moving(12)), list[float]()

    def seen(*_: object) -> Any:
        yield [1, 5], np.stack([np.full((2, 2), 1.0), np.full((2, 2), 2.0)])
        yield [9], np.full((1, 2, 2), 3.0)

    def note(frame: Tensor, attention: np.ndarray, *_: object) -> Image.Image:
        maps.append(float(attention.max()))
        return Image.new("RGB", (32, 32))

    monkeypatch.setattr(films, "attention_over", seen)
    monkeypatch.setattr(films, "draw_attention", note)
    draw_film(load_video(saved), film, [("left", 0.5)], tmp_path / "out.mp4")
    high = 2.0
    assert [value * high for value in maps] == [1.0] * 3 + [2.0] * 4 + [3.0] * 5


def test_simmim_of_clips_reconstructs_films_and_is_evaluated(
    film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place = save_simmim(tmp_path / "simmim")
    assert task_of(place) == "simmim" and reads_films(place)
    [(path, values)] = classify_films(place, [film], out=tmp_path / "out", device="cpu")
    assert path == film and dict(values)["loss"] > 0
    assert Image.open(tmp_path / "out/film_reconstructed.png").width > 4 * 128
    data = folders(tmp_path / "data")
    metrics = evaluate_videos(place, data=str(data), device="cpu", out=tmp_path / "m.json")
    assert metrics["loss"] > 0 and metrics["views"] == "one clip" and "loss" in capsys.readouterr().out
    assert load_video(place, img_size=64, window_size=8).backbone.config.window_size[0] == (2, 8, 8)
    with pytest.raises(UsageError, match="SimMIM model has no classes"):
        load_video(place)(film)


def test_other_weights_and_other_files_are_refused_in_one_line(saved: Path, film: Path, tmp_path: Path):
    save_pretrained(random_swin(), tmp_path / "pictures")
    save_pretrained(random_swin(img_size=(4, 32, 32), patch_size=(2, 4, 4), num_classes=0), tmp_path / "headless")
    picture = tmp_path / "photo.png"
    Image.new("RGB", (32, 32)).save(picture)
    cases = (
        (lambda: load_video(tmp_path / "pictures"), "is no video model"),
        (lambda: load_video(tmp_path / "headless"), "has no classifier"),
        (lambda: load_video(tmp_path / "nowhere"), "nowhere"),
        (lambda: load_pipeline(saved), "reads films"),
        (lambda: load_pipeline(save_simmim(tmp_path / "simmim")), "reads clips of 4×32×32"),
        (lambda: classify_films(saved, [picture]), "is a picture, and this model reads films"),
        (lambda: classify_films(saved, [tmp_path / "gone.mp4"]), "No such film"),
        (lambda: classify_films(saved, [tmp_path / "pictures"]), "No films in"),
        (lambda: load_video(saved, clips=0), "test_clips"),
    )
    for call, words in cases:
        with pytest.raises(UsageError) as error:
            call()
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(CorruptImage, match=r"gone\.mp4"):
        load_video(saved)(tmp_path / "gone.mp4")
    assert task_of(tmp_path / "headless") == "video" and not reads_films(tmp_path / "pictures")
