"""The command line as a first-time user meets it: what works, and one clear line with exit code 2 for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from swinscale.cli import main
from swinscale.recipes import RECIPES, get_recipe

TINY = [
    "--model", "swinv2_pico_patch4_window4_32", "model.embed_dim=16", "model.depths=(1,1)", "train.epochs=1",
    "train.batch_size=6", "train.num_workers=0", "train.device=cpu",
]  # fmt: skip


@pytest.fixture
def trained(photos: Path, tmp_path: Path) -> dict[str, Path]:
    """A classifier and a SimMIM model trained for one epoch."""
    for name, recipe in (("classify", "photos_scratch"), ("simmim", "photos_simmim")):
        more = ["task.mask_patch=8"] if name == "simmim" else []
        assert main(["train", recipe, "--data", str(photos), "--out", str(tmp_path / name), *TINY, *more]) == 0
    return {name: tmp_path / name for name in ("classify", "simmim")}


def mistake(arguments: list[object], capsys) -> str:
    """The one line that a wrong command ends with."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("swinscale: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_evaluation_without_data_is_that_of_the_run(trained, capsys):
    """Where a run held out a share of its folder, evaluating it later does not take in the images it was trained on."""
    for kind in ("classify", "simmim"):
        assert main(["eval", str(trained[kind] / "last"), "--device", "cpu"]) == 0
        run = json.loads((trained[kind] / "result.json").read_text())["metrics"]
        held = json.loads((trained[kind] / "manifest.json").read_text())["eval_images"]
        out = capsys.readouterr().out
        assert f": {held} images" in out
        assert f"{run['loss']:.4g}" in out


def test_simmim_is_evaluated_at_another_size(trained, photos, capsys):
    arguments = ["eval", str(trained["simmim"] / "last"), "--data", str(photos), "--device", "cpu"]
    assert main([*arguments, "--img-size", "48", "--window", "6"]) == 0
    assert "at 48×48" in capsys.readouterr().out


def test_evaluate_and_predict(trained, photos, tmp_path, capsys):
    best = trained["classify"] / "best"
    assert main(["eval", str(best), "--device", "cpu"]) == 0
    assert main(["eval", str(best), "--data", str(photos), "--img-size", "48", "--window", "6", "--device", "cpu"]) == 0
    assert "top1" in capsys.readouterr().out
    picture = photos / "red" / "0.png"
    assert (
        main(["predict", str(picture), "--checkpoint", str(best), "--out", str(tmp_path / "out"), "--device", "cpu"])
        == 0
    )
    out = capsys.readouterr().out
    assert "red" in out
    assert "%" in out
    assert Image.open(tmp_path / "out" / "0_predicted.png").width >= 128


def test_simmim_checkpoint_reconstructs(trained, photos, tmp_path):
    out = tmp_path / "out"
    arguments = ["predict", str(photos / "red"), "--checkpoint", str(trained["simmim"] / "last"), "--out", str(out)]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert len(list(out.glob("*_reconstructed.png"))) == 8
    assert main(["eval", str(trained["simmim"] / "last"), "--data", str(photos), "--device", "cpu"]) == 0


def test_fine_tuning_starts_from_simmim_at_another_size(trained, photos, tmp_path):
    """R-MIM-8: the encoder is taken over; the trained window is carried along."""
    out = tmp_path / "tuned"
    size = ["model.img_size=48", "model.window_size=6"]
    init = ["--init", str(trained["simmim"] / "last")]
    assert main(["train", "photos_finetune", "--data", str(photos), "--out", str(out), *init, *TINY, *size]) == 0
    model = json.loads((out / "config.json").read_text())["model"]
    assert model["pretrained_window_sizes"] == [[4, 4], [4, 4]]
    assert model["window_size"] == [[6, 6], [6, 6]]


def test_resume_goes_on(trained, photos):
    out = str(trained["classify"])
    assert main(["train", "photos_scratch", "--data", str(photos), "--out", out, *TINY, "--resume"]) == 0


