"""Folders on the Hugging Face hub: from its cache if they are whole there (no network), else downloaded; and back.

Only safetensors, JSON and text are ever fetched: nothing that could hold a program.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mars.errors import ModelError

READ = ("*.safetensors", "*.json", "*.jinja", "*.tiktoken", "*.md")
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_LONGEST_REASON = 300


def is_hub_id(source: str) -> bool:
    """Whether a source has the form `owner/name`; `./name` and `../name` are paths."""
    return bool(_ID.fullmatch(source))


def hub_folder(
    name: str, *, revision: str | None, is_whole: Callable[[Path], bool], subfolders: tuple[str, ...] = ()
) -> Path:
    """The local folder of a model on the hub, at a branch, tag or commit.

    Args:
        is_whole: whether a folder of the cache holds every file that will be read.
        subfolders: read too; others are left alone.

    Raises:
        ModelError: if it is neither in the cache nor can be downloaded.
    """
    with suppress(Exception):  # what is wrong is said when the hub is asked
        folder = _snapshot(name, revision=revision, subfolders=subfolders, offline=True)
        if is_whole(folder):
            return folder
    try:
        return _snapshot(name, revision=revision, subfolders=subfolders, offline=False)
    except Exception as error:  # the hub's client lets errors of its HTTP library through, which versions change
        at = f" at {revision}" if revision else ""
        raise ModelError(
            f"model {name}{at} is neither in the hub's cache nor can it be downloaded: {_reason(error)}"
        ) from error


def _snapshot(name: str, *, revision: str | None, subfolders: tuple[str, ...], offline: bool) -> Path:
    """The hub's patterns do not stop at a slash: the top folder is asked for first, then those below."""
    from huggingface_hub import snapshot_download  # slow to import

    top, below = list(READ), [f"{folder}/{pattern}" for folder in subfolders for pattern in READ]
    folder = Path(
        snapshot_download(
            name, revision=revision, local_files_only=offline, allow_patterns=top, ignore_patterns=["*/*"]
        )
    )
    if below:  # of the same commit; config.json is there already, and keeps the client from warning of no match
        snapshot_download(name, revision=folder.name, local_files_only=offline, allow_patterns=["config.json", *below])
    return folder


def upload(folder: Path, name: str, *, private: bool, revision: str | None, message: str) -> str:
    """Puts a folder's files on the hub; the model and the branch are made if they are not there.

    Returns the address of the commit.

    Raises:
        ModelError: if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)
    except Exception as error:  # as in `hub_folder`
        raise ModelError(f"{name} cannot be written on the hub: {_reason(error)}; log in, or check the name") from error
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    """What the client says, as one line that is not too long."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
