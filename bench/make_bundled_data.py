"""Makes ``src/swinscale/data/bundled/fashion_mnist.zip``: the first pictures of each class of Fashion-MNIST.

python bench/make_bundled_data.py FOLDER — FOLDER holds the four ``*-ubyte.gz`` files of Fashion-MNIST (MIT licence,
github.com/zalandoresearch/fashion-mnist; Debian's package dataset-fashion-mnist has them). Same files in, same bytes out.
"""

from __future__ import annotations

import gzip
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PER_CLASS = {"train": 500, "test": 100}
FILES = {"train": "train", "test": "t10k"}
TARGET = Path(__file__).parent.parent / "src/swinscale/data/bundled/fashion_mnist.zip"

README = """Fashion-MNIST, a subset: 28x28 grey pictures of clothes, 10 classes.

Source: github.com/zalandoresearch/fashion-mnist (Zalando SE, MIT licence, see LICENSE).
Chosen without looking: the first 500 training and the first 100 test pictures of each class.
File names are the indices in the original files.
"""

LICENSE = """The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def read_idx(path: Path, header: int) -> np.ndarray:
    """The unsigned bytes of an idx file after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def main(folder: Path) -> None:
    """Writes the archive; entries are stored, since PNG files do not get smaller."""
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(TARGET, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(name, date_time=(2017, 8, 25, 0, 0, 0)), data)

        add("README", README.encode())
        add("LICENSE", LICENSE.encode())
        for split, stem in FILES.items():
            images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
            labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 8)
            for label, name in enumerate(CLASSES):
                for index in np.flatnonzero(labels == label)[: PER_CLASS[split]]:
                    data = io.BytesIO()
                    Image.fromarray(images[index]).save(data, "PNG", optimize=True)
                    add(f"{split}/{name}/{index:05d}.png", data.getvalue())
    print(f"{TARGET}: {TARGET.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