def test_a_run_is_repeated_from_its_record(trained, tmp_path):
    """R-SMALL-3: bit for bit on CPU."""
    for name in trained:
        again = tmp_path / f"{name}-again"
        assert main(["train", str(trained[name] / "config.json"), "--out", str(again)]) == 0
        before, after = (load_file(d / "last/model.safetensors") for d in (trained[name], again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_show_works_for_every_recipe(name, capsys):
    assert main(["show", name, "--data", "somewhere"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out
    assert "GMAC" in out


def test_show_works_for_models_at_any_size(capsys):
    assert main(["show", "swinv2_tiny_window8_256", "img_size=(300, 500)", "model.window_size=16"]) == 0
    out = capsys.readouterr().out
    assert "28,347,154 parameters" in out
    assert "75×125" in out
    assert "16×16" in out


def test_lists(capsys):
    assert main(["list", "models", "swinv2_*256"]) == 0
    assert "swinv2_tiny_window8_256" in capsys.readouterr().out
    assert main(["list", "recipes"]) == 0
    assert "desk_simmim" in capsys.readouterr().out


def test_recipes_carry_their_names_and_instructions():
    for name, function in RECIPES.items():
        assert get_recipe(name).name == name
        assert function.__doc__
        assert name in function.__doc__ or name == "simmim_swinv2_large_800ep", name


def test_missing_folder(tmp_path, capsys, photos):
    assert "Did you mean 'photos'?" in mistake(["train", "photos_scratch", "--data", tmp_path / "photo"], capsys)


def test_no_data_named(capsys):
    assert "--data PATH" in mistake(["train", "photos_scratch"], capsys)


def test_no_images(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    error = mistake(["train", "photos_scratch", "--data", tmp_path / "empty"], capsys)
    assert "No images" in error
    assert "1 other file" in error


def test_no_labels(tmp_path, capsys, photos):
    assert "no labels" in mistake(
        ["train", "photos_scratch", "--data", photos / "red", "--out", tmp_path / "x"], capsys
    )


def test_wrong_class_count(photos, tmp_path, capsys):
    arguments = ["train", "photos_scratch", "--data", photos, "--out", tmp_path / "x", *TINY, "model.num_classes=7"]
    assert "has 3 classes" in mistake(arguments, capsys)


def test_another_models_checkpoint(photos, tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(10, 512)}, tmp_path / "resnet.pth")
    arguments = ["train", "photos_finetune", "--data", photos, "--out", tmp_path / "x", *TINY]
    assert "resnet.pth" in mistake([*arguments, "--init", tmp_path / "resnet.pth"], capsys)


def test_checkpoint_of_another_size_of_swin(trained, photos, tmp_path, capsys):
    arguments = ["train", "photos_finetune", "--data", photos, "--out", tmp_path / "x", *TINY, "model.embed_dim=32"]
    assert "embed_dim" in mistake([*arguments, "--init", trained["simmim"] / "last"], capsys)


def test_checkpoint_that_is_not_there(photos, tmp_path, capsys):
    arguments = [
        "train",
        "photos_finetune",
        "--data",
        photos,
        "--out",
        tmp_path / "x",
        *TINY,
        "--init",
        tmp_path / "no",
    ]
    assert str(tmp_path / "no") in mistake(arguments, capsys)
    assert "no" in mistake(["predict", photos / "red" / "0.png", "--checkpoint", tmp_path / "no"], capsys)


def test_size_that_does_not_fit_the_mask_patch(photos, tmp_path, capsys):
    arguments = ["train", "photos_simmim", "--data", photos, "--out", tmp_path / "x", *TINY, "task.mask_patch=20"]
    error = mistake(arguments, capsys)
    assert "img_size=32 is not a multiple of mask_patch=20" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "photo_scratch"], "Did you mean 'photos_scratch'?"),
        (["show", "swinv2_tiny_window8_256", "img_sise=3"], "Did you mean 'img_size'?"),
        (["train", "no/config.json"], "no/config.json"),
        (["train", "photos_scratch", "train.epoch=3"], "Did you mean 'epochs'?"),
        (["train", "photos_scratch", "train.epochs=many"], "train.epochs='many'"),
        (["train", "photos_scratch", "--resum"], "--data PATH"),
        (["train", "photos_scratch", "--colour", "red"], "--colour"),
        (["train", "photos_scratch", "--model", "swinv2_tinny"], "Did you mean"),
        (["show", "photos_scratch", "model.num_heads=(5,5,5,5)"], "num_heads"),
        (["trian"], "trian"),
        ([], "command"),
        (["predict", "nothing.jpg"], "--checkpoint"),
    ],
)
def test_typing_mistakes(arguments, words, capsys):
    assert words in mistake(arguments, capsys)


@pytest.mark.parametrize(
    ("recipe", "setting", "allowed"),
    [
        ("photos_simmim", "train.epochs=-1", "greater than 0"),
        ("photos_simmim", "train.batch_size=0", "at least 1"),
        ("photos_simmim", "train.micro_batch=0", "at least 1"),
        ("photos_simmim", "train.num_workers=-1", "at least 0"),
        ("photos_simmim", "train.log_every=0", "at least 1"),
        ("photos_simmim", "train.ema_decay=2", "at least 0 and less than 1"),
        ("photos_simmim", "train.optim.lr=-1e-3", "at least 0"),
        ("photos_simmim", "train.optim.betas=(0.9,1.5)", "at least 0 and less than 1"),
        ("photos_simmim", "train.optim.layer_decay=0", "greater than 0 and at most 1"),
        ("photos_simmim", "task.mask_ratio=60", "greater than 0 and less than 1"),
        ("photos_simmim", "task.norm_target=-3", "at least 0"),
        ("photos_simmim", "task.norm_target=4", "odd"),
        ("photos_finetune", "task.label_smoothing=3", "at least 0 and less than 1"),
        ("photos_finetune", "task.mixup=-1", "at least 0"),
        ("photos_finetune", "data.labels_per_class=-4", "at least 0"),
        ("photos_finetune", "data.crop_ratio=0", "greater than 0 and at most 1"),
        ("photos_finetune", "data.eval_fraction=1.0", "greater than 0 and less than 1"),
    ],
)
def test_numbers_out_of_range(recipe, setting, allowed, photos, tmp_path, capsys):
    """Before anything is read or written, whatever the setting."""
    error = mistake(["train", recipe, "--data", photos, "--out", tmp_path / "run", setting], capsys)
    assert setting.split("=")[0] in error
    assert allowed in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--batch-size", "--img-size", "--window"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_options_out_of_range(option, value, trained, photos, capsys):
    error = mistake(["eval", trained["classify"] / "best", "--data", photos, option, value], capsys)
    assert option in error


def test_pictures_that_are_missing_or_broken(trained, tmp_path, capsys):
    best = trained["classify"] / "best"
    assert "No such picture" in mistake(["predict", tmp_path / "no.jpg", "--checkpoint", best], capsys)
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert "bad.jpg" in mistake(["predict", tmp_path / "bad.jpg", "--checkpoint", best, "--device", "cpu"], capsys)


def test_other_classes_at_evaluation(trained, photos, capsys):
    (photos / "red").rename(photos / "rouge")
    assert "rouge" in mistake(["eval", trained["classify"] / "best", "--data", photos, "--device", "cpu"], capsys)


def test_a_directory_with_a_run_is_kept(trained, photos, capsys):
    error = mistake(["train", "photos_scratch", "--data", photos, "--out", trained["classify"], *TINY], capsys)
    assert "already holds a run" in error
