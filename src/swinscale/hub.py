"""Publishing a model on the Hugging Face Hub, with a card that says what it is, and without a file that is damaged."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from swinscale import __version__
from swinscale.card import model_card
from swinscale.errors import UsageError
from swinscale.tasks.base import Task
from swinscale.weights import save_pretrained
from swinscale.weights.hashes import check_hashes, read_record
from swinscale.weights.hub import REPOSITORY, endpoint, explained, import_hub, reason
from swinscale.weights.records import MODEL_TYPE

log = logging.getLogger(__name__)

FILES = ("config.json", "model.safetensors")


def push_to_hub(
    source: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    message: str | None = None,
    licence: str | None = None,
    data_note: str | None = None,
    card: str | None = None,
) -> str:
    """Uploads ``config.json``, ``model.safetensors`` and a model card as ``README.md``, in one commit.

    Args:
        source: a ``SwinTransformer`` or a task, or a directory of this library, such as ``best`` of a run, which knows
            much more to say in the card.
        repo_id: "owner/name"; the repository is created where there is none.
        private: whether a new repository is. One that exists stays as it is.
        token: one that may write; None: HF_TOKEN, or the one that "hf auth login" stored.
        message: of the commit.
        licence: identifier as on the Hub ("mit"); None: the card says that none is stated, and a warning is logged.
        data_note: what should be known of the training images.
        card: the whole text of README.md, instead of one made of what is recorded.

    Returns: the address of the commit.

    Raises:
        UsageError: for a directory without such a model or with a damaged file, a name that is no repository, no token or
            one that may not write, a card that the Hub refuses, or a Hub that cannot be reached.
    """
    check_name(repo_id)
    with _directory(source) as directory:
        check_directory(directory)
        if card is None and licence is None:
            log.warning("No licence is given, and the card of %s says that none is stated.", repo_id)
        card = card or model_card(directory, repo_id, licence=licence, data_note=data_note)
        return _upload(directory, repo_id, card, private, token, message)


@contextmanager
def _directory(source: nn.Module | str | os.PathLike[str]) -> Iterator[Path]:
    """The directory of a model; one that is in memory is written into a temporary one."""
    if not isinstance(source, nn.Module):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(source, Task):
            source.save_pretrained(Path(folder))
        else:
            save_pretrained(source, folder)
        yield Path(folder)


def check_name(repo_id: str) -> None:
    """Raises UsageError unless ``repo_id`` is "owner/name" as the Hub allows it."""
    found = REPOSITORY.fullmatch(repo_id)
    if (
        not found
        or found[2]
        or len(repo_id) > 96
        or "--" in repo_id
        or ".." in repo_id
        or repo_id.endswith((".", "-", ".git"))
    ):
        raise UsageError(
            f"'{repo_id}' is no name of a repository: write owner/name with letters, digits, '-', '_' and '.', at most 96."
        )


def check_directory(directory: Path) -> None:
    """Raises UsageError unless ``directory`` holds a model that this library wrote, and an undamaged one."""
    if not directory.is_dir():
        raise UsageError(
            f"There is no directory {directory}. Give one with {' and '.join(FILES)}, such as a run's best."
        )
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing or read_record(directory).get("model_type") != MODEL_TYPE:
        best = f" Did you mean {directory / 'best'}?" if (directory / "best").is_dir() else ""
        lack = f"no {missing[0]}" if missing else "a config.json that is not swinscale's"
        raise UsageError(
            f"{directory} holds {lack}: give a directory that swinscale wrote (load others with from_pretrained, then "
            f"save_pretrained).{best}"
        )
    check_hashes(directory)


def files_to_push(directory: Path, card: str) -> list[tuple[str, int]]:
    """Name and size in bytes of what ``push_to_hub`` uploads."""
    return [*((name, (directory / name).stat().st_size) for name in FILES), ("README.md", len(card.encode()))]


def _upload(directory: Path, repo_id: str, card: str, private: bool, token: str | None, message: str | None) -> str:
    hub = import_hub()
    if not (token or hub.get_token()):
        raise UsageError(
            f"There is no token to write to '{repo_id}' with: log in with 'hf auth login', or set HF_TOKEN."
        )
    api = hub.HfApi(endpoint(), token=token, library_name="swinscale", library_version=__version__)
    operations = [hub.CommitOperationAdd(name, str(directory / name)) for name in FILES]
    operations.append(hub.CommitOperationAdd("README.md", card.encode()))
    try:
        with explained(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.create_commit(repo_id, operations, commit_message=message or f"swinscale {__version__}")
    except UsageError:
        raise
    except Exception as error:  # the HTTP library, and so its errors, differ between versions of huggingface_hub
        if isinstance(error, OSError) and error.errno and error.filename:  # a file of ours
            raise
        raise UsageError(f"'{repo_id}' was not published: {reason(error)}. Try again.") from error
    return str(commit.commit_url)
