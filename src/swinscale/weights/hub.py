"""Weights on the Hugging Face Hub: from the name of a repository to a directory on this machine, every file verified.

huggingface_hub is imported only when a repository is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swinscale.errors import UsageError
from swinscale.weights.files import WEIGHT_FILES
from swinscale.weights.hashes import check_hashes, git_blob_sha1, sha256

log = logging.getLogger(__name__)

PREFIX = "hf-hub:"
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?")
FILE = re.compile(r".*\.(safetensors|pth|pt|bin|ckpt|json|tar|zip)")
SECONDS = 10
"""How long the Hub may take to answer a question."""


def resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    verify: bool = True,
) -> Path:
    """The path of weights: ``source`` itself where it exists, else the directory that a repository was downloaded to.

    Of a repository only config.json, preprocessor_config.json and the weights are fetched, once: they stay in the cache of
    huggingface_hub. Without a network, what is in the cache is used, and that is logged.

    Args:
        source: a path (that of a run means its best weights), or "owner/name", "owner/name@revision", "hf-hub:owner/name"
            (which is never taken for a path).
        revision: branch, tag or commit; None: the one in ``source``, else "main".
        cache_dir: where to keep downloads; None: ~/.cache/huggingface/hub, or as HF_HUB_CACHE says.
        token: for private and gated repositories; None: HF_TOKEN, or the one that "hf auth login" stored.
        verify: compare every file, now downloaded or not, with the hash that the Hub states for it: SHA-256 for large
            files, git's SHA-1 for small ones. The SHA-256 that the author's ``config.json`` records must be the same.

    Raises:
        UsageError: for a path that does not exist, a repository that does not exist or is not open to the token, weights
            that are neither reachable nor cached, or a file whose hash is another one.
    """
    text = Path(source).as_posix() if isinstance(source, os.PathLike) else source
    name = text.removeprefix(PREFIX)
    if name == text and Path(text).exists():
        return _best_of_run(Path(text))
    found = REPOSITORY.fullmatch(name)
    if name != text and not found:
        raise UsageError(f"'{text}' names no repository: write {PREFIX}owner/name or {PREFIX}owner/name@revision.")
    if not found or (name == text and FILE.fullmatch(name)):
        raise UsageError(
            f"There is no file or directory '{text}'. Check the path, or name a repository of the Hub as owner/name."
        )
    if name == text and Path(name.partition("/")[0]).is_dir():  # a slip in a path, which is nobody else's business
        raise UsageError(
            f"There is no file or directory '{text}'. Check the path; the Hub's repository would be {PREFIX}{name}."
        )
    return _download(found[1], revision or found[2] or "main", cache_dir, token, verify)


def _best_of_run(path: Path) -> Path:
    """Where the weights of a run are, if ``path`` is a run's directory; ``path`` itself otherwise."""
    if (path / "log.jsonl").is_file() and not (path / "model.safetensors").exists():
        return next((path / name for name in ("best", "last") if (path / name / "config.json").is_file()), path)
    return path


def endpoint() -> str | None:
    """The address of another Hub than huggingface.co, as HF_ENDPOINT says now; None: what huggingface_hub takes."""
    return os.environ.get("HF_ENDPOINT") or None


def import_hub() -> Any:
    """The module huggingface_hub.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise UsageError(
            "Repositories of the Hub need the package 'huggingface_hub': pip install 'swinscale[hub]', or give the path "
            "of a directory on this machine."
        ) from error
    return huggingface_hub


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the Hub refuses into one line; a Hub that cannot be reached is left to the caller."""
    errors = import_hub().errors
    token = "log in with 'hf auth login', or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UsageError(
            f"The repository '{repo}' is gated: accept its terms at {_home()}/{repo}, then {token}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"There is no repository '{repo}' at {_home()} (and no path of that name here), or it is private: check the "
            f"name, or {token}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(
            f"The repository '{repo}' has no revision '{revision}': give a branch, a tag or a commit of {_home()}/{repo}."
        ) from error
    except errors.HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):  # None: older versions, no network
            raise
        raise UsageError(f"The Hub refuses the token for '{repo}' ({reason(error)}): {token}.") from error


def reason(error: BaseException) -> str:
    """What went wrong, in a few words of one line."""
    said = getattr(error, "server_message", None) or str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:200].rstrip(".:")


def _home() -> str:
    return endpoint() or "https://huggingface.co"


