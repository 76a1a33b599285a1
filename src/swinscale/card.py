"""A model card: the README.md of a published model, made of what was recorded when it was trained, and of nothing else.

What is not recorded is said to be so. Of paths on the machine that trained, only the last names go into a card.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from swinscale.config import differences
from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig, format_size
from swinscale.weights import read_config, read_metadata
from swinscale.weights.hashes import recorded_hashes

NOT_RECORDED = "not recorded"
BUNDLED = {"bundled:fashion-mnist": "zalando-datasets/fashion_mnist"}
"""Images that come with this package → the data set on the Hub that they were taken from."""
MEASURES = {
    "loss": "loss",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_predictor_loss": "loss of the mean",
    "neighbour_loss": "loss of painting from neighbours",
    "psnr": "PSNR, dB",
    "neighbour_psnr": "PSNR of painting from neighbours, dB",
    "miou": "mean IoU",
    "macc": "mean accuracy of the classes",
    "aacc": "accuracy of all pixels",
    "box_ap": "AP of boxes",
    "box_ap50": "AP of boxes at IoU 0.5",
    "box_ap75": "AP of boxes at IoU 0.75",
    "mask_ap": "AP of masks",
    "mask_ap50": "AP of masks at IoU 0.5",
    "mask_ap75": "AP of masks at IoU 0.75",
}
SHARES = ("top", "box_a", "mask_a")
"""Beginnings of measures between 0 and 1, which are read in per cent."""
DENSE = ("detect", "segment")
DETECTORS = {"mask_rcnn": "Mask R-CNN", "cascade": "Cascade Mask R-CNN", "htc": "Hybrid Task Cascade"}
KINDS = {"top1": "accuracy"}
"""Measures by the names that the Hub's metadata has for them."""
SHOWN_CLASSES = 20


def model_card(directory: Path, repo_id: str, *, licence: str | None = None, data_note: str | None = None) -> str:
    """README.md of the model in ``directory``: YAML that the Hub reads, then text that people read.

    Args:
        directory: config.json and model.safetensors of this library. Where it is ``best`` or ``last`` of a run, data,
            recipe, versions and measures are those that the run recorded.
        repo_id: "owner/name", for the title and the lines that show how to use it.
        licence: identifier as on the Hub, such as "mit" or "cc-by-nc-4.0"; None: the card says that none is stated.
        data_note: what should be known of the training images: source, licence, consent.

    Raises:
        UsageError: for a directory that holds no model, or a licence that is no identifier.
    """
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise UsageError(
            f"licence='{licence}' is no identifier: write it as on the Hub, such as mit, apache-2.0, cc-by-nc-4.0, other."
        )
    config = read_config(directory)
    assert config is not None, "the caller has looked"
    record, run = read_metadata(directory), _read_run(directory)
    task = record.get("task", {}).get("name") or ("classify" if config.num_classes else "backbone")
    results = _results(directory, run, config)
    preprocessing = record.get("preprocessing") or {}
    if task in DENSE and (scales := record["task"].get("test_short")):
        sides = _list(scales) if task == "detect" else scales
        preprocessing = {**preprocessing, "test_short": sides, "test_long": record["task"]["test_long"]}
    sections = [
        _summary(config, task, run, record),
        "## Use\n\n" + _usage(repo_id, task, record),
        "## Model\n\n" + _model(directory, config, record),
        "## Preprocessing\n\n" + _preprocessing(config, preprocessing),
        "## Data\n\n" + _data(run, data_note),
        "## Training\n\n" + _training(run),
        "## Measured results\n\n" + _measured(results, run),
        "## Limitations\n\n" + _limitations(config, task, run, results),
        "## Licence\n\n" + (f"{licence}, as stated by who published it." if licence else "Not stated."),
    ]
    title = repo_id.rpartition("/")[2]
    front = _front_matter(title, config, task, run, results, licence)
    return f"---\n{front}\n---\n\n# {title}\n\n" + "\n\n".join(sections) + "\n"


