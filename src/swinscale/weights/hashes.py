"""Hashes of weight files: recorded when a directory is written, compared before it is used.

``config.json`` records the SHA-256 of the weights beside it: ``"sha256": {"model.safetensors": "…"}``. Two files cannot be
replaced in one step, and a directory must survive a kill between them. So while weights are exchanged, the record holds
two digests, of the new file and of the one it replaces, separated by a space:

1. the new weights are written under a temporary name, and their digest is taken;
2. ``config.json`` is replaced: new digest and old digest;
3. the weights are replaced;
4. ``config.json`` is replaced: new digest.

After each step every file is whole and the weights are one of those recorded, so a kill leaves a directory that loads:
the old weights after 1 and 2, the new ones after 3 and 4. Where the new model differs from the old one in more than its
weights, step 2 records the new digest alone: old weights under the settings of another model are an error, not a surprise.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swinscale.errors import UsageError

ENTRY = "sha256"


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in portions."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_sha1(path: Path) -> str:
    """What git calls a file by: the SHA-1 of its size and its content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while portion := file.read(1 << 20):
            digest.update(portion)
    return digest.hexdigest()


def recorded_hashes(directory: Path) -> dict[str, str]:
    """What ``config.json`` in ``directory`` records: file name → one digest, or two in the midst of a save."""
    entry = read_record(directory).get(ENTRY)
    entries = entry.items() if isinstance(entry, dict) else ()
    return {name: digests for name, digests in entries if Path(name).name == name and isinstance(digests, str)}


def read_record(directory: Path) -> dict[str, Any]:
    """``config.json`` of ``directory``; empty where there is none, or one that ``read_config`` will complain about."""
    try:
        record = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def check_hashes(path: str | os.PathLike[str], known: Mapping[str, str] | None = None) -> None:
    """Compares weights with the hashes recorded beside them; weights without a record pass.

    Args:
        path: a directory, or a weight file in one.
        known: SHA-256 of files by name, where they have been taken already.

    Raises:
        UsageError: names the file, the digest that is recorded and the one it has.
    """
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    for name, recorded in recorded_hashes(directory).items():
        file = directory / name
        if not file.is_file() or (path != directory and name != path.name):
            continue
        found = (known or {}).get(name) or sha256(file)
        # A run may have exchanged its weights meanwhile: then the record that is there now tells.
        if found not in recorded.split() and found not in recorded_hashes(directory).get(name, "").split():
            raise UsageError(
                f"{file} is damaged, or not the file that was saved with {directory / 'config.json'}: its SHA-256 is "
                f"{found}, recorded is {recorded}. Copy or save both again, or pass verify=False to use it as it is."
            )
