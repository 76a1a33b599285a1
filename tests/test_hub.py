"""The Hugging Face Hub: from and to repositories, every file verified (R-CKPT-7), offline, cards (R-LIC-1).

A server in a thread stands for the Hub (``hub_server``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_server import Hub, serving
from random_models import random_swin, randomise
from swinscale.cli import main
from swinscale.errors import UsageError
from swinscale.hub import push_to_hub
from swinscale.inference import load_pipeline
from swinscale.tasks import Classify, ClassifyConfig, SimMIM, SimMIMConfig
from swinscale.weights import convert_state_dict, from_pretrained, read_metadata, save_pretrained, write_safetensors
from swinscale.weights.hub import resolve

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("huggingface_hub.constants")

PREPROCESSING = {
    "img_size": [32, 32],
    "crop_ratio": None,
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "classes": list("abcde"),
}


class Site(Hub):
    """The Hub at an address that this process asks, until it is unplugged."""

    def __init__(self, unplug: Any):
        super().__init__()
        self.unplug = unplug


def ask(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As in a process that was started with HF_ENDPOINT=address, which huggingface_hub reads when it is imported."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as stack:
        hub = Site(stack.close)
        address = stack.enter_context(serving(hub))
        ask(monkeypatch, address)
        yield hub


def classifier(seed: int = 0) -> Classify:
    return Classify(random_swin(seed=seed), 5, ClassifyConfig(), PREPROCESSING)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refusal(path: str, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        from_pretrained(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def layouts(folder: Path) -> dict[str, Any]:
    """One model as a directory of ours, transformers', timm's, in shards, and as a pickled file."""
    sizes = {"depths": (1, 1, 2), "num_heads": (1, 2, 4), "patch_size": 2}
    model = random_swin(2, **sizes)
    (folder / "timm").mkdir(parents=True)
    save_pretrained(model, folder / "ours")
    record = {
        "architecture": "swinv2_micro_patch2_window4_32",
        "num_classes": 5,
        "model_args": {**sizes, "embed_dim": 24},
    }
    record["pretrained_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    (folder / "timm/config.json").write_text(json.dumps(record))
    write_safetensors(folder / "timm/model.safetensors", convert_state_dict(model.state_dict(), "timm"))
    (folder / "transformers").mkdir()
    record = {"model_type": "swinv2", "image_size": 32, "patch_size": 2, "embed_dim": 24, "window_size": 4}
    record |= {"depths": [1, 1, 2], "num_heads": [1, 2, 4], "architectures": ["Swinv2ForImageClassification"]}
    record["id2label"] = {str(i): f"label {i}" for i in range(5)}
    (folder / "transformers/config.json").write_text(json.dumps(record))
    images = {"image_mean": [0.4, 0.4, 0.4], "image_std": [0.3, 0.3, 0.3]}
    (folder / "transformers/preprocessor_config.json").write_text(json.dumps(images))
    state = convert_state_dict(model.state_dict(), "transformers")
    write_safetensors(folder / "transformers/model.safetensors", state)
    for name in ("shards", "pickled"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(record))
    torch.save(state, folder / "pickled/pytorch_model.bin")
    names = sorted(state)
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        write_safetensors(folder / "shards" / shard, {name: state[name] for name in part})
    index = {"weight_map": {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(names)}}
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    return {"model": model, "mean": {"timm": [0.1, 0.2, 0.3], "transformers": [0.4, 0.4, 0.4]}}


def test_repositories_of_every_layout(site: Site, tmp_path: Path) -> None:
    """R-CKPT-5: ours, timm's, transformers', sharded and pickled ones, the same as from a local directory."""
    known = layouts(tmp_path / "made")
    for name in ("ours", "timm", "transformers", "shards", "pickled"):
        site.upload(f"me/{name}", tmp_path / "made" / name)
        site.commit(f"me/{name}", {"training_args.bin": b"x" * 9000, "flax_model.msgpack": b"y" * 9000})
        model = from_pretrained(f"me/{name}")
        assert model.config == known["model"].config and same(model, known["model"]), name
        if name in known["mean"]:
            assert read_metadata(resolve(f"me/{name}"))["preprocessing"]["mean"] == known["mean"][name]
    assert not {"training_args.bin", "flax_model.msgpack"} & {*site.files_sent()}


def test_safetensors_are_preferred(site: Site, tmp_path: Path) -> None:
    save_pretrained(random_swin(), tmp_path / "ours")
    site.upload("me/both", tmp_path / "ours")
    site.commit("me/both", {"pytorch_model.bin": b"never read" * 1000})
    from_pretrained("me/both")
    assert "pytorch_model.bin" not in site.files_sent()


def test_push_and_back(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Weights bit for bit, what is stored beside them, one commit of three files; private unless asked otherwise."""
    task = classifier()
    address = push_to_hub(task, "me/photos", token="hf_writes")
    assert "none is stated" in caplog.text
    assert address.endswith(site.repos["me/photos"][0][0]) and len(site.repos["me/photos"]) == 1
    assert sorted(site.repos["me/photos"][0][1]) == ["README.md", "config.json", "model.safetensors"]
    assert site.private["me/photos"]
    assert same(from_pretrained("me/photos"), task.model)
    assert read_metadata(resolve("me/photos"))["preprocessing"] == PREPROCESSING
    pipeline = load_pipeline("hf-hub:me/photos")
    assert pipeline.classes == list("abcde") and same(pipeline.backbone, task.model)

    push_to_hub(random_swin(seed=1), "me/photos", token="hf_writes", licence="mit", card="# by hand\n")
    assert len(site.repos["me/photos"]) == 2 and site.repos["me/photos"][1][1]["README.md"] == b"# by hand\n"
    assert same(from_pretrained("me/photos"), random_swin(seed=1))
    assert same(from_pretrained("me/photos", revision=site.repos["me/photos"][0][0]), task.model)
    assert same(from_pretrained(f"me/photos@{site.repos['me/photos'][0][0]}"), task.model)
    push_to_hub(random_swin(), "me/open", token="hf_writes", private=False)
    assert not site.private["me/open"]