def _read_run(directory: Path) -> dict[str, Any]:
    """What the run that wrote ``directory`` left beside it: recipe, manifest, result and log; empty where there is none."""
    around = directory.resolve().parent
    recipe = _read_json(around / "config.json")
    if (
        directory.resolve().name not in ("best", "last")
        or not {"name", "model", "task", "data", "train"} <= recipe.keys()
    ):
        return {}
    model = _read_json(directory / "config.json").get("model")
    if any(name in recipe["model"] for name, *_ in differences(recipe["model"], model)):
        return {}  # a model from elsewhere
    from swinscale.runlog import read_log

    manifest, result = _read_json(around / "manifest.json"), _read_json(around / "result.json")
    return {"recipe": _public(recipe), "manifest": manifest, "result": result, "log": read_log(around)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _public(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the folders of the machine that it ran on."""
    data = {
        **recipe["data"],
        **{n: _last_names(recipe["data"][n], 1) for n in ("train", "eval", "semantic") if n in recipe["data"]},
    }
    return {**recipe, "data": data, "init": _last_names(recipe.get("init"), 2)}


def _last_names(path: str | None, count: int) -> str | None:
    """``/home/me/photos`` → ``photos``; names of bundled data and of repositories stay as they are."""
    if not path or path.startswith(("bundled:", "hf-hub:")):
        return path
    parts = [part for part in re.split(r"[\\/]+", path) if part] or [""]
    return "/".join(parts[-count:] if parts[-1] in ("best", "last") else parts[-1:])


def _results(directory: Path, run: dict[str, Any], config: SwinConfig) -> dict[str, Any]:
    """What was measured with these weights: "values" by name, and "source", the file and step that they come from.

    ``last`` holds the weights of the final step, whose measures ``result.json`` has; ``best`` those of the evaluation
    that was better than all before. While a run goes on, nobody knows which step ``last`` is of.
    """
    result = run.get("result") or {}
    evaluations = [e for e in run.get("log", ()) if e["kind"] == "eval"]
    if not run or not (result or evaluations):
        return {}
    if directory.resolve().name == "last":
        values, source = result.get("metrics", {}), f"result.json, step {result.get('steps')}"
    else:
        recipe = run["recipe"]["task"]
        metric = "top1" if "label_smoothing" in recipe else "box_ap" if "head" in recipe else "loss"
        known = [e for e in evaluations if e.get(metric) is not None and math.isfinite(e[metric])]
        if not known:
            return {}
        values = (min if metric == "loss" else max)(known, key=lambda e: e[metric])  # the first one of equal ones
        if result and values[metric] != result.get("best"):
            return {}
        source = f"log.jsonl, step {values['step']}" + ("" if result else "; the run had not ended")
    hidden = ("unreadable",) if config.num_classes > 5 else ("unreadable", "top5")  # among five classes it is always 1
    shown = {n: v for n, v in values.items() if isinstance(v, float) and math.isfinite(v) and n not in hidden}
    return {"values": shown, "source": source, "unreadable": values.get("unreadable")} if shown else {}


def _front_matter(
    title: str, config: SwinConfig, task: str, run: dict[str, Any], results: dict[str, Any], licence: str | None
) -> str:
    """YAML, in the part of it that is JSON."""
    seen = "video" if config.rank == 3 else "image"
    kind = f"{seen}-classification" if task == "classify" else "image-feature-extraction"
    kind = {"detect": "object-detection", "segment": "image-segmentation"}.get(task, kind)
    front: dict[str, Any] = {"license": licence} if licence else {}
    front |= {"library_name": "swinscale", "pipeline_tag": kind}
    front["tags"] = ["swin-transformer", "swin" if config.version == 1 else "swinv2", "vision"]
    front["tags"] += ["simmim", "self-supervised"] if task == "simmim" else []
    trained_on = run["recipe"]["data"].get("train") if run else None
    if trained_on in BUNDLED:
        front["datasets"] = [BUNDLED[trained_on]]
    if run and (start := run["recipe"].get("init") or "").startswith("hf-hub:"):
        front["base_model"] = start.removeprefix("hf-hub:").partition("@")[0]
    if results:
        name = run["recipe"]["data"].get("eval") or trained_on or NOT_RECORDED
        found = {
            "task": {"type": kind},
            "dataset": {"name": name, "type": re.sub(r"[^\w.-]+", "-", name)},
            "metrics": [
                {"type": KINDS.get(n, n), "name": MEASURES.get(n, n), "value": round(v, 6)}
                for n, v in results["values"].items()
            ],
        }
        front["model-index"] = [{"name": title, "results": [found]}]
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())


def _summary(config: SwinConfig, task: str, run: dict[str, Any], record: dict[str, Any]) -> str:
    did = {"classify": "for image classification", "simmim": "pre-trained by masked image modelling (SimMIM)"}
    did["segment"] = "with a UPerNet for semantic segmentation"
    if task == "detect":
        masks = " and instance segmentation" if record["task"].get("masks", True) else ""
        did["detect"] = f"with a detector for object detection{masks} ({_detector(record)})"
    name = f", trained with the recipe `{run['recipe']['name']}`" if run else ""
    return (
        f"A Swin Transformer V{config.version} {did.get(task, 'without a classifier')}{name}, written by swinscale. "
        f"This page was made from what the training recorded; what it does not know is said to be {NOT_RECORDED}."
    )


def _detector(record: dict[str, Any]) -> str:
    """ "Mask R-CNN", as the settings of the task say."""
    settings = record["task"]
    name = DETECTORS.get(settings.get("head", "mask_rcnn"), NOT_RECORDED)
    return (name if settings.get("masks", True) else name.replace("Mask R-CNN", "R-CNN")) + (
        ", global attention (HTC++)" if settings.get("global_attention") else ""
    )


def _usage(repo_id: str, task: str, record: dict[str, Any]) -> str:
    if task == "classify" and (record.get("preprocessing") or {}).get("classes"):
        code = f"""from pathlib import Path

from swinscale.inference import load_pipeline

pipeline = load_pipeline("{repo_id}")
image = pipeline.read(Path("image.jpg"))  # resized, cropped and normalised as in training
probabilities = pipeline.backbone(image[None]).softmax(-1)[0].tolist()
print(sorted(zip(probabilities, pipeline.classes), reverse=True)[:5])"""
    elif task == "detect":
        code = f"""from pathlib import Path

from swinscale.detection import load_detection

detector = load_detection("{repo_id}")
[found] = detector([detector.read(Path("image.jpg"))])  # boxes are x1, y1, x2, y2 in pixels of the picture
for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()):
    print(detector.classes[label], round(score, 2), box)"""
    elif task == "segment":
        code = f"""from pathlib import Path

from swinscale.segmentation import load_segmentation

segmenter = load_segmentation("{repo_id}")
[labels] = segmenter([segmenter.read(Path("image.jpg"))])  # (height, width), the class of each pixel
for label in labels.unique().tolist():
    print(segmenter.classes[label], (labels == label).float().mean().item())"""
    elif task == "video":
        code = f"""from swinscale.video import load_video

video = load_video("{repo_id}")
probabilities = video("film.mp4")  # (classes,), the mean over clips and crops
for index in probabilities.topk(min(5, len(probabilities))).indices.tolist():
    print(video.classes[index], probabilities[index].item())"""
    else:
        code = f"""import torch

import swinscale

model = swinscale.from_pretrained("{repo_id}").eval()  # another size: img_size=..., window_size=...
features = model.forward_features(torch.randn(1, model.config.in_chans, *model.config.img_size))"""
    extra = {"detect": "detect", "video": "train,video"}.get(task, "train")
    install = f"pip install 'swinscale[{extra},hub]'"
    file = "film.mp4" if task == "video" else "image.jpg"
    known = task in ("classify", "simmim", "video", *DENSE)
    line = f"swinscale predict {file} --checkpoint {repo_id}" if known else ""
    return "\n".join(["```bash", install, *([line] if line else []), "```", "", "```python", code, "```"])


def _model(directory: Path, config: SwinConfig, record: dict[str, Any]) -> str:
    task = record.get("task", {})
    dense = task.get("name") in DENSE
    names = (record.get("preprocessing") or {}).get("classes") or ()
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        kinds = sorted({file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118
    count = sum(math.prod(shape) for shape in shapes)
    rows = [
        ("architecture", f"Swin Transformer V{config.version}, position bias `{config.position_bias}`"),
        ("parameters", f"{count:,} ({', '.join(kinds)})"),
        ("width, blocks, heads", f"{config.embed_dim}; {_list(config.depths)}; {_list(config.num_heads)} per stage"),
        (
            "input",
            f"{'pictures of any size' if dense else f'{format_size(config.img_size)} pixels'}, {config.in_chans} channels, "
            f"patches of {format_size(config.patch_size)}",
        ),
        ("windows", f"{_windows(config.window_size)} tokens"),
        ("windows of the trainings before", "; ".join(map(_windows, config.past_windows)) or NOT_RECORDED),
        ("classes", str(config.num_classes or (len(names) if dense else "none: a backbone"))),
        ("padding; maps smaller than a window", f"`{config.pad}`; `{config.small_map}`"),
    ]
    if dense:
        heads = ("detector", _detector(record)) if task["name"] == "detect" else ("segmenter", "UPerNet")
        rows.insert(1, heads)
    if any(map(any, config.pretrained_window_sizes)):
        rows.insert(
            len(rows) - 2, ("position bias scaled to windows of", f"{_windows(config.pretrained_window_sizes)} tokens")
        )
    rows += [
        (f"SHA-256 of {name}", f"`{digests}`")
        for name, digests in recorded_hashes(directory).items()
        if " " not in digests
    ]
    return _table(("", ""), rows)


def _preprocessing(config: SwinConfig, preprocessing: dict[str, Any]) -> str:
    size, crop = preprocessing.get("img_size", config.img_size), preprocessing.get("crop_ratio", 0)
    resized = f"crop {NOT_RECORDED}"
    if crop != 0:
        resized = "resized straight to the size" if crop is None else f"cropped to {crop} of the resized side"
    classes = preprocessing.get("classes")
    sides = {name: preprocessing.get(name, NOT_RECORDED) for name in ("test_short", "test_long")}
    short = f"short side {sides['test_short']} pixels, long side at most {sides['test_long']}"
    rows = [
        ("size", short if "test_short" in preprocessing else f"{format_size(size)} pixels, {resized}"),
        (
            "mean, standard deviation",
            f"{_numbers(preprocessing, 'mean')}; {_numbers(preprocessing, 'std')}, for pixels in [0, 1]",
        ),
        ("classes", _names(classes) if classes else "none" if not config.num_classes else NOT_RECORDED),
    ]
    return _table(("", ""), rows)


def _data(run: dict[str, Any], note: str | None) -> str:
    data, manifest = run.get("recipe", {}).get("data", {}), run.get("manifest", {})
    prints = manifest.get("data", {})
    held = data.get("eval")
    if data.get("limit"):
        held = "the training images"
    elif data and not held:
        share = f"{100 * data.get('eval_fraction', 0):g} % held out"
        held = f"the `{data.get('eval_split')}` split of {data.get('train')} where it has one, else {share}"

    def images(part: str) -> str:
        count = manifest.get(f"{part}_images")
        return NOT_RECORDED if count is None else f"{count:,} (fingerprint `{prints.get(part, NOT_RECORDED)}`)"

    rows = [
        ("training images", str(data.get("train") or NOT_RECORDED)),
        ("how many", images("train")),
        ("evaluation images", str(held or NOT_RECORDED)),
        ("how many", images("eval")),
        ("weights at the start", (run["recipe"].get("init") or "random") if run else NOT_RECORDED),
    ]
    if data.get("labels_per_class"):
        rows.insert(2, ("labels", f"{data['labels_per_class']} per class"))
    said = note or f"Source, licence and consent of the images: {NOT_RECORDED}."
    return f"{_table(('', ''), rows)}\n\n{said}"


def _training(run: dict[str, Any]) -> str:
    if not run:
        return f"Recipe, settings, versions and machine: {NOT_RECORDED}."
    recipe, manifest, result = run["recipe"], run["manifest"], run["result"]
    train, optim = recipe["train"], recipe["train"].get("optim", {})
    versions, machine = manifest.get("versions", {}), manifest.get("machine", {})
    seconds = result.get("seconds")
    rows = [
        ("epochs", _value(train, "epochs") + ("" if result else "; the run had not ended")),
        ("steps", f"{result['steps']:,}" if result else f"{manifest.get('total_steps', NOT_RECORDED)} planned"),
        ("effective batch", str(manifest.get("effective_batch", train.get("batch_size")))),
        ("optimiser", f"AdamW, learning rate {_value(manifest, 'scaled_lr')}, weight decay {_value(optim, 'weight_decay')}, "
                      f"layer decay {_value(optim, 'layer_decay')}, schedule `{_value(optim, 'schedule')}`"),
        ("moving average of weights", str(train.get("ema_decay") or "none")),
        ("precision, device", f"{_value(manifest, 'precision')} on {_value(manifest, 'device')}, {_value(manifest, 'processes')} processes"),
        ("machine", f"{machine.get('gpu') or machine.get('processor') or NOT_RECORDED}, {_value(machine, 'system')}"),
        ("time in training steps", f"{seconds:.3g} s" if seconds is not None else NOT_RECORDED),
        ("versions", ", ".join(f"{n} {v}" for n, v in versions.items() if v) or NOT_RECORDED),
        ("commit of swinscale, date", f"{_value(manifest, 'commit')}, {_value(manifest, 'date')}"),
        ("seed", str(manifest.get("seed", train.get("seed", NOT_RECORDED)))),
    ]  # fmt: skip
    init = " --init CHECKPOINT" if recipe.get("init") else ""
    images = shlex.quote(recipe["data"].get("train") or "IMAGES")
    again = f"swinscale train recipe.json --data {images}{init} --out runs/again"
    return (
        f"{_table(('', ''), rows)}\n\nTo repeat it, save the recipe as `recipe.json` and say where the images are:\n\n"
        f"```bash\n{again}\n```\n\n<details><summary>recipe.json</summary>\n\n```json\n{json.dumps(recipe, indent=2)}\n```\n\n"
        f"</details>"
    )


def _measured(results: dict[str, Any], run: dict[str, Any]) -> str:
    if not results:
        return f"Measures of these weights: {NOT_RECORDED}."
    count = run["manifest"].get("eval_images")
    rows = [
        (MEASURES.get(n, n), f"{100 * v:.2f} %" if n.startswith(SHARES) else f"{v:.4g}")
        for n, v in results["values"].items()
    ]
    images = f"{count:,} evaluation images" if count is not None else f"evaluation images, their number {NOT_RECORDED}"
    if results["unreadable"]:
        images += f", of which {results['unreadable']:g} could not be read"
    return f"{_table(('measure', 'value'), rows)}\n\nOn {images}. From {results['source']} of the run."


def _limitations(config: SwinConfig, task: str, run: dict[str, Any], results: dict[str, Any]) -> str:
    manifest = run.get("manifest", {})
    lines = []
    if (seen := manifest.get("train_images")) is not None:
        lines.append(f"It was trained on {seen:,} images; nothing is known of images of another kind.")
    else:
        lines.append(f"The images that it was trained on are {NOT_RECORDED}.")
    if "box_ap" in results.get("values", ()) and results["source"].startswith("log.jsonl"):
        lines.append("These weights were chosen by the evaluation images, so their AP is an optimistic estimate.")
    if "top1" in results.get("values", ()) and (count := manifest.get("eval_images")):
        lines.append(f"One evaluation image more or less is {100 / count:.2g} points of accuracy.")
        if results["source"].startswith("log.jsonl"):
            lines.append(
                "These weights were chosen by the evaluation images, so their accuracy is an optimistic estimate."
            )
    if task == "simmim":
        lines.append("It reconstructs masked images and knows no classes: fine-tune it first.")
    if config.pad == "legacy":
        lines.append("Padding takes part in attention (`legacy`): outputs depend on how far an image is padded.")
    lines.append("Bias, robustness and use in decisions about people were not examined.")
    return "\n".join(f"* {line}" for line in lines)


def _table(header: Sequence[str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [tuple(header), ("---", "---"), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(str(c).split()).replace("|", "\\|") for c in line) + " |" for line in lines
    )


def _windows(sizes: Sequence[Sequence[int]]) -> str:
    names = [format_size(size) for size in sizes]
    return names[0] if len(set(names)) == 1 else ", ".join(names)


def _names(classes: Sequence[str]) -> str:
    more = len(classes) - SHOWN_CLASSES
    return (
        f"{len(classes)}: "
        + ", ".join(classes[:SHOWN_CLASSES])
        + (f" and {more} more (config.json)" if more > 0 else "")
    )


def _numbers(values: dict[str, Any], name: str) -> str:
    return _list(values[name]) if values.get(name) else NOT_RECORDED


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _value(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return NOT_RECORDED if value is None else f"{value:g}" if isinstance(value, float) else str(value)
