"""Who may import whom: the table of ARCHITECTURE.md, checked in every module, imports inside functions included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "swinscale"
BASE = {"errors", "config", "seeding"}
PARTS = {"optim", "parallel", "checkpoint", "runlog", "manifest", "signals", "train_config"}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "seeding": set(),
    "torchvision_cpu": set(),
    "config": {"errors"},
    "ops": {"errors"},
    "models": BASE | {"ops"},
    "weights": BASE | {"models"},
    "data": BASE | {"torchvision_cpu"},
    "tasks": BASE | {"models", "weights", "heads", "metrics", "torchvision_cpu"},
    **{part: BASE | {"tasks.base"} for part in PARTS},
    "parallel": BASE | {"tasks.base", "models.init", "models.recompute"},
    "checkpoint": BASE | {"parallel"},
    "manifest": BASE | {"optim"},
    "train_config": BASE | {"optim", "parallel"},
    "timing": set(),
    "intervals": {"errors"},
    "peaks": BASE | {"optim", "parallel", "tasks.base"},
    "ledger": {"ops"},
    "rehearsal": BASE | {"ops", "models", "tasks.base", "ledger"},
    "memory": BASE | {"models", "tasks.base", "optim", "parallel", "rehearsal"},
    "failures": BASE | {"checkpoint", "memory", "parallel", "tasks.base", "train_config"},
    "heads": BASE | {"models", "ops", "torchvision_cpu"},
    "metrics": BASE | {"heads.detections"},
    "adapters": BASE | {"models", "weights", "torchvision_cpu"},
    "diagnose": BASE | {"tasks", "heads", "models", "ops", "parallel", "runlog", "intervals"},
    "evaluation": BASE | {"tasks.base", "data.loader", "data.dataset", "parallel"},
    "train": BASE
    | PARTS
    | {"tasks.base", "data.loader", "diagnose.nonfinite", "diagnose.instrument", "evaluation", "failures"},
    "recipes": BASE | PARTS | {"heads", "tasks", "data", "models", "weights", "train", "diagnose", "adapters"},
    "suites": BASE
    | {"data", "models", "weights", "tasks", "evaluation", "parallel", "manifest", "intervals", "inference"}
    | {"detection", "segmentation", "video", "heads", "recipes"},
}
ANYTHING = {
    *("cli", "inference", "quantize", "show", "demo", "export", "agreement", "card", "convert", "hub", "info"),
    *(
        "dense",
        "detection",
        "segmentation",
        "video",
        "films",
        "convert_dense",
        "convert_detector",
        "convert_segmenter",
        "explain",
        "claims",
    ),
    *("__main__", "__init__"),
}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules of ours that ``path`` imports, without the leading package name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {n.removeprefix("swinscale.") for n in names if n.startswith("swinscale.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module_imports_only_what_its_layer_may(path: Path):
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if layer in ANYTHING:
        return
    assert layer in ALLOWED, f"{layer} is not in the table"
    for name in imports(path):
        allowed = any(name == a or name.startswith(a + ".") for a in ALLOWED[layer] | {layer})
        assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_table_has_no_layer_that_is_gone():
    layers = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in MODULES}
    assert set(ALLOWED) <= layers


def test_a_forward_pass_stays_readable():
    """The reading promise: the model file fits in 350 lines, the attention file in 150, the run in 350."""
    for name, limit in (("models/swin.py", 350), ("ops/attention.py", 150), ("train.py", 350)):
        lines = len((ROOT / name).read_text().splitlines())
        assert lines <= limit, f"{name} has {lines} lines"
