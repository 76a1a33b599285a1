"""Other annotations as a COCO file: Pascal VOC boxes in XML, or a PNG file per instance or class."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from swinscale.data.coco_annotations import mask_api
from swinscale.data.sources import EXTENSIONS
from swinscale.errors import UsageError

Kind = Literal["voc", "masks"]
TURNED = 274, 5  # the EXIF tag of orientation, and its first value that swaps height and width


class Counts(NamedTuple):
    """What was written, and what was left out: objects marked difficult, and masks without a pixel."""

    images: int
    annotations: int
    classes: int
    left_out: int


class _Instance(NamedTuple):
    """One object: its class, box (x, y, width, height), area in pixels, and what else its kind of file says."""

    name: str
    box: tuple[float, float, float, float]
    area: float
    more: dict[str, Any]


class _Picture(NamedTuple):
    """An image file, its size, and what is in it; None for what is left out."""

    file: Path
    height: int
    width: int
    instances: list[_Instance | None]


def to_coco(source: Path, out: Path, kind: Kind | None = None, skip_difficult: bool = False) -> Counts:
    """Writes annotations as a COCO detection file, which ``open_coco`` reads.

    * "voc": a folder with ``Annotations/*.xml``, or with the XML files themselves; images in ``JPEGImages/`` or ``images/``
      beside it, or beside the XML files. Corners are read as VOC has them, counted from 1 and both inside the box. There
      are no masks.
    * "masks": ``images/``, and ``masks/<class>/<name of the image>.png`` or ``…/<name of the image>-anything.png``. A file
      with one value beside 0 is one instance; with several, each value is one (1, 2, 3 …, in 8 or 16 bits).

    Images without annotations stay. Classes are numbered from 1 in the order of their names.

    Args:
        source: the folder.
        out: the JSON file, replaced in one step. Images are named relative to its folder.
        kind: None: found out from the folder.
        skip_difficult: leave out objects that VOC marks as difficult; otherwise they are objects like any other.

    Raises:
        UsageError: naming the file that is missing, cannot be read or makes no sense.
    """
    if not source.is_dir():
        raise UsageError(f"No such folder: {source}.")
    if out.suffix.lower() != ".json" or out.is_dir():
        raise UsageError(f"{out} is no name of a JSON file. Name one, such as annotations/instances_train.json.")
    if kind is None:
        kind = _kind(source)
    if kind not in ("voc", "masks"):
        raise UsageError(f"kind='{kind}' is unknown. Available: voc, masks.")
    pictures = list(_voc(source, skip_difficult) if kind == "voc" else _masks(source))
    names = sorted({instance.name for picture in pictures for instance in picture.instances if instance})
    if not names:
        raise UsageError(f"{source}: there is no annotation in any of {len(pictures)} images.")
    category = {name: number for number, name in enumerate(names, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    left_out = 0
    for number, picture in enumerate(pictures, 1):
        file = Path(os.path.relpath(picture.file.resolve(), out.parent.resolve())).as_posix()
        images.append({"id": number, "file_name": file, "height": picture.height, "width": picture.width})
        for instance in picture.instances:
            if instance is None:
                left_out += 1
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category[instance.name],
                    "bbox": list(instance.box),
                    "area": instance.area,
                    "iscrowd": 0,
                    **instance.more,
                }
            )
    categories = [{"id": number, "name": name} for name, number in category.items()]
    _write(out, {"images": images, "annotations": annotations, "categories": categories})
    return Counts(len(images), len(annotations), len(names), left_out)


def _write(out: Path, content: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def _kind(source: Path) -> Kind:
    if (source / "masks").is_dir():
        return "masks"
    if any(source.glob("Annotations/*.xml")) or any(source.glob("*.xml")):
        return "voc"
    raise UsageError(
        f"{source} holds neither Annotations/*.xml or *.xml (Pascal VOC) nor masks/<class>/*.png beside images/."
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in EXTENSIONS


def _sizes(file: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of an image as its pixels are stored, and as its EXIF orientation turns it."""
    try:
        with Image.open(file) as picture:
            width, height = picture.size
            turned = picture.getexif().get(TURNED[0], 1) >= TURNED[1]
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise UsageError(f"{file} cannot be read as an image: {' '.join(str(error).split())[:120]}.") from error
    return (height, width), (width, height) if turned else (height, width)


def _voc(source: Path, skip_difficult: bool) -> Iterator[_Picture]:
    folder = source / "Annotations" if (source / "Annotations").is_dir() else source
    files = sorted(folder.glob("*.xml"))
    if not files:
        raise UsageError(f"{folder} holds no XML files.")
    places = [place for place in (folder.parent / "JPEGImages", folder.parent / "images") if folder != source]
    places += [folder / "JPEGImages", folder / "images", folder]
    by_stem: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if _is_image(path):
                by_stem.setdefault(path.stem, path)
                by_stem.setdefault(path.name, path)
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
        except (ElementTree.ParseError, OSError) as error:
            raise UsageError(f"{file} is not an XML file: {error}.") from None
        if root.tag != "annotation":
            raise UsageError(f"{file} is no Pascal VOC annotation: its outer element is <{root.tag}>.")
        image = by_stem.get(root.findtext("filename", "").strip()) or by_stem.get(file.stem)
        if image is None:
            raise UsageError(f"{file}: its image is in none of {', '.join(str(p) for p in places if p.is_dir())}.")
        stored, turned = _sizes(image)
        said = (_number(root, "size/height", file, 0), _number(root, "size/width", file, 0))
        if 0 not in said and said not in (stored, turned):
            raise UsageError(
                f"{file} is for {said[0]:g}×{said[1]:g} pixels, {image} has {stored[0]}×{stored[1]} (height × width)."
            )
        height, width = turned if said == turned else stored
        instances = [_voc_object(element, file, skip_difficult) for element in root.findall("object")]
        yield _Picture(image, height, width, instances)


def _number(element: ElementTree.Element, path: str, file: Path, default: float | None = None) -> float:
    text = element.findtext(path)
    if not text and default is not None:
        return default
    try:
        return float(text or "")
    except ValueError:
        raise UsageError(f"{file}: <{path}> should be a number, not {text!r}.") from None


def _voc_object(element: ElementTree.Element, file: Path, skip_difficult: bool) -> _Instance | None:
    name = element.findtext("name", "").strip()
    if not name:
        raise UsageError(f"{file}: an <object> has no <name>.")
    x1, y1, x2, y2 = (_number(element, f"bndbox/{side}", file) for side in ("xmin", "ymin", "xmax", "ymax"))
    width, height = x2 - x1 + 1, y2 - y1 + 1
    if not (width > 0 and height > 0):
        raise UsageError(f"{file}: object '{name}' has the corners {x1:g}, {y1:g} and {x2:g}, {y2:g}, in this order.")
    difficult = int(_number(element, "difficult", file, 0))
    if difficult and skip_difficult:
        return None
    return _Instance(name, (x1 - 1, y1 - 1, width, height), width * height, {"difficult": difficult})


def _masks(source: Path) -> Iterator[_Picture]:
    for name in ("images", "masks"):
        if not (source / name).is_dir():
            raise UsageError(f"{source} has no folder '{name}'. It needs images/ and masks/<class>/*.png.")
    images = {path.stem: path for path in sorted((source / "images").iterdir()) if _is_image(path)}
    if not images:
        raise UsageError(f"{source / 'images'} holds no images.")
    of: dict[str, list[tuple[str, Path]]] = {stem: [] for stem in images}
    for folder in sorted(path for path in (source / "masks").iterdir() if path.is_dir()):
        for file in sorted(folder.glob("*.png")):
            of[_image_of(file, images)].append((folder.name, file))
    for stem, image in images.items():
        sizes, instances = _sizes(image), list[_Instance | None]()
        size = sizes[0]
        for name, file in of[stem]:
            values = _label_map(file)
            if values.shape not in sizes or (instances and values.shape != size):
                raise UsageError(
                    f"{file} has {values.shape[0]}×{values.shape[1]} pixels, its image {image} {size[0]}×{size[1]}."
                )
            size = (values.shape[0], values.shape[1])
            instances += _instances(name, values)
        yield _Picture(image, *size, instances)


def _image_of(file: Path, images: Iterable[str]) -> str:
    """The name of the image that a mask is of: its own name, or the longest one that a "-" follows."""
    stem = file.stem
    while stem not in images:
        stem, dash, _ = stem.rpartition("-")
        if not dash:
            raise UsageError(
                f"{file}: there is no image of this name in images/ (a mask of a.jpg is a.png or a-anything.png)."
            )
    return stem


def _label_map(file: Path) -> np.ndarray:
    """The values of a mask file, int64 (height, width)."""
    try:
        with Image.open(file) as picture:
            values = np.array(picture).astype(np.int64)
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise UsageError(f"{file} cannot be read as an image: {' '.join(str(error).split())[:120]}.") from error
    if values.ndim == 3:  # black and white, saved in colour
        colours = values[..., : 1 if values.shape[2] == 2 else 3]
        if not (colours == colours[..., :1]).all():
            raise UsageError(
                f"{file} is a coloured picture. A mask has one channel: save it as grey or with a palette."
            )
        values = colours[..., 0]
    found = np.unique(values[values != 0])
    if len(found) > 1 and found[-1] == 255 and len(found) < 255:
        raise UsageError(
            f"{file} has {len(found)} values up to 255, like a mask with soft edges. A mask has 0 and one other value, a map "
            f"of instances 0, 1, 2, 3 …"
        )
    return values


def _instances(name: str, values: np.ndarray) -> list[_Instance | None]:
    """An instance per value; None for a mask without any."""
    found: list[_Instance | None] = []
    for value in np.unique(values):
        if value == 0:
            continue
        mask = values == value
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y = int(columns[0]), int(rows[0])
        box = (x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y)
        code = mask_api().encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation = {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}
        found.append(_Instance(name, box, int(mask.sum()), {"segmentation": segmentation}))
    return found or [None]
