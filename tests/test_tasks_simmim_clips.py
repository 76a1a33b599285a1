"""SimMIM on clips: decoder, targets, measures and pictures, weights from and to other models, and a watched run (R-DOWN-6)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.random_models import CLIP, random_swin, randomise
from torch import Tensor
from torch.utils.data import Dataset

from swinscale.data import MaskConfig, collate, mask_for_sample
from swinscale.diagnose.instrument import View
from swinscale.diagnose.mim import MaskedImageModelling, ProbeData, pooled_features
from swinscale.diagnose.pictures import MASKED, reconstruction_panels, to_picture
from swinscale.diagnose.vitals import Vitals
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.optim import OptimConfig
from swinscale.parallel import World
from swinscale.recipes import get_recipe, run
from swinscale.runlog import read_log
from swinscale.show import show, show_memory
from swinscale.tasks import SimMIM, SimMIMConfig, normalise_locally
from swinscale.tasks.neighbours import paint_from_neighbours
from swinscale.tasks.simmim import ClipShuffle, local_statistics
from swinscale.train import TrainConfig, train
from swinscale.weights import from_pretrained, load_weights, read_config, transfer_config

SHOWN = {"mean": [0.5] * 3, "std": [0.25] * 3}
HERE = World(0, 1, torch.device("cpu"))


def task(version: int = 2, seed: int = 0, options: dict[str, Any] | None = None, **fields: Any) -> SimMIM:
    """Of clips of 4 frames of 32 pixels: 2×8×8 tokens, then 2×4×4."""
    encoder = SwinTransformer(
        random_swin(version, **{**CLIP, "num_classes": 0, "drop_path_rate": 0.0, **fields}).config
    )
    simmim = SimMIM(encoder, SimMIMConfig(mask_patch=8, mask_mode="tube", **(options or {})), dict(SHOWN))
    return randomise(simmim, seed)


def tubes(batch: int, size: tuple[int, int, int] = (4, 32, 32), patch: int = 2) -> Tensor:
    config = MaskConfig(size, 8, (patch, 4, 4), mode="tube")
    return torch.stack([mask_for_sample(config, 0, 0, index) for index in range(batch)])


def pixels_of(mask: Tensor, frames: int = 2) -> Tensor:
    return mask.repeat_interleave(frames, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, None]


def as_images(clips: Tensor) -> Tensor:
    """(B, C, T, H, W) → (B·T, C, H, W)"""
    return clips.movedim(2, 1).flatten(0, 1)


def test_a_token_predicts_the_pixels_of_all_its_frames():
    simmim = task()
    assert tuple(simmim.decoder[0].weight.shape) == (3 * 2 * 8 * 8, 48, 1, 1, 1)
    with torch.no_grad():
        simmim.decoder[0].weight.zero_()
        simmim.decoder[0].bias.copy_(torch.arange(384))
        prediction = simmim.predict(torch.randn(1, 3, 4, 32, 32), tubes(1))
    patch = torch.arange(384.0).view(3, 2, 8, 8)
    assert torch.equal(prediction, patch.repeat(1, 1, 2, 4, 4))


def test_tokens_go_where_they_belong_and_single_frames_as_in_images():
    x = torch.randn(2, 5 * 3 * 16, 4, 3, 2)
    clip = ClipShuffle(3, 4)(x)
    for t, y, xx in ((0, 0, 0), (3, 2, 1), (1, 0, 1)):
        there = clip[:, :, 3 * t : 3 * t + 3, 4 * y : 4 * y + 4, 4 * xx : 4 * xx + 4]
        assert torch.equal(there.flatten(1), x[:, :, t, y, xx])
    x = torch.randn(2, 5 * 16, 4, 3, 2)
    assert torch.equal(as_images(ClipShuffle(1, 4)(x)), torch.nn.PixelShuffle(4)(as_images(x)))


@pytest.mark.parametrize("version", [1, 2])
def test_loss_is_the_mean_error_of_masked_pixels(version):
    simmim, clips, mask = task(version), torch.randn(2, 3, 4, 32, 32), tubes(2)
    loss, prediction, hidden = simmim.reconstruct(clips, mask)
    assert torch.equal(hidden, pixels_of(mask))
    expected = (prediction - clips).abs()[hidden.expand_as(clips)].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    changed = torch.where(hidden, torch.randn_like(clips), clips)
    assert torch.equal(simmim.predict(changed, mask), prediction), "hidden pixels do not reach the encoder"
    assert not torch.allclose(simmim.predict(clips + 1, mask), prediction)


@pytest.mark.parametrize(("patch", "size"), [(2, (5, 30, 42)), (1, (3, 32, 64)), (3, (1, 9, 32))])
def test_any_frames_height_and_width(patch, size):
    """Padding is cut off; ``patch_t`` of one frame and of several."""
    simmim = task(patch_size=(patch, 4, 4), options={"head_layers": 2, "norm_target": 5})
    tokens = [-(-n // p) for n, p in zip(size, (patch, 4, 4), strict=True)]
    loss, prediction, hidden = simmim.reconstruct(torch.randn(2, 3, *size), torch.rand(2, *tokens) < 0.6)
    assert prediction.shape == (2, 3, *size) and hidden.shape == (2, 1, *size) and loss.isfinite()
    with pytest.raises(UsageError, match=r"The mask has shape \(2, 1, 1, 1\)"):
        simmim.predict(torch.randn(2, 3, *size), torch.ones(2, 1, 1, 1, dtype=torch.bool))


@pytest.mark.parametrize(("version", "chans"), [(1, 1), (2, 4)])
def test_any_number_of_channels_learns(version, chans):
    """R-MIM-2: 20 steps lower the loss."""
    simmim = SimMIM(SwinTransformer(task(version, in_chans=chans).encoder.config), SimMIMConfig(mask_patch=8))
    clips = torch.randn(2, chans, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    optimizer, losses = torch.optim.AdamW(simmim.parameters(), lr=3e-3), []
    for _ in range(20):
        loss, _ = simmim({"image": clips, "mask": tubes(2)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_targets_are_normalised_within_a_frame():
    clips = torch.randn(2, 3, 4, 20, 33)
    frames = as_images(clips)
    assert torch.allclose(as_images(normalise_locally(clips, 7)), normalise_locally(frames, 7), atol=1e-5)
    for clip, single in zip(local_statistics(clips, 7), local_statistics(frames, 7), strict=True):
        assert torch.allclose(as_images(clip), single, atol=1e-6)


def test_neighbours_are_those_of_the_same_frame():
    clips, hidden = torch.randn(2, 3, 4, 32, 32), pixels_of(torch.rand(2, 2, 8, 8) < 0.6)
    painted = paint_from_neighbours(clips, hidden)
    assert torch.equal(as_images(painted), paint_from_neighbours(as_images(clips), as_images(hidden)))


@pytest.mark.parametrize("norm_target", [0, 5])
def test_measures_of_a_clip_of_one_moment_are_those_of_its_image(norm_target, monkeypatch):
    """R-MIM-6: the same prediction in all frames, tubes: loss, baselines and PSNR of the image."""
    still, guess, mask = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), tubes(2)
    options = SimMIMConfig(norm_target=norm_target)
    found = []
    for rank in (2, 3):
        encoder = random_swin(num_classes=0, **(CLIP if rank == 3 else {}))
        simmim = SimMIM(encoder, options, {"std": [0.2, 0.25, 0.3]})
        as_rank = {2: lambda x: x, 3: lambda x: x[:, :, None].expand(-1, -1, 4, -1, -1)}[rank]
        monkeypatch.setattr(simmim, "predict", lambda images, mask, fit=as_rank: fit(guess))
        metrics = simmim.new_metrics()
        simmim.update_metrics(metrics, {"image": as_rank(still), "mask": mask if rank == 3 else mask[:, 0]})
        found.append({name: metric.compute().item() for name, metric in metrics.items()})
    image, clip = found
    assert clip.keys() == image.keys() >= {"neighbour_loss", "mean_predictor_loss", "psnr"}
    assert clip == pytest.approx(image, rel=1e-4)
    assert image["loss"] > image["mean_predictor_loss"] > 0


def test_patches_must_be_square_within_a_frame():
    config = SwinConfig(img_size=(4, 32, 32), patch_size=(2, 4, 2), window_size=(2, 4, 4), num_classes=0)
    with torch.device("meta"), pytest.raises(UsageError, match=r"patch_size=\(2, 4, 2\).*square in height and width"):
        SimMIM(SwinTransformer(config))


def test_features_are_means_over_the_map():
    simmim, clips = task(), torch.randn(2, 3, 4, 32, 32)
    maps = simmim.encoder.forward_intermediates(clips, norm=True, intermediates_only=True)
    assert torch.allclose(simmim.features(clips), maps[-1].mean((2, 3, 4)), atol=1e-5)
    assert simmim.features(clips, 0).shape == (2, 24)


@pytest.mark.parametrize("norm_target", [0, 5])
def test_panels_show_the_middle_frame(norm_target, monkeypatch):
    """R-MIM-4."""
    simmim, mask = task(options={"norm_target": norm_target}), tubes(2)
    clips = (torch.rand(2, 3, 4, 32, 32) - 0.5) / 0.25
    monkeypatch.setattr(simmim, "predict", lambda clips, mask: simmim.target(clips))
    hidden = pixels_of(mask)[:, 0, 2].numpy()
    for clip, hides, panels in zip(clips, hidden, reconstruction_panels(simmim, clips, mask), strict=True):
        expected = to_picture(clip[:, 2], **SHOWN)
        assert (panels.input == expected).all()
        assert (panels.masked[hides] == MASKED).all() and (panels.masked[~hides] == expected[~hides]).all()
        assert np.abs(panels.reconstruction.astype(int) - expected).max() <= bool(norm_target)


class Clips(Dataset[dict[str, Any]]):
    """Clips of 4 frames whose brightness tells their class, one of two."""

    classes = ("dark", "bright")

    def __init__(self, count: int, mask: MaskConfig):
        self.count, self.mask = count, mask

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        epoch, index = item
        noise = torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(index))
        found = {"image": 0.3 * noise + 2 * (index % 2) - 1, "label": index % 2, "index": index, "skipped": []}
        return found | {"mask": mask_for_sample(self.mask, 0, epoch, index)}

    def fingerprint(self) -> str:
        return f"{len(self)} clips"

    collate = staticmethod(collate)


def test_a_run_is_watched(tmp_path):
    """Pictures, rank, probes and vital signs, as of images (R-MIM-6)."""
    simmim = task()
    mask = MaskConfig(simmim.encoder.config.img_size, 8, simmim.encoder.config.patch_size, mode="tube")
    training, held = Clips(16, mask), Clips(8, mask)
    optim = OptimConfig(lr=1e-3, lr_scaling="none", warmup_epochs=0)
    config = TrainConfig(epochs=2, batch_size=8, optim=optim, num_workers=0, eval_every=1, log_every=1, device="cpu")
    watching = MaskedImageModelling(tmp_path / "run", held, probe=ProbeData(training, held), probe_every=2.0)
    train(simmim, training, held, config, tmp_path / "run", instruments=[Vitals(2), watching])
    entries = read_log(tmp_path / "run")
    seen = [entry for entry in entries if entry["kind"] == "mim"]
    assert [e["step"] for e in seen] == [2, 4] and all(e["effective_rank"] > 1 for e in seen)
    assert seen[1]["linear_probe"] == 1.0 and seen[1]["probe_images"] == {"train": 16, "evaluation": 8}
    assert any("entropy/layers.0.blocks.0" in entry for entry in entries if entry["kind"] == "vitals")
    [evaluated] = [entry for entry in entries if entry["kind"] == "eval" and entry["step"] == 4]
    assert {"neighbour_loss", "psnr", "neighbour_psnr"} <= evaluated.keys()
    pictures = sorted((tmp_path / "run/reconstructions").iterdir())
    assert len(pictures) == 2 and Image.open(pictures[0]).width == 4 * 128 + 5 * 8
    again = SimMIM(SwinTransformer(read_config(tmp_path / "run/last")), simmim.config)
    assert load_weights(again, tmp_path / "run/last").plain, "a checkpoint of clips is read again as it was written"


@pytest.mark.slow
def test_real_films_are_pretrained_on(shared_data, tmp_path):
    """The desk recipe made smaller, as a run reads films: 20 steps on two of them, better than a colour, and a picture."""
    recipe = get_recipe("desk_video_simmim")
    fields = {"img_size": (8, 32, 32), "embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2)}
    optim = OptimConfig(lr=5e-3, lr_scaling="none", warmup_epochs=0)
    changes = {"epochs": 20, "batch_size": 2, "optim": optim, "eval_every": 0, "log_every": 1, "device": "cpu"}
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, **fields),
        task=dataclasses.replace(recipe.task, mask_patch=8),
        data=dataclasses.replace(recipe.data, train=str(shared_data / "clips"), limit=2),
        train=dataclasses.replace(recipe.train, **changes),
    )
    measures = run(recipe, tmp_path).metrics
    losses = [entry["loss"] for entry in read_log(tmp_path) if entry["kind"] == "train"]
    assert len(losses) == 20 and losses[-1] < 0.85 * losses[0]
    assert measures["loss"] < measures["mean_predictor_loss"]
    assert len(list((tmp_path / "reconstructions").iterdir())) == 1


def test_features_of_many_clips_are_read_in_small_batches(monkeypatch):
    """As many tokens at a time as of images: with 2 tokens along time 16 clips."""
    simmim = task()
    mask = MaskConfig(simmim.encoder.config.img_size, 8, simmim.encoder.config.patch_size, mode="tube")
    sizes = []
    whole = simmim.features
    monkeypatch.setattr(simmim, "features", lambda x, stage: (sizes.append(len(x)), whole(x, stage))[1])
    with torch.no_grad():
        features, labels = pooled_features(simmim, Clips(20, mask), 100, HERE)
        one = whole(Clips(20, mask)[0, 17]["image"][None])[0]
    assert sizes == [16, 4] and labels.tolist() == [0, 1] * 10
    assert torch.allclose(features[17], one, atol=1e-5)


def test_nothing_is_drawn_without_a_clip_that_can_be_read(tmp_path):
    class Broken(Clips):
        def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
            return {"index": item[1], "skipped": []}

    simmim = task()
    mask = MaskConfig(simmim.encoder.config.img_size, 8, simmim.encoder.config.patch_size, mode="tube")
    watching = MaskedImageModelling(tmp_path, Broken(4, mask))
    reading = watching.after_evaluation(View(simmim, 1, 1.0, 2, 5, "fp32", HERE), {"loss": 1.0})
    assert reading is not None and not reading.scalars and not (tmp_path / "reconstructions").exists()


@pytest.mark.parametrize("version", [1, 2])
def test_a_classifier_of_clips_takes_the_encoder(version):
    """R-MIM-8."""
    pretrained, classifier = task(version), random_swin(version, seed=1, **CLIP)
    report = load_weights(classifier, pretrained.state_dict())
    assert report.share == 1 and not report.unexpected
    assert "mask token and decoder of masked image modelling (3 tensors)" in report.left_out
    clips = torch.randn(2, 3, 4, 32, 32)
    assert torch.equal(classifier.forward_features(clips), pretrained.encoder.forward_features(clips))


@pytest.mark.parametrize("version", [1, 2])
def test_pretraining_on_clips_starts_from_pretraining_on_images(version, tmp_path):
    """R-MIM-8: the encoder and the mask token; a still clip under tubes has the features of the image. The decoder starts anew."""
    images = randomise(SimMIM(random_swin(version, num_classes=0), SimMIMConfig(mask_patch=8)), 3)
    images.save_pretrained(tmp_path)
    config = transfer_config(read_config(tmp_path), img_size=(4, 32, 32), window_size=(2, 4, 4))
    clips = SimMIM(SwinTransformer(config), SimMIMConfig(mask_patch=8, mask_mode="tube")).eval()
    decoder = clips.decoder[0].weight.clone()
    report = load_weights(clips, tmp_path)
    assert set(report.fresh) == {"decoder.0.weight", "decoder.0.bias"} and report.share == 1 and not report.unexpected
    assert report.fresh["decoder.0.bias"] == "file (192,), model (384,)"
    assert torch.equal(clips.decoder[0].weight, decoder) and torch.equal(clips.mask_token, images.mask_token)
    # With the image's decoder for each frame, the predictions are the image's.
    with torch.no_grad():
        for name in ("weight", "bias"):
            value = getattr(images.decoder[0], name).view(3, 1, 64, -1).expand(-1, 2, -1, -1)
            getattr(clips.decoder[0], name).copy_(value.reshape(getattr(clips.decoder[0], name).shape))
        still, mask = torch.randn(2, 3, 32, 32), tubes(2)
        expected = images.predict(still, mask[:, 0])[:, :, None].expand(-1, -1, 4, -1, -1)
        found = clips.predict(still[:, :, None].expand(-1, -1, 4, -1, -1), mask)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_what_was_saved_gives_the_encoder_to_others(tmp_path):
    task().save_pretrained(tmp_path)
    encoder, clips = from_pretrained(tmp_path), torch.randn(1, 3, 4, 32, 32)
    assert torch.equal(encoder.forward_features(clips), task().encoder.forward_features(clips))


@pytest.mark.parametrize("version", [1, 2])
def test_costs_and_memory_are_shown_before_a_run(version, capsys):
    """What ``swinscale show`` and ``swinscale show --memory`` call."""
    recipe = get_recipe("desk_simmim")
    options = dataclasses.replace(recipe.task, mask_mode="tube", mask_patch=8, norm_target=5)
    model = task(version).encoder.config
    recipe = dataclasses.replace(recipe, model=model, task=options)
    show(recipe)
    assert "forward pass at 4×32×32" in capsys.readouterr().out
    show_memory(recipe, 2, "16GB")
    assert "this recipe fits" in capsys.readouterr().out