def test_simmim_repositories(site: Site) -> None:
    task = randomise(SimMIM(random_swin(num_classes=0), SimMIMConfig(mask_patch=8)))
    push_to_hub(task, "me/masked", token="hf_writes")
    assert same(from_pretrained("me/masked"), task.encoder)
    assert same(load_pipeline("me/masked").task, task)


def test_offline(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Downloaded once; then from the cache, also when nothing answers, with one line that says so."""
    save_pretrained(random_swin(), tmp_path / "ours")
    site.upload("me/ours", tmp_path / "ours")
    site.upload("me/other", tmp_path / "ours")
    from_pretrained("me/ours")
    sent = site.files_sent()
    assert sorted(sent) == ["config.json", "model.safetensors"]
    from_pretrained("me/ours")
    assert site.files_sent() == sent and not caplog.records

    site.unplug()
    assert same(from_pretrained("me/ours"), random_swin())
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "taken from the cache, commit" in caplog.text
    said = refusal("me/other")
    assert "not in the cache" in said and "give a local directory" in said
    caplog.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(from_pretrained("me/ours"), random_swin())
    assert not caplog.records  # that was asked for
    assert "not in the cache" in refusal("me/other") and "no file or directory 'me/other'" in refusal("me/other")
    assert "not in the cache" in refusal("me/ours", cache_dir=tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_on_the_way(name: str, site: Site, tmp_path: Path) -> None:
    """One changed bit is found in small and large files, and what the message says helps."""
    save_pretrained(random_swin(), tmp_path / "ours")
    site.upload("me/ours", tmp_path / "ours")
    site.damaged = {name}
    said = refusal("me/ours")
    assert f"{name} of" in said and "is damaged" in said and "Delete" in said
    assert said == refusal("me/ours")  # the damaged file is still in the cache
    site.damaged = set()
    Path(said.partition("Delete ")[2].partition(" and download")[0]).unlink()
    assert same(from_pretrained("me/ours"), random_swin())


def test_damaged_in_the_cache(site: Site, tmp_path: Path) -> None:
    """Files are verified whenever they are used, unless that is turned off."""
    save_pretrained(random_swin(), tmp_path / "ours")
    site.upload("me/ours", tmp_path / "ours")
    file = resolve("me/ours") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    assert "SHA-256" in refusal("me/ours")
    site.unplug()
    assert "SHA-256" in refusal("me/ours")
    assert not same(from_pretrained("me/ours", verify=False), random_swin())


def test_exchanged_by_the_owner(site: Site, tmp_path: Path) -> None:
    """The Hub's hash fits its file, but not the one that was recorded when the model was saved."""
    for seed in (0, 1):
        save_pretrained(random_swin(seed=seed), tmp_path / str(seed))
    site.upload("me/ours", tmp_path / "0")
    site.commit("me/ours", {"model.safetensors": (tmp_path / "1/model.safetensors").read_bytes()})
    assert "not the file that was saved with" in refusal("me/ours")


def test_what_the_hub_refuses(site: Site, tmp_path: Path) -> None:
    """Each is one line that says what to do."""
    save_pretrained(random_swin(), tmp_path / "ours")
    for repo in ("me/ours", "me/gated"):
        site.upload(repo, tmp_path / "ours")
    site.gated = {"me/gated"}
    site.commit("me/text", {"README.md": b"words"})
    assert "no repository 'me/nothing'" in refusal("me/nothing") and "hf auth login" in refusal("me/nothing")
    assert "gated" in refusal("me/gated")
    assert "no revision 'v2'" in refusal("me/ours@v2") and "no revision 'v2'" in refusal("me/ours", revision="v2")
    assert "holds no weights" in refusal("me/text") and "found README.md" in refusal("me/text")
    site.commit("me/parts", {"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'})
    assert "lacks gone.safetensors" in refusal("me/parts")
    site.commit("me/vit", {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"z" * 9000})
    assert "type 'vit'" in refusal("me/vit")


def test_what_is_a_path_stays_one(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory wins over a repository of its name, and a slip in a path is not sent anywhere."""
    monkeypatch.chdir(tmp_path)
    save_pretrained(random_swin(seed=1), "me/ours")
    save_pretrained(random_swin(), "elsewhere")
    site.upload("me/ours", tmp_path / "elsewhere")
    assert same(from_pretrained("me/ours"), random_swin(seed=1))
    for wrong in ("me/our", "best", "a/b/c", "/none/such", "x/model.safetensors", "runs/x.pth", "a b/c", "../x"):
        assert f"no file or directory '{wrong}'" in refusal(wrong)
    assert "hf-hub:me/our" in refusal("me/our")
    assert "names no repository" in refusal("hf-hub:ours")
    assert not site.asked
    assert same(from_pretrained("hf-hub:me/ours"), random_swin())


def test_what_push_refuses(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(random_swin(), tmp_path / "ours")
    (tmp_path / "empty").mkdir()

    def push(
        source: Any = tmp_path / "ours", repo: str = "me/ours", token: str | None = "hf_writes", **more: Any
    ) -> str:
        with pytest.raises(UsageError) as error:
            push_to_hub(source, repo, token=token, **more)
        assert "\n" not in str(error.value)
        return str(error.value)

    for wrong in ("ours", "a/b/c", "me/ours@main", "me/--x", "me/ours.git", "me/" + "x" * 100):
        assert "no name of a repository" in push(repo=wrong)
    assert "There is no directory" in push(tmp_path / "none")
    assert "holds no config.json" in push(tmp_path / "empty")
    assert "no identifier" in push(licence="MIT License")
    assert "no token" in push(token=None)
    assert not site.asked
    assert "refuses the token" in push(token="hf_reads")
    site.refuses = (400, "license must be one of: mit")
    assert "license must be one of: mit" in push()
    site.unplug()
    assert "was not published" in push() and "license" not in push()
    with (tmp_path / "ours/model.safetensors").open("rb+") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert "is damaged" in push()
    layouts(tmp_path / "made")
    assert "not swinscale's" in push(tmp_path / "made/timm")


TINY = [
    "--model", "swinv2_pico_patch4_window4_32", "model.embed_dim=16", "model.depths=(1,1)", "train.epochs=2",
    "train.batch_size=6", "train.num_workers=0", "train.device=cpu", "train.eval_every=1",
]  # fmt: skip


def test_a_run_is_published(
    site: Site, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The card says what the run recorded, as files that are read again, and nothing of the machine's folders."""
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    run = tmp_path / "runs/photos"
    assert main(["train", "photos_scratch", "--data", str(photos), "--out", str(run), *TINY]) == 0
    best = run / "best"
    before = sorted(best.iterdir())
    site.unplug()
    arguments = ["push", str(best), "me/photos", "--licence", "mit", "--data-note", "Coloured noise, made for a test."]
    assert main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    card = (best / "README.md").read_text()
    assert f"{(best / 'model.safetensors').stat().st_size:,} bytes  model.safetensors" in out
    assert f"{len(card.encode()):,} bytes  README.md" in out and not site.asked
    parsed = huggingface_hub.ModelCard(card)
    data = parsed.data
    front = {"license": "mit", "library_name": "swinscale", "pipeline_tag": "image-classification"}
    assert front.items() <= data.to_dict().items()
    best_top1 = json.loads((run / "result.json").read_text())["best"]
    measured = {r.metric_type: r.metric_value for r in data.eval_results}
    assert measured["accuracy"] == round(best_top1, 6) and {r.dataset_name for r in data.eval_results} == {"photos"}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    evaluations = [e for e in log if e["kind"] == "eval"]
    chosen = max(evaluations, key=lambda e: e["top1"])
    assert measured["loss"] == round(chosen["loss"], 6) and f"log.jsonl, step {chosen['step']} of" in card
    manifest = json.loads((run / "manifest.json").read_text())
    assert f"{manifest['train_images']} (fingerprint `{manifest['data']['train']}`)" in card
    assert manifest["versions"]["torch"] in card and "Coloured noise, made for a test." in card
    assert str(tmp_path) not in card and "blue, green, red" in card and "top-5" not in card
    (tmp_path / "recipe.json").write_text(card.partition("```json\n")[2].partition("\n```")[0])
    again = ["train", str(tmp_path / "recipe.json"), "--data", str(photos), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    assert same(from_pretrained(tmp_path / "again/best"), from_pretrained(best))

    card_path = best / "README.md"
    card_path.write_text(card + "\nMore.\n")
    assert main([*arguments, "--dry-run"]) == 2
    assert "exists and differs" in capsys.readouterr().err and card_path.read_text().endswith("More.\n")
    assert main([*arguments]) == 2
    assert "was not published" in capsys.readouterr().err
    with serving(site) as address:
        ask(monkeypatch, address)
        assert main(["push", str(best), "me/photos", "--card", str(card_path), "--public", "--message", "first"]) == 0
        assert "Published: http" in capsys.readouterr().out and not site.private["me/photos"]
        assert site.repos["me/photos"][0][1]["README.md"].decode().endswith("More.\n")
        pictures = str(photos / "red/0.png")
        assert main(["predict", pictures, "--checkpoint", "me/photos", "--device", "cpu"]) == 0
        assert main(["eval", "me/photos", "--data", str(photos), "--device", "cpu"]) == 0
        assert "24 images" in capsys.readouterr().out
        code = card.partition("```python\n")[2].partition("```")[0].replace("image.jpg", pictures)
        exec(compile(code, "card", "exec"), {})
        arguments = ["train", "photos_finetune", "--data", str(photos), "--out", str(tmp_path / "tuned"), *TINY]
        assert main([*arguments, "--init", "hf-hub:me/photos"]) == 0
        assert main(["push", str(tmp_path / "tuned/best"), "me/tuned", "--licence", "mit"]) == 0
        assert (
            huggingface_hub.ModelCard(site.repos["me/tuned"][0][1]["README.md"].decode()).data.base_model == "me/photos"
        )
    assert len(before) + 1 == len(list(best.iterdir()))
    assert main(["push", str(run), "me/photos", "--dry-run"]) == 2
    assert f"Did you mean {best}" in capsys.readouterr().err


def test_card_of_an_unknown_past(site: Site, tmp_path: Path) -> None:
    """Nothing is made up: no licence, data, measures or versions where none are recorded."""
    save_pretrained(random_swin(pretrained_window_sizes=3), tmp_path / "ours")
    push_to_hub(tmp_path / "ours", "me/ours", token="hf_writes")
    card = site.repos["me/ours"][0][1]["README.md"].decode()
    data = huggingface_hub.ModelCard(card).data
    assert data.license is None and data.eval_results is None and data.datasets is None
    assert "## Licence\n\nNot stated." in card and "Measures of these weights: not recorded" in card
    assert "settings, versions and machine: not recorded" in card and "| training images | not recorded |" in card
    assert "| position bias scaled to windows of | 3×3 tokens |" in card
    count = sum(p.numel() for p in random_swin().parameters())
    assert f"| parameters | {count:,} (F32) |" in card
    exec(compile(card.partition("```python\n")[2].partition("```")[0], "card", "exec"), {})


def test_card_of_a_detector(site: Site, tmp_path: Path, capsys: Any) -> None:
    """It says what the detector is, its classes and measures, and code that detects; no path of the machine."""
    from coco_files import rectangles
    from test_detection_foreign import SETTINGS

    rectangles(tmp_path / "pets", 4)
    (tmp_path / "here").mkdir()
    arguments = ["train", "desk_mask_rcnn_swinv2", "--data", str(tmp_path / "pets"), "--out", str(tmp_path / "run")]
    assert main([*arguments, *SETTINGS, "train.eval_every=1"]) == 0
    best = tmp_path / "run" / "best"
    assert main(["push", str(best), "me/pets", "--dry-run"]) == 0 and not site.asked
    card = (best / "README.md").read_text()
    assert f"{len(card.encode()):,} bytes  README.md" in capsys.readouterr().out and str(tmp_path) not in card
    assert (
        "with a detector for object detection and instance segmentation (Mask R-CNN), trained with the recipe" in card
    )
    assert "| detector | Mask R-CNN |" in card and "| classes | 2: dog, cat |" in card and "| classes | 2 |" in card
    assert "| evaluation images | the training images |" in card
    assert "pictures of any size" in card and "| size | short side 64 pixels, long side at most 96 |" in card
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    chosen = max((e for e in log if e["kind"] == "eval"), key=lambda e: e["box_ap"])
    assert f"| AP of boxes | {100 * chosen['box_ap']:.2f} % |" in card and "| mask_ap_small |" in card
    data = huggingface_hub.ModelCard(card).data
    assert data.pipeline_tag == "object-detection" and {r.task_type for r in data.eval_results} == {"object-detection"}
    assert {r.metric_type: r.metric_value for r in data.eval_results}["mask_ap"] == round(chosen["mask_ap"], 6)
    code = card.partition("```python\n")[2].partition("```")[0]
    picture = str(tmp_path / "pets" / "train2017" / "1.png")
    exec(compile(code.replace("me/pets", str(best)).replace("image.jpg", picture), "card", "exec"), {})
    assert "predict image.jpg --checkpoint me/pets" in card and "swinscale[detect,hub]" in card
    boxes = write_detector(tmp_path / "here" / "plain")
    assert (
        "object detection (Cascade R-CNN)" in boxes and "instance" not in boxes and "| training images | not" in boxes
    )
    assert "| size | short side 480, 800 pixels, long side at most 1333 |" in boxes


def write_detector(directory: Path) -> str:
    """The card of a detector of boxes that no run stands around."""
    from small_detectors import small_detector
    from swinscale.card import model_card
    from swinscale.tasks.detect import Detect

    model = small_detector("cascade", masks=False, test_short=(480, 800))
    preprocessing = {**PREPROCESSING, "test_short": 64, "test_long": 96, "classes": ["a", "b", "c"]}
    Detect(model, ["a", "b", "c"], preprocessing).save_pretrained(directory)
    return model_card(directory, "me/plain")


def test_card_of_bundled_data_and_of_last(tmp_path: Path) -> None:
    """The data set is named as on the Hub; ``last`` has the measures of the final step; a cut-short run has none."""
    from swinscale.card import model_card
    from swinscale.config import to_dict
    from swinscale.recipes import get_recipe

    recipe = to_dict(get_recipe("desk_simmim"))
    save_pretrained(randomise(SimMIM(random_swin(num_classes=0, in_chans=1), SimMIMConfig(mask_patch=8))), tmp_path / "last",
                    metadata={"task": {"name": "simmim"}})  # fmt: skip
    recipe["model"] = json.loads((tmp_path / "last/config.json").read_text())["model"]
    (tmp_path / "config.json").write_text(json.dumps({**recipe, "init": "/home/someone/runs/first/best"}))
    card = model_card(tmp_path / "last", "me/masked")
    assert "Measures of these weights: not recorded" in card and "the run had not ended" in card
    assert "| weights at the start | first/best |" in card and "someone" not in card
    result = {"steps": 7, "metrics": {"loss": 0.25, "unreadable": 0.0}, "best": 0.2, "seconds": 1.0}
    (tmp_path / "result.json").write_text(json.dumps(result))
    card = model_card(tmp_path / "last", "me/masked")
    data = huggingface_hub.ModelCard(card).data
    assert data.datasets == ["zalando-datasets/fashion_mnist"] and data.pipeline_tag == "image-feature-extraction"
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("loss", 0.25)]
    assert "result.json, step 7" in card


def test_without_the_package(tmp_path: Path) -> None:
    """R-INST-1: local directories neither need nor import huggingface_hub; a repository asks for it in one line."""
    save_pretrained(random_swin(), tmp_path)
    code = """
import sys
sys.modules["huggingface_hub"] = None
import swinscale
swinscale.from_pretrained(sys.argv[1])
try:
    swinscale.from_pretrained("me/ours")
except swinscale.UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "pip install 'swinscale[hub]'" in done.stdout and done.stdout.count("\n") == 1, done.stderr[-2000:]
    code = "import sys, swinscale; swinscale.from_pretrained(sys.argv[1]); print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr[-2000:]
