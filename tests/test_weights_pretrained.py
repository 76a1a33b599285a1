"""Directories with config.json and model.safetensors: ours, timm's, transformers' (R-CKPT-5, 6, R-RES-2, R-CHAN-2)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from random_models import random_swin, randomise
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer
from swinscale.tasks.simmim import SimMIM, SimMIMConfig
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import (
    convert_state_dict,
    from_pretrained,
    hashes,
    load_weights,
    read_config,
    read_metadata,
    save_pretrained,
    write_safetensors,
)

PREPROCESSING = {"mean": [0.5], "std": [0.25], "classes": ["cat", "dog"]}


@pytest.mark.parametrize("version", [1, 2])
def test_round_trip(version: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights bit for bit, every field of the configuration, and what was stored beside them."""
    model = random_swin(version, window_size=(2, 4), in_chans=2, pad="legacy", drop_path_rate=0.3)
    save_pretrained(model, tmp_path / "a" / "b", metadata={"preprocessing": PREPROCESSING, "task": {"name": "x"}})
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "model.safetensors"]
    for path in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "model.safetensors"):
        again = from_pretrained(path)
        assert again.config == model.config == read_config(path)
        assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
        assert read_metadata(path) == {"preprocessing": PREPROCESSING, "task": {"name": "x"}}
    assert not caplog.records
    record = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert record["model_type"] == "swinscale" and record["architecture"] == "SwinTransformer"


def test_a_lone_weight_file_describes_itself(tmp_path: Path) -> None:
    """R-RES-2: the windows travel inside the file."""
    save_pretrained(random_swin(2, window_size=3), tmp_path / "run")
    shutil.move(tmp_path / "run" / "model.safetensors", tmp_path / "mine.safetensors")
    assert from_pretrained(tmp_path / "mine.safetensors").config.window_size == ((3, 3), (3, 3))


def test_overrides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sizes are transferred, other fields replaced, and what was not loaded as it is gets logged."""
    model = random_swin(2)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path, num_classes=9, img_size=64, window_size=8, in_chans=1, drop_path_rate=0.0)
    assert again.config.pretrained_window_sizes == ((4, 4), (4, 4)) and again.config.drop_path_rate == 0
    assert again(torch.zeros(1, 1, 64, 64)).shape == (1, 9)
    assert "new classifier: 5 classes in the file, 9 in the model" in caplog.text and "3 → 1" in caplog.text
    with pytest.raises(UsageError, match="Did you mean 'window_size'"):
        from_pretrained(tmp_path, windw_size=8)
    with pytest.raises(UsageError, match="does not fit"):
        from_pretrained(tmp_path, embed_dim=48)


def test_simmim_directories(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The whole task is saved; from_pretrained takes its encoder."""
    caplog.set_level(logging.INFO)
    task = randomise(SimMIM(random_swin(num_classes=0), SimMIMConfig(mask_patch=8)))
    task.save_pretrained(tmp_path)
    encoder = from_pretrained(tmp_path)
    assert all(torch.equal(t, encoder.state_dict()[n]) for n, t in task.encoder.state_dict().items())
    assert "mask token and decoder" in caplog.text
    again = SimMIM(SwinTransformer(read_config(tmp_path)), SimMIMConfig(mask_patch=8))
    assert load_weights(again, tmp_path).plain
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in task.state_dict().items())
    assert read_metadata(tmp_path)["task"]["name"] == "simmim"


def test_compiled_models_are_saved_under_their_own_names(tmp_path: Path) -> None:
    save_pretrained(torch.compile(random_swin()), tmp_path)
    assert all(torch.equal(t, from_pretrained(tmp_path).state_dict()[n]) for n, t in random_swin().state_dict().items())


