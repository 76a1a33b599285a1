"""R-INST-1: models, weights and operations need torch, numpy and safetensors alone."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, importlib.abc
torch_needs = {"torch", "torchgen", "functorch", "numpy", "safetensors", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
               "filelock", "fsspec", "typing_extensions", "packaging", "setuptools", "_distutils_hack", "optree", "yaml"}
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in torch_needs and top != "swinscale" and not top.startswith("_"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocker())
import swinscale, swinscale.models, swinscale.ops, swinscale.weights
for module in ("triton", "torch._dynamo", "torch._inductor"):
    assert module not in sys.modules, f"{module} takes seconds to import and may never be used"
import torch
model = swinscale.create_model("swinv2_pico_patch4_window4_32", num_classes=3)
assert model(torch.randn(1, 3, 37, 41)).shape == (1, 3)
import tempfile
with tempfile.TemporaryDirectory() as folder:
    swinscale.save_pretrained(model, folder)
    again = swinscale.from_pretrained(folder)
for module in ("torchvision", "timm", "PIL", "rich", "torchmetrics"):
    assert module not in sys.modules, module
print("isolated")
"""


def test_models_weights_and_ops_need_nothing_else():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.strip() == "isolated", done.stderr[-2000:]


def test_import_swinscale_loads_no_torch():
    code = "import sys, swinscale; assert 'torch' not in sys.modules; print(swinscale.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