def _download(
    repo: str, revision: str, cache_dir: str | os.PathLike[str] | None, token: str | None, verify: bool
) -> Path:
    hub = import_hub()
    stated: dict[str, str] = {}  # hashes by file name, as the Hub lists them
    trouble = ""
    try:
        with explained(repo, revision):
            info = hub.HfApi(endpoint(), token=token).model_info(
                repo, revision=revision, files_metadata=True, timeout=SECONDS
            )
            stated = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id or "" for s in info.siblings or ()}
    except UsageError:
        raise
    except Exception as error:  # the HTTP library, and so its errors, differ between versions of huggingface_hub
        trouble = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else reason(error)

    def fetch(name: str, at: str) -> Path | None:
        """The file ``name`` of the repository; None where there is none, or none in the cache."""
        if not trouble and name not in stated:
            return None
        where = {"revision": at, "cache_dir": cache_dir, "token": token, "endpoint": endpoint()}
        try:
            with explained(repo, revision):
                return Path(hub.hf_hub_download(repo, name, local_files_only=bool(trouble), **where))
        except UsageError:
            raise
        except Exception as error:
            if trouble and isinstance(error, hub.errors.LocalEntryNotFoundError):
                return None
            if isinstance(error, OSError) and error.errno:  # a full disk, a cache that cannot be written
                raise
            raise UsageError(f"{name} of '{repo}' could not be downloaded ({reason(error)}). Try again.") from error

    files = _fetch_all(fetch, revision)
    if not any(path.name in WEIGHT_FILES for path in files):
        if trouble:
            raise UsageError(
                f"There is no file or directory '{repo}', and the repository '{repo}' at revision {revision} is not in the "
                f"cache while {_home()} does not answer ({trouble}): fetch it once with a network, or give a local directory."
            )
        raise UsageError(
            f"The repository '{repo}' holds no weights: expected one of {', '.join(WEIGHT_FILES)} in it, found "
            f"{', '.join(sorted(stated)[:10]) or 'nothing'}."
        )
    directory = files[0].parent
    if trouble:
        level = logging.INFO if hub.constants.HF_HUB_OFFLINE else logging.WARNING
        taken = f"'{repo}' is taken from the cache, commit {directory.name}"
        log.log(level, "%s does not answer (%s): %s.", _home(), trouble, taken)
    if verify:
        _verify(files, stated)
    return directory


def _fetch_all(fetch: Any, revision: str) -> list[Path]:
    """Records first, then the weights in the order of preference; all of one commit, which the first file decides."""
    files: list[Path] = []

    def get(name: str) -> bool:
        path = fetch(name, files[0].parent.name if files else revision)
        files.extend([path] if path else [])
        return path is not None

    for name in ("config.json", "preprocessor_config.json"):
        get(name)
    chosen = next((name for name in WEIGHT_FILES if get(name)), None)
    if chosen and chosen.endswith(".index.json"):
        missing = [shard for shard in _shards(files[-1]) if not get(shard)]
        if missing:
            raise UsageError(f"{files[-1].parent} lacks {missing[0]}, which {chosen} names: fetch it with a network.")
    return files


def _shards(index: Path) -> Collection[str]:
    """Names of the files that an index of weight files lists; reading the weights says what is wrong with it."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return ()
    return sorted(name for name in names if isinstance(name, str) and Path(name).name == name)


def _verify(files: list[Path], listed: dict[str, str]) -> None:
    """Compares each file with the hash that the Hub states: the name under which the cache keeps it, or the one listed.

    huggingface_hub itself compares sizes only, and only while it downloads.
    """
    known: dict[str, str] = {}
    for path in files:
        # One step only: behind it may be a store shared by several caches, with names of another kind.
        kept = Path(os.readlink(path)) if path.is_symlink() else path
        stated = kept.name if kept != path else listed.get(path.name, "")
        kind, digest = {64: ("SHA-256", sha256), 40: ("git SHA-1", git_blob_sha1)}.get(len(stated), ("", None))
        if digest is None:
            log.warning("%s is not verified: the Hub states no hash for it.", path)
            continue
        found = digest(path)
        if found != stated.lower():
            raise UsageError(
                f"{path.name} of {path.parent} is damaged: its {kind} is {found}, the Hub states {stated}. Delete "
                f"{path.parent / kept if kept != path else path} and download it again."
            )
        if kind == "SHA-256":
            known[path.name] = found
    check_hashes(files[0].parent, known)
