"""Clips of films: which frames make one, broken films, batches, and the same clips with any number of workers (R-DOWN-6, R-OPS-2)."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swinscale.data.clip_transforms import clip_eval_transform, clip_train_transform
from swinscale.data.clips import ClipDataset, Cover, Sampling, ShortSide
from swinscale.data.film_sources import open_films
from swinscale.data.frames import Timeline, read_frames
from swinscale.data.loader import EpochLoader
from swinscale.data.masking import MaskConfig
from swinscale.data.sources import FolderStore, Source
from swinscale.errors import UsageError

pytest.importorskip("av")
from film_files import SIZE, numbers_in, write_film


def even(count: int, rate: float = 25.0) -> Timeline:
    return Timeline([number / rate for number in range(count)])


def at_random(sampling: Sampling, count: int, draws: int = 300, rate: float = 25.0) -> np.ndarray:
    """(draws, frames): clips of a film as in training."""
    random = np.random.default_rng(0)
    return np.concatenate([sampling.choose(even(count, rate), 1, random) for _ in range(draws)])


# Which frames.


def test_every_second_frame_from_a_random_one_on():
    """Published: 32 frames, stride 2. A clip spans 64; its start is any at which it fits, all as likely."""
    clips = at_random(Sampling(32), 100, 2000)
    assert (np.diff(clips) == 2).all() and (clips.min(), clips[:, 0].max()) == (0, 100 - 64)
    assert np.bincount(clips[:, 0], minlength=37).min() > 20
    for count in (64, 63, 65):
        assert set(at_random(Sampling(32), count)[:, 0]) == set(range(max(count - 63, 1)))


@pytest.mark.parametrize(
    ("count", "clips", "starts"),
    [(300, 1, [118]), (300, 4, [29, 88, 148, 207]), (300, 10, [11, 35, 59, 82, 106, 130, 154, 177, 201, 225]), (64, 4, [0] * 4),
     (66, 4, [0, 1, 1, 2]), (30, 4, [0] * 4), (65, 1, [1])],
)  # fmt: skip
def test_evaluation_spreads_clips_evenly(count: int, clips: int, starts: list[int]):
    """The starts of OpenMMLab's ``SampleFrames`` in test mode, worked out by hand: the middles of equal parts of the room."""
    chosen = Sampling(32).choose(even(count), clips, None)
    assert chosen[:, 0].tolist() == starts and chosen.shape == (clips, 32)


def test_a_short_film_begins_again():
    assert Sampling(8).choose(even(5), 1, None).tolist() == [[0, 2, 4, 1, 3, 0, 2, 4]]
    assert Sampling(4, stride=3).choose(even(1), 2, None).tolist() == [[0] * 4] * 2
    assert at_random(Sampling(8), 5).max() == 4


def test_segments_cover_the_whole_film():
    """Something-Something: a frame of each of 8 equal parts; at random in training, of the middle in evaluation."""
    segments = Sampling(8, "segments")
    assert segments.choose(even(80), 1, None).tolist() == [[5, 15, 25, 35, 45, 55, 65, 75]]
    assert segments.choose(even(80), 2, None).tolist() == [
        [2 + 10 * i for i in range(8)],
        [7 + 10 * i for i in range(8)],
    ]
    drawn = at_random(segments, 80, 1000)
    for part in range(8):
        assert set(drawn[:, part]) == set(range(10 * part, 10 * part + 10))
    short = at_random(segments, 3)
    assert set(short.flatten()) == {0, 1, 2} and (np.diff(short) >= 0).all()
    assert segments.choose(even(1), 1, None).tolist() == [[0] * 8]


def test_a_rate_gives_the_same_moments_whatever_the_film_has():
    """Of films of 25, 50, 30 and 12 frames per second, within half a frame of the slowest."""
    sampling = Sampling(8, stride=2, rate=12.5)
    for clips, random in ((4, False), (3, True)):
        moments = []
        for rate in (25, 50, 30, 12.5):
            timeline = even(round(4 * rate), rate)
            generator = np.random.default_rng(5) if random else None
            chosen = sampling.choose(timeline, clips, generator)
            moments.append(np.array(timeline.seconds)[chosen])
        assert np.array_equal(moments[0], moments[1]) and np.array_equal(moments[0], moments[3])
        assert np.abs(moments[0] - moments[2]).max() <= 1 / 30
        assert np.allclose(np.diff(moments[0]), 0.16)


