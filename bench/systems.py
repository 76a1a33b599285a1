"""``python -m bench systems --runs DIR …``: every system that the articles name, with its command, test, and measured beside published.

Runs that are done are recorded in bench/results/systems.json; what else was measured is read from the other result files and those of
the claims. ``python -m bench page --page docs/systems.md`` writes the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import tables
from bench.results import FOLDER
from swinscale.errors import UsageError

CLAIMS = FOLDER.parent.parent / "docs" / "claims"
NOT_MEASURED = "not measured"
KEYS = ("recipe", "version", "data", "init", "seed", "epochs")
"""What a run is the run of."""
Content = dict[str, Any]


def row(directory: Path) -> Content:
    """What the finished run in ``directory`` is and reached.

    Raises:
        UsageError: for a directory without a finished run.
    """
    try:
        config, manifest, result = (
            json.loads((directory / name).read_text()) for name in ("config.json", "manifest.json", "result.json")
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"{directory} holds no finished run: {error}.") from error
    metrics = {name: round(v, 4) for name, v in result["metrics"].items() if isinstance(v, (int, float))}
    return {
        "recipe": config["name"],
        "version": config["model"].get("version"),
        "data": Path(config["data"]["train"]).name,
        "init": Path(config["init"]).parent.name if config["init"] else None,
        "metrics": metrics,
        "parameters": manifest["parameters"],
        "images": manifest["train_images"],
        "eval_images": manifest["eval_images"],
        "epochs": config["train"]["epochs"],
        "seed": config["train"]["seed"],
        "steps": result["steps"],
        "minutes": round(result["seconds"] / 60, 1),
        "precision": manifest["precision"],
        "threads": manifest["machine"]["threads"],
        "processor": manifest["machine"]["processor"],
        "versions": manifest["versions"],
        "commit": manifest["commit"],
        "date": manifest["date"],
    }


class System(NamedTuple):
    """A row of the table."""

    name: str
    command: str
    tests: str
    measured: Callable[[Content], str]
    published: str


def parts(content: Content) -> dict[str, Callable[[], str]]:
    """What a page can show."""
    return {"table": lambda: table(content), "runs": lambda: runs_table(content["runs"])}


def table(content: Content) -> str:
    """One row for each system."""
    head = ("system", "command", "test", "measured here", "published")
    rows = [(s.name, f"`{s.command}`", f"`{s.tests}`", s.measured(content), s.published) for s in SYSTEMS]
    return tables.table(head, rows)


def runs_table(runs: Sequence[Content]) -> str:
    """The runs that were recorded for the table."""
    head = ("recipe", "data", "starts from", "parameters", "epochs", "minutes", "precision", "measure", "begun")
    rows = [
        (
            f"`{one['recipe']}`", one["data"], f"`{one['init']}`" if one["init"] else "random weights",
            f"{one['parameters'] / 1e6:.2f} M", f"{one['epochs']:g}", one["minutes"], one["precision"], _measure(one),
            f"{one['date'][:10]}, {one['commit'] or 'no commit'}",
        )
        for one in runs
    ]  # fmt: skip
    return tables.table(head, [[str(cell) for cell in one] for one in rows])


def _measure(one: Content) -> str:
    metrics = one["metrics"]
    if "top1" in metrics:
        return f"top-1 {100 * metrics['top1']:.1f} %"
    return f"loss {metrics['loss']:.3f} (mean predictor {metrics['mean_predictor_loss']:.3f})"


def _runs(*recipes: str, version: int | None = None) -> Callable[[Content], str]:
    """What runs of these recipes reached, with a Swin of this version or with another network."""

    def measured(content: Content) -> str:
        found = [one for one in content["runs"] if (one["recipe"] in recipes and one["version"] == version)]
        lines = [f"{one['data']}: {_measure(one)}, {one['epochs']:g} epochs" for one in found]
        return "; ".join(lines) + " (one seed)" if lines else NOT_MEASURED

    return measured


def _claim(name: str, read: Callable[[Content], str]) -> Callable[[Content], str]:
    """What the result file of a claim says."""
    return lambda _: _said_by(CLAIMS / name / "desk.json", lambda found: f"{read(found)} (docs/claims/{name})")


def _file(name: str, read: Callable[[Content], str]) -> Callable[[Content], str]:
    """What one of our result files says."""
    return lambda _: _said_by(FOLDER / f"{name}.json", read)


def _said_by(file: Path, read: Callable[[Content], str]) -> str:
    return read(json.loads(file.read_text())) if file.is_file() else NOT_MEASURED


def _cell(claim: Content, title: str, row: str, column: str) -> str:
    """A number of a table of a claim."""
    [found] = [t for t in claim["tables"] if t["title"].startswith(title)]
    [cells] = [r for r in found["rows"] if r[0] == row]
    return f"{cells[found['header'].index(column)]['estimate']:.1f}"


def _finding(claim: Content, beginning: str) -> str:
    [found] = [f for f in claim["findings"] if f["statement"].startswith(beginning)]
    return str(found["measured"])


def _detection(content: Content) -> str:
    best = max(content["overfit"], key=lambda one: one["box_ap"])
    return f"16 photos by heart: box AP {100 * best['box_ap']:.1f} (docs/detection.md); COCO not measured"


def _segmentation(content: Content) -> str:
    scenes = [one["miou"] for one in content["runs"] if not one["by_heart"]]
    return f"CamVid: mIoU {max(scenes):.1f} (docs/segmentation.md); ADE20K not measured"


def _video(content: Content) -> str:
    accuracy = [one["top1"] for one in content["actions"]]
    return f"Weizmann actions: {sum(accuracy) / len(accuracy):.1f} %, mean of {len(accuracy)} runs (docs/video.md); Kinetics not measured"


def _photos(content: Content) -> str:
    tuned = content["summary"]["SimMIM + fine-tuning"]
    return f"clothing: top-1 {100 * tuned['mean']:.1f} % after SimMIM (docs/log.md); ImageNet not measured"


SYSTEMS = (
    System(
        "Swin V1", "swinscale train imagenet_swin_tiny --data IMAGENET", "tests/test_models_parity.py",
        _claim("blocks", lambda c: f"CIFAR-10 top-1 {_cell(c, 'Top-1', 'pre', 'dot')}"), "T 81.3, L 87.3 top-1",
    ),
    System(
        "Swin V2", "swinscale train imagenet_swinv2_tiny --data IMAGENET", "tests/test_models_parity.py",
        _claim("blocks", lambda c: f"CIFAR-10 top-1 {_cell(c, 'Top-1', 'res-post', 'cosine')}"),
        "T 81.8, L 87.7, G 90.17 top-1",
    ),
    System(
        "LR-Net", "swinscale train photos_lrnet --data PHOTOS", "tests/test_models_lrnet.py",
        _runs("desk_lrnet_cifar10", "photos_lrnet"), "26: 75.7, 50: 77.3 top-1",
    ),
    System(
        "sliding-window Swin", "swinscale claims windows --data CIFAR10", "tests/test_claims_windows.py",
        _claim(
            "windows",
            lambda c: f"CIFAR-10 top-1 {_cell(c, 'Top-1', 'sliding', 'top-1')} (shifted {_cell(c, 'Top-1', 'shifted', 'top-1')}); "
            f"a naive one takes {_finding(c, 'Swin-T with naive')}",
        ),
        "81.4 (shifted 81.3) top-1; 4.1 times",
    ),
    System(
        "SimMIM, Swin V1", "swinscale train simmim_swin_base_800ep --data IMAGENET", "tests/test_tasks_simmim.py",
        _runs("desk_simmim_v1", "desk_finetune_v1", version=1), "B 84.0, L 85.4 top-1 after fine-tuning",
    ),
    System(
        "SimMIM, Swin V2", "swinscale train simmim_swinv2_huge_800ep --data IMAGENET", "tests/test_tasks_simmim.py",
        _claim("simmim", lambda c: f"10 % of the labels: {_finding(c, 'pre-training helps with 10%')}"),
        "H 85.7, at 512 87.1 top-1 after fine-tuning",
    ),
    System(
        "SimMIM, ViT (timm)", "swinscale train simmim_vit_base_800ep --data IMAGENET", "tests/test_adapters_vit.py",
        _runs("desk_simmim_vit", "desk_finetune_vit"), "B 83.8 top-1 after fine-tuning",
    ),
    System(
        "memory recipe", "swinscale show simmim_swinv2_giant --gpus 8 --card 40GB", "tests/test_memory.py",
        _claim("memory", lambda c: f"with activation checkpointing {_finding(c, 'activation checkpointing saves')}"),
        "3 B parameters on 40 GB cards",
    ),
    System(
        "transfer to larger windows", "swinscale transfer RUN OUT --img-size 384 --window 24", "tests/test_weights_transfer.py",
        _claim("transfer", lambda c: f"at twice the size, log CPB before the table: {_finding(c, 'after fine-tuning at 2')}"),
        "83.0 (table) and 83.8 (log CPB) at 512/16",
    ),
    System(
        "ImageNet classification", "swinscale eval --suite imagenet --weights FILE --data IMAGENET", "tests/test_suites.py",
        _file("photos", _photos), "G 90.17 top-1",
    ),
    System(
        "COCO detection, HTC++", "swinscale train htc_swinv2_giant --data COCO", "tests/test_train_detect.py",
        _file("detect", _detection), "G 63.1 / 54.4 AP, test-dev",
    ),
    System(
        "ADE20K segmentation, UPerNet", "swinscale train upernet_swinv2_giant_640 --data ADE20K",
        "tests/test_train_segment.py", _file("segment", _segmentation), "G 59.9 mIoU",
    ),
    System(
        "Kinetics-400 video", "swinscale train kinetics400_swinv2_giant_320 --data KINETICS400", "tests/test_train_video.py",
        _file("video", _video), "T 78.8, V2-G 86.8 top-1",
    ),
)  # fmt: skip
