"""README and docs tell the truth: every python block runs, every command line parses, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from coco_files import rectangles
from film_files import write_film
from segment_files import shapes
from swinscale import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not executed: .+? -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for skip, kind, text in BLOCK.findall(page.read_text()) if kind == language and not skip]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path):
    """All blocks of a page run in order, in a folder that holds ``photos/`` with a folder per class."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for text in blocks(page, "python"):
        exec(compile(text, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_command_lines_parse(page: Path):
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert all(w in targets for w in words[1:] if "=" not in w), line
            if "swinscale" in words[:6]:
                arguments = words[words.index("swinscale") + 1 :]
                options = cli._options(arguments)
                if hasattr(options, "overrides"):
                    cli._recipe(options)


MINIATURE = [
    "model.embed_dim=16", "model.depths=(1,1,1)", "model.num_heads=(1,2,4)", "train.epochs=1", "train.batch_size=6",
    "train.num_workers=0", "train.device=cpu",
]  # fmt: skip
IMAGES, FILMS = ["--model", "swinv2_pico_patch4_window4_32"], ["--model", "swin3dv2_pico_window844_64"]


@pytest.mark.slow
def test_the_readme_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path):
    """Its swinscale commands work one after the other; training in miniature.

    They find ``photos/``, ``coco/``, ``photos-with-maps/``, ``films/``, ``image.jpg`` and ``film.mp4``. The command that needs ImageNet and
    eight processes is only parsed (above).
    """
    monkeypatch.chdir(tmp_path)
    Image.open(photos / "red" / "0.png").save("image.jpg")
    rectangles(tmp_path / "coco")
    shapes(tmp_path / "photos-with-maps")
    for index in range(12):
        film = write_film(tmp_path / "films" / f"class{index % 2}" / f"{index}.mp4", 20)
    film.rename("film.mp4")
    lines = [
        shlex.split(line, comments=True) for text in blocks(ROOT / "README.md", "bash") for line in text.splitlines()
    ]
    ran = []
    for _, *arguments in (words for words in lines if words[:1] == ["swinscale"]):
        small = [*(FILMS if "films" in arguments else IMAGES), *MINIATURE] if arguments[0] == "train" else []
        assert cli.main([*arguments, *small]) == 0, arguments
        ran.append(arguments[0])
    assert {"list", "show", "train", "eval", "predict"} <= set(ran)
    assert (tmp_path / "runs/photos_finetune/best/model.safetensors").is_file()
    assert list((tmp_path / "predictions").glob("*.png"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_few_blocks_opt_out():
    assert sum(len(re.findall("<!-- not executed", page.read_text())) for page in PAGES) <= 3
