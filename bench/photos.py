"""SimMIM and fine-tuning against training from scratch, and against timm's ResNet-18, on a folder of photos.

python -m bench.photos --data FOLDER [--seeds 3] [--longer 1] [--out runs/photos] — every arm has about the same training
time. FOLDER has train, validation and test inside, with a folder per class; the test part is evaluated once, at the end. Writes
bench/results/photos.json: accuracy, images seen and training time per seed and arm, machine, versions, date. A second call
goes on where the first stopped; the times are worth reading only where nothing else ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch

from swinscale.manifest import environment
from swinscale.recipes import Recipe, build, get_recipe, run
from swinscale.seeding import derive_seed
from swinscale.tasks import Classify
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.train import TrainResult, train

RESULTS = Path(__file__).parent / "results"
RESNET_EPOCHS = 7  # about the time of 10 epochs of the Swin V2 on the machine of the results


class _ResNet(Classify):
    """A timm model in our loop; it has no directory format of ours."""

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), directory / "model.pt")


def recipe_for(name: str, data: str, seed: int, longer: float = 1, init: Path | None = None) -> Recipe:
    """A desk recipe on ``data`` with a seed and ``longer`` times its epochs, evaluated on the test part."""
    recipe = get_recipe(name)
    part = dataclasses.replace(recipe.data, train=data, eval_split="test")
    how = dataclasses.replace(recipe.train, seed=seed, num_workers=0, epochs=longer * recipe.train.epochs)
    return dataclasses.replace(recipe, data=part, train=how, init=str(init) if init else None)


def resnet18(data: str, seed: int, longer: float, directory: Path) -> TrainResult:
    """timm's ResNet-18 from random weights: same images, augmentation and loop."""
    ensure_torchvision()
    import timm

    recipe = recipe_for("photos_scratch", data, seed)
    built = build(recipe)
    torch.manual_seed(derive_seed(seed, "resnet"))
    classes = built.recipe.model.num_classes
    task = _ResNet(timm.create_model("resnet18", num_classes=classes), classes, recipe.task)  # type: ignore[arg-type]
    optim = dataclasses.replace(recipe.train.optim, layer_decay=1.0)
    how = dataclasses.replace(recipe.train, epochs=longer * RESNET_EPOCHS, optim=optim)
    return train(task, built.train_data, built.eval_data, how, directory, resume=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--longer", type=float, default=1, help="factor on the epochs of every arm")
    parser.add_argument("--out", type=Path, default=Path("runs/photos"))
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        home = options.out / f"seed{seed}"
        data, longer = options.data, options.longer
        pre = run(recipe_for("photos_simmim", data, seed, longer), home / "simmim", resume=True)
        tuning = recipe_for("photos_finetune", data, seed, longer, home / "simmim/last")
        tuned = run(tuning, home / "finetune", resume=True)
        scratch = run(recipe_for("photos_scratch", data, seed, longer), home / "scratch", resume=True)
        other = resnet18(data, seed, longer, home / "resnet18")
        for arm, *parts in (
            ("SimMIM + fine-tuning", pre, tuned),
            ("from scratch", scratch),
            ("ResNet-18 (timm) from scratch", other),
        ):
            seen = sum(part.steps for part in parts) * get_recipe("photos_scratch").train.batch_size
            seconds = round(sum(part.seconds for part in parts))
            top1 = parts[-1].metrics["top1"]
            rows.append({"arm": arm, "seed": seed, "top1": top1, "images_seen": seen, "training_seconds": seconds})
        rows[-3]["simmim"] = {name: pre.metrics[name] for name in ("loss", "mean_predictor_loss")}
        write(rows, options)


def write(rows: list[dict], options: argparse.Namespace) -> None:  # type: ignore[type-arg]
    """Results so far (``--longer 10`` has a file of its own), with mean and standard deviation over seeds."""
    summary = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        values = [row["top1"] for row in rows if row["arm"] == arm]
        spread = statistics.stdev(values) if len(values) > 1 else None
        summary[arm] = {"mean": statistics.mean(values), "stdev": spread, "seeds": len(values)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {
        "what": "test top-1",
        "data": Path(options.data).name,
        "longer": options.longer,
        "summary": summary,
        "runs": rows,
        **environment(),
    }
    name = "photos.json" if options.longer == 1 else f"photos-longer-{options.longer:g}.json"
    (RESULTS / name).write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
