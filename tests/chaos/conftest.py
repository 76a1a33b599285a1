"""Fixtures of the chaos tests: the pictures, a whole run to compare with, and rows of the table."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.chaos import faults
from tests.chaos.faults import Place, recipe
from tests.chaos.table import Fault

collect_ignore_glob = ["test_*.py"] if os.name == "nt" else []  # signals and forks


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``make test-fast`` leaves them out: a minute together."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes × 8 pictures whose colour tells the class; nobody changes them."""
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    random = np.random.default_rng(0)
    for label, colour in (("blue", (30, 60, 220)), ("green", (40, 200, 60)), ("red", (220, 40, 40))):
        (folder / label).mkdir(parents=True)
        for index in range(8):
            noise = random.integers(-30, 30, (36, 40, 3))
            pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")
    return folder


@pytest.fixture
def own_photos(photos: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.fixture(scope="session")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the standard run, which nothing interrupted."""
    place = Place(tmp_path_factory.mktemp("whole"), recipe(photos))
    place.finish()
    return place.run


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Callable[[str], Fault]:
    """Begins a row of the table."""

    def begin(name: str) -> Fault:
        row = Fault(request.module.__name__.rpartition("test_")[2], name)
        request.node.user_properties.append(("chaos", row.row))
        return row

    return begin


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    faults.kill_all()
