"""Folders on the Hugging Face hub: from its cache if they are whole there (no network), else downloaded; and back.

Only safetensors, JSON and text are ever fetched: nothing that could hold a program.
"""

import re
from collections.abc import Callable
from pathlib import Path

from mars.errors import ModelError

READ = ("*.safetensors", "*.json", "*.jinja", "*.tiktoken", "*.md")
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """Whether a source has the form `owner/name`."""
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
    from huggingface_hub import snapshot_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [*READ, *(f"{folder}/{pattern}" for folder in subfolders for pattern in READ)]

    def snapshot(*, offline: bool) -> Path:
        path = snapshot_download(name, revision=revision, local_files_only=offline, allow_patterns=wanted)
        return Path(path)

    try:
        folder = snapshot(offline=True)
        if is_whole(folder):
            return folder
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    try:
        return snapshot(offline=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"model {name} is neither in the hub's cache nor can it be downloaded: {_reason(error)}"
        ) from error


def upload(folder: Path, name: str, *, private: bool, revision: str | None, message: str) -> str:
    """Puts a folder's files on the hub, which is made if it is not there. Returns the address of the commit.

    Raises:
        ModelError: if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{name} cannot be written on the hub: {_reason(error)}; log in, or check the name") from error
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