def test_overwriting_leaves_no_litter(tmp_path: Path) -> None:
    for seed in range(2):
        save_pretrained(random_swin(seed=seed), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert torch.equal(from_pretrained(tmp_path).norm.weight, random_swin(seed=1).norm.weight)


def test_mistakes(tmp_path: Path) -> None:
    """Each is one clear line."""
    with pytest.raises(UsageError, match=r"no file or directory 'swinv2_tiny_window8_256'. Check the path, or name"):
        from_pretrained("swinv2_tiny_window8_256")
    with pytest.raises(UsageError, match="holds no weights"):
        from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="Linear holds 0 networks of this library"):
        save_pretrained(nn.Linear(2, 2), tmp_path)
    with pytest.raises(UsageError, match="architecture"):
        save_pretrained(random_swin(), tmp_path, metadata={"architecture": "x"})
    save_pretrained(random_swin(), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    for content, words in (
        ("{", "not valid JSON"),
        ("[]", "not a configuration"),
        (json.dumps({"model_type": "vit"}), "type 'vit'"),
        (json.dumps({**record, "model": {**record["model"], "window_sise": 8}}), "Did you mean 'window_size'"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UsageError, match=words) as error:
            from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_directory(version: int, tmp_path: Path) -> None:
    """Its config.json gives the windows; outputs agree to 1e-5."""
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    name = "Swin" if version == 1 else "Swinv2"
    size = {"image_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    trained = {"pretrained_window_sizes": [3, 2]} if version == 2 else {}
    config = getattr(transformers, f"{name}Config")(**size, num_labels=5, **trained)
    theirs = randomise(getattr(transformers, f"{name}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path).eval()
    assert ours.config.pretrained_window_sizes == (((3, 3), (2, 2)) if version == 2 else ((0, 0), (0, 0)))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want, got = theirs(images).logits, ours(images)
    assert ((got - want).norm() / want.norm()).item() <= 1e-5
    assert read_metadata(tmp_path)["preprocessing"]["classes"] == [f"LABEL_{i}" for i in range(5)]


def test_timm_directory(tmp_path: Path) -> None:
    """timm records a name and how images are prepared; the name gives sizes and windows."""
    sizes = {"depths": (1, 1, 2), "num_heads": (1, 2, 4), "patch_size": 2}
    model = random_swin(2, **sizes)
    record: dict[str, Any] = {
        "architecture": "swinv2_micro_patch2_window4_32",
        "num_classes": 5,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "crop_pct": 0.9},
        "model_args": {**sizes, "embed_dim": 24},
    }
    (tmp_path / "config.json").write_text(json.dumps(record))
    write_safetensors(tmp_path / "model.safetensors", convert_state_dict(model.state_dict(), "timm"))
    again = from_pretrained(tmp_path)
    assert again.config == model.config
    assert read_metadata(tmp_path)["preprocessing"] == {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "crop_ratio": 0.9}


def test_bare_files_of_other_projects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R-CKPT-6: no name is needed where the tensors say everything; V2 windows are passed."""
    caplog.set_level(logging.WARNING)
    one, two = random_swin(1), random_swin(2)
    torch.save({"model": one.state_dict()}, tmp_path / "one.pth")
    torch.save(convert_state_dict(two.state_dict(), "timm"), tmp_path / "two.pth")
    assert from_pretrained(tmp_path / "one.pth").config == one.config
    assert from_pretrained(tmp_path / "two.pth", window_size=4).config == two.config
    assert not caplog.records
    with pytest.warns(UserWarning, match="assuming 8"):
        from_pretrained(tmp_path / "two.pth")


def test_hashes_are_verified(tmp_path: Path) -> None:
    """R-CKPT-7: a damaged and an exchanged weight file are found before they are used, by every way of loading."""
    for seed in (0, 1):
        save_pretrained(random_swin(seed=seed), tmp_path / str(seed))
    weights = tmp_path / "0/model.safetensors"
    whole = weights.read_bytes()
    recorded = json.loads((tmp_path / "0/config.json").read_text())["sha256"]
    assert recorded == {"model.safetensors": hashlib.sha256(whole).hexdigest()}
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), (tmp_path / "1/model.safetensors").read_bytes()):
        weights.write_bytes(content)
        for load in (from_pretrained, lambda path: load_weights(random_swin(), path)):
            for path in (tmp_path / "0", weights):
                with pytest.raises(UsageError, match="SHA-256") as error:
                    load(path)
                said = str(error.value)
                assert "\n" not in said and recorded["model.safetensors"] in said
                assert hashlib.sha256(content).hexdigest() in said and str(weights) in said
        assert from_pretrained(tmp_path / "0", verify=False).config == random_swin().config
        assert load_weights(random_swin(), tmp_path / "0", verify=False).plain
    assert read_metadata(tmp_path / "0") == {}
    with pytest.raises(UsageError, match="sha256"):
        save_pretrained(random_swin(), tmp_path / "2", metadata={"sha256": {}})


def test_directories_without_a_hash_load(tmp_path: Path) -> None:
    """As written before hashes were recorded, or with the record of a file that is elsewhere."""
    save_pretrained(random_swin(), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record.pop("sha256")
    for more in (
        {},
        {"sha256": {"../other": "0", "pytorch_model.bin": "0"}},
        {"sha256": "0"},
        {"sha256": {"model.safetensors": 0}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**record, **more}))
        assert torch.equal(from_pretrained(tmp_path).norm.weight, random_swin().norm.weight)


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    """Else the hash of a model would be another one each time it is exported."""
    for name in range(6):
        save_pretrained(random_swin(), tmp_path / str(name), metadata={"preprocessing": PREPROCESSING, "note": 'ä"\n'})
    for file in ("config.json", "model.safetensors"):
        assert len({(tmp_path / str(name) / file).read_bytes() for name in range(6)}) == 1


class Killed(BaseException):
    """Stands for the end of the process: no handler but ``finally`` runs."""


@pytest.mark.parametrize(("old", "times"), [("with a hash", 2), ("without", 1)])
def test_a_kill_while_saving(old: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or after each replacement of a file, also twice in a row: the directory loads, with one of the weights."""
    replace = os.replace

    def die(count: int, after: bool) -> None:
        """In the replacement number ``count`` of what has its final name."""
        left = [count]

        def dying(source: Any, target: Any) -> None:
            left[0] -= not Path(target).name.startswith(".")
            if left[0] or Path(target).name.startswith("."):
                return replace(source, target)
            if after:
                replace(source, target)
            raise Killed

        monkeypatch.setattr(os, "replace", dying)

    seen = set()
    for count, after in [(n, after) for n in (1, 2, 3) for after in (False, True)]:
        folder = tmp_path / f"{count} {after}"
        save_pretrained(random_swin(seed=0), folder, metadata={"preprocessing": PREPROCESSING})
        if old == "without":
            record = json.loads((folder / "config.json").read_text())
            record.pop("sha256")
            (folder / "config.json").write_text(json.dumps(record))
        for seed in range(1, times + 1):
            die(count, after)
            with pytest.raises(Killed):
                save_pretrained(random_swin(seed=seed), folder, metadata={"preprocessing": PREPROCESSING})
        monkeypatch.setattr(os, "replace", replace)
        weight = from_pretrained(folder).norm.weight
        known = [s for s in range(times + 1) if torch.equal(weight, random_swin(seed=s).norm.weight)]
        assert len(known) == 1
        seen |= set(known)
        save_pretrained(random_swin(seed=9), folder, metadata={"preprocessing": PREPROCESSING})
        assert torch.equal(from_pretrained(folder).norm.weight, random_swin(seed=9).norm.weight)
        assert len(json.loads((folder / "config.json").read_text())["sha256"]["model.safetensors"]) == 64
    assert {0, times} <= seen  # the kills came before and after the weights were there


def test_a_kill_while_another_model_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old weights under the settings of the new model are an error of one line, not a model with other classes."""
    save_pretrained(random_swin(), tmp_path, metadata={"preprocessing": PREPROCESSING})
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        if Path(target).name == "model.safetensors":
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        save_pretrained(
            random_swin(seed=1), tmp_path, metadata={"preprocessing": {**PREPROCESSING, "classes": ["a", "b"]}}
        )
    with pytest.raises(UsageError, match="not the file that was saved with"):
        from_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path, verify=False).norm.weight, random_swin().norm.weight)


def test_weights_that_are_replaced_while_they_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading ``best`` of a run that is at work is no error."""
    save_pretrained(random_swin(), tmp_path)

    def slow(path: Path) -> str:
        monkeypatch.undo()
        save_pretrained(random_swin(seed=1), tmp_path)
        return hashes.sha256(path)

    monkeypatch.setattr(hashes, "sha256", slow)
    assert torch.equal(from_pretrained(tmp_path).norm.weight, random_swin(seed=1).norm.weight)
