"""Shared by all tests: torchvision beside a CPU torch, one thread per test process, fixed seeds, small pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Faults tried and outcomes (``tests/chaos``)."""
    from tests.chaos import table

    table.report(terminalreporter, config)


@pytest.fixture(autouse=True)
def _quiet_and_repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def compiler_settings() -> Iterator[None]:
    """For tests of the bench, which sets the compiler for its process: here that is the process of other tests too."""
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images beside the checkout; tests that need them skip without."""
    if not SHARED.is_dir():
        pytest.skip("the real images are not beside this checkout")
    return SHARED


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 3 classes × 8 pictures of 40×36 pixels whose colour tells the class."""
    random = np.random.default_rng(0)
    for label, colour in (("blue", (30, 60, 220)), ("green", (40, 200, 60)), ("red", (220, 40, 40))):
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for index in range(8):
            noise = random.integers(-30, 30, (36, 40, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "photos"