def test_a_rate_heeds_irregular_times():
    """The second half of a film has a quarter of the frames per second: a clip by rate takes them as often as time passes."""
    seconds = [n / 40 for n in range(80)] + [2 + n / 10 for n in range(20)]
    chosen = Sampling(8, stride=5, rate=10).choose(Timeline(seconds), 1, None)[0]
    assert np.abs(np.array(seconds)[chosen] - np.arange(8) * 0.5 % 3.9).max() < 0.12
    assert Sampling(8, stride=5).choose(Timeline(seconds), 1, None)[0].tolist() == list(range(30, 70, 5))


def test_sides():
    assert (
        ShortSide(256)(240, 320) == (256, 341)
        and ShortSide(256)(720, 405) == (455, 256)
        and ShortSide(8)(8, 8) == (8, 8)
    )
    for size in ((224, 224), (64, 96)):
        for film in ((240, 320), (321, 177), (1080, 1920), (64, 64), (5, 1000)):
            height, width = Cover(size)(*film)
            assert height >= size[0] and width >= size[1] and (height == size[0] or width == size[1])


# Data sets.


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three films: 20, 30 and 40 frames, wide; and 25, 35 and 45, high."""
    root = tmp_path_factory.mktemp("films")
    for label, size, counts in (("wide", SIZE, (20, 30, 40)), ("high", (80, 60), (25, 35, 45))):
        for number, count in enumerate(counts):
            write_film(root / label / f"{number}.mp4", count, size=size, options={"g": "12", "bf": "2"})
    return root


PLAIN = clip_eval_transform((0.0,) * 3, (1.0,) * 3)


def dataset(films: Any, clips: int = 0, transform: Any = None, **how: Any) -> ClipDataset:
    source = how.pop("source", None) or open_films(films)
    fit = how.pop("fit", Cover(SIZE))
    return ClipDataset(source, transform or PLAIN, how.pop("sampling", Sampling(4)), fit=fit, clips=clips, **how)


def shown(clip: torch.Tensor) -> list[int]:
    """Numbers of the frames of a clip (C, T, H, W) without normalisation."""
    return numbers_in((clip * 255).round().movedim(1, 0))


def test_a_clip_holds_the_frames_that_were_chosen(films: Path):
    """In training one, (C, T, H, W); in evaluation several, the same in all epochs."""
    data = dataset(films)
    high = data[0, 0]
    assert high["image"].shape == (3, 4, 85, 64) and (high["label"], high["name"]) == (0, "high/0.mp4")
    wide = data[0, 5]
    assert wide["image"].shape == (3, 4, *SIZE) and (wide["label"], wide["index"], wide["skipped"]) == (1, 5, [])
    numbers = shown(wide["image"])
    assert np.diff(numbers).tolist() == [2, 2, 2] and 0 <= numbers[0] <= 32
    views = dataset(films, clips=3)
    clips = views[0, 5]["image"]
    assert clips.shape == (3, 3, 4, *SIZE) and torch.equal(clips, views[7, 5]["image"])
    assert [shown(clip) for clip in clips] == Sampling(4).choose(even(40), 3, None).tolist()


def test_a_clip_depends_on_seed_epoch_and_place_alone(films: Path):
    transform = clip_train_transform((32, 32), (0.5,) * 3, (0.5,) * 3, jitter=0.4, randaugment=(2, 7), erase=0.5)
    one, two = (dataset(films, transform=transform, seed=1) for _ in range(2))
    first = [one[epoch, index]["image"] for epoch in range(2) for index in range(6)]
    backwards = [two[epoch, index]["image"] for epoch in (1, 0) for index in range(5, -1, -1)]
    assert all(torch.equal(a, b) for a, b in zip(first, backwards[::-1], strict=True))
    assert not torch.equal(one[0, 5]["image"], one[1, 5]["image"])
    assert not torch.equal(one[0, 5]["image"], dataset(films, transform=transform, seed=2)[0, 5]["image"])
    starts = {shown(dataset(films)[epoch, 5]["image"])[0] for epoch in range(20)}
    assert len(starts) > 8


def test_any_number_of_workers_serves_the_same(films: Path):
    transform = clip_train_transform((32, 32), (0.5,) * 3, (0.5,) * 3)
    batches = {
        workers: [
            (b["image"], b["label"], b["name"])
            for epoch in range(2)
            for b in EpochLoader(dataset(films, transform=transform), 2, seed=3, num_workers=workers).batches(epoch)
        ]
        for workers in (0, 2)
    }
    assert len(batches[0]) == len(batches[2]) == 6
    for one, two in zip(batches[0], batches[2], strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]


def test_films_of_two_sizes_in_one_batch(films: Path):
    """Padded with zeros at the right and the bottom; each keeps its size."""
    data = dataset(films, clips=2)
    batch = data.collate([data[0, 0], data[0, 4]])
    assert batch["image"].shape == (2, 2, 3, 4, 85, 64) and batch["size"].tolist() == [[85, 64], [48, 64]]
    assert (batch["image"][1, ..., 48:, :] == 0).all() and torch.equal(
        batch["image"][1, ..., :48, :], data[0, 4]["image"]
    )
    assert (
        batch["label"].tolist() == [0, 1] and batch["name"] == ["high/0.mp4", "wide/1.mp4"] and batch["skipped"] == []
    )


def test_a_batch_of_nothing():
    data = dataset(
        None, source=Source(FolderStore(Path("/nowhere")), ["a.mp4"], [0], ["x", "y"]), replace_corrupt=False
    )
    sample = data[0, 0]
    batch = data.collate([sample, sample])
    assert sample == {"skipped": [("a.mp4", "the file is gone")]} and len(batch["skipped"]) == 2
    assert len(batch["image"]) == len(batch["label"]) == 0 and batch["size"].shape == (0, 2) and batch["name"] == []


@pytest.fixture
def damaged(films: Path, tmp_path: Path) -> Path:
    """The films, of which one is now text, one is empty, and one more has sound alone."""
    from film_files import write_sound

    for film in sorted(films.rglob("*.mp4")):
        target = tmp_path / "damaged" / film.relative_to(films)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(film.read_bytes())
    (tmp_path / "damaged/high/1.mp4").write_text("no film")
    (tmp_path / "damaged/wide/2.mp4").write_bytes(b"")
    write_sound(tmp_path / "damaged/wide/3.mp4")
    return tmp_path / "damaged"


def test_broken_films_are_replaced_in_training_and_left_out_in_evaluation(damaged: Path):
    """Each is told with its reason: in training once more for each time that its turn comes."""
    training, held = dataset(damaged), dataset(damaged, clips=1, replace_corrupt=False)
    names = training.source.names
    assert names == [f"high/{i}.mp4" for i in range(3)] + [f"wide/{i}.mp4" for i in range(4)]
    sample = training[0, 1]
    assert (sample["name"], sample["label"], sample["index"]) == ("high/2.mp4", 0, 1)
    assert sample["skipped"] == [("high/1.mp4", "Invalid data found when processing input")]
    over = training[0, 5]  # round the end of the list
    assert over["name"] == "high/0.mp4" and [name for name, _ in over["skipped"]] == ["wide/2.mp4", "wide/3.mp4"]
    served = [name for b in EpochLoader(training, 7).batches(0) for name in b["name"]]
    assert len(served) == 7 and not {"high/1.mp4", "wide/2.mp4", "wide/3.mp4"} & set(served)
    batches = list(EpochLoader(held, 2, shuffle=False, drop_last=False, num_workers=1).batches(0))
    told = dict(entry for b in batches for entry in b["skipped"])
    assert sum(len(b["label"]) for b in batches) == 4 and set(told) == {"high/1.mp4", "wide/2.mp4", "wide/3.mp4"}
    assert told["wide/2.mp4"] == "empty file" and told["wide/3.mp4"] == "it has no moving pictures"


def test_films_that_are_all_broken_are_an_error(tmp_path: Path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "film.mp4").write_text("no film")
    for replace in (True, False):
        loader = EpochLoader(dataset(tmp_path, replace_corrupt=replace), 1, drop_last=replace)
        with pytest.raises(UsageError, match=r"None of the 2 .* can be read; the first: ./film.mp4 \(Invalid data"):
            list(loader.batches(0))


def test_films_in_a_zip_file(films: Path, tmp_path: Path):
    """Read from the archive, in loader processes too; one with a wrong checksum is broken."""
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as archive:
        for film in sorted(films.rglob("*.mp4")):
            archive.write(film, film.relative_to(films))
        archive.writestr("wide/text.mp4", "no film")
    zipped, plain = dataset(tmp_path / "films.zip", clips=1), dataset(films, clips=1)
    assert zipped.source.names[:6] == plain.source.names and zipped.source.classes == ["high", "wide"]
    assert torch.equal(zipped[0, 3]["image"], plain[0, 3]["image"])
    served = list(EpochLoader(zipped, 3, num_workers=2, shuffle=False, drop_last=False).batches(0))
    assert [n for b in served for n in b["name"]][:6] == plain.source.names
    assert {name for b in served for name, _ in b["skipped"]} == {"wide/text.mp4"}


def test_a_data_set_travels_to_other_processes(films: Path):
    data = dataset(films, transform=clip_train_transform((32, 32), (0.5,) * 3, (0.5,) * 3, randaugment=(4, 7)))
    assert torch.equal(pickle.loads(pickle.dumps(data))[1, 2]["image"], data[1, 2]["image"])


def test_masks_of_clips(films: Path):
    """For masked image modelling: drawn anew for each epoch and film, in the batch beside the clips."""
    square = clip_eval_transform((0.0,) * 3, (1.0,) * 3, (32, 32))
    data = dataset(films, transform=square, mask=MaskConfig((4, 32, 32), 8, (2, 4, 4), 0.5, "tube"))
    batch = data.collate([data[0, 0], data[0, 5]])
    assert batch["image"].shape == (2, 3, 4, 32, 32) and len(batch["mask"]) == 2
    assert torch.equal(batch["mask"][0], data[0, 0]["mask"]) and not torch.equal(data[0, 0]["mask"], data[1, 0]["mask"])


def test_grey_films(films: Path):
    grey = clip_eval_transform((0.0,), (1.0,))
    assert dataset(films, transform=grey, channels=1)[0, 5]["image"].shape == (1, 4, *SIZE)
    with pytest.raises(UsageError, match="a film has 3 channels where 4 are needed"):
        next(iter(EpochLoader(dataset(films, channels=4), 2).batches(0)))


def test_real_actions(shared_data: Path):
    """A folder per class of real films: every one can be read, and clips of each differ from frame to frame."""
    if not (shared_data / "actions").is_dir():
        pytest.skip("the real films are not beside this checkout")
    source = open_films(shared_data / "actions")
    assert source.labels is not None and source.classes == ["0", "1", "3", "4"]
    data = ClipDataset(source, PLAIN, Sampling(16), clips=1, replace_corrupt=False)
    for index in range(0, len(source), 7):
        sample = data[0, index]
        assert not sample["skipped"] and sample["image"].shape == (1, 3, 16, 64, 64)
        assert sample["image"].diff(dim=2).abs().max() > 0.1
        assert f"{source.classes[sample['label']]}/" in sample["name"]


def test_real_films_of_several_kinds_in_one_batch(shared_data: Path):
    """Kinetics-400 beside HMDB51 and UCF101, as a model of 224 pixels gets them for evaluation."""
    source = open_films(shared_data / "clips")
    data = ClipDataset(source, PLAIN, Sampling(8, stride=8), fit=Cover((112, 112)), clips=2, replace_corrupt=False)
    batch = data.collate([data[0, index] for index in range(len(data))])
    assert len(batch["name"]) == 9 and not batch["skipped"] and batch["image"].shape[:4] == (9, 2, 3, 8)
    assert (batch["size"].min(1).values == 112).all() and batch["label"].tolist() == [-1] * 9
    film = shared_data / "clips" / source.names[0]
    first = read_frames(
        film, film.name, lambda t: Sampling(8, stride=8).choose(t, 2, None)[0].tolist(), 3, Cover((112, 112))
    )
    height, width = batch["size"][0].tolist()
    assert torch.equal((batch["image"][0, 0, ..., :height, :width] * 255).round().movedim(1, 0), first.float())
