"""Uploads an export to the Hugging Face Hub, or to a server that speaks like it (HF_ENDPOINT).

The token is where huggingface_hub looks for it: `hf auth login`, or HF_TOKEN. It is never an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simclr_dist.errors import ExportError
from simclr_dist.streams import printable


def import_hub() -> Any:
    """Raises ExportError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise ExportError("--push-to-hub needs huggingface-hub: pip install 'simclr-dist[hf]'") from None
    return huggingface_hub


def check_repository(name: str) -> None:
    """Raises ExportError for a name that no repository can have. Asks no server."""
    import_hub()
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") > 1:
            raise HFValidationError("it has more than one /")
    except HFValidationError as error:
        text = printable(str(error).splitlines()[0])
        raise ExportError(f"--push-to-hub {printable(name)}: not a name of a repository, OWNER/NAME: {text}") from None


def push(files: Mapping[str, Path], repository: str, *, public: bool, message: str) -> str:
    """Uploads these files, by their names there, and nothing else, in one commit. Returns the address of the page.

    public: of a repository that is made now; otherwise it is private. One that is there and public is written to
    only where public is true. Raises ExportError.
    """
    hub = import_hub()
    from huggingface_hub.errors import HfHubHTTPError

    api = hub.HfApi(library_name="simclr_dist")
    try:
        made = api.create_repo(repository, repo_type="model", private=not public, exist_ok=True)
        found = api.repo_info(made.repo_id, repo_type="model")
        if not public and found.private is False:
            raise ExportError(
                f"--push-to-hub {repository}: it is there and everyone can read it; nothing was uploaded. "
                "Add --public if that is meant, or name another"
            )
        operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        api.create_commit(made.repo_id, operations, commit_message=message, repo_type="model")
    # What HfHubHTTPError comes from is the base of the errors of the HTTP client, which has changed its name twice.
    except (HfHubHTTPError, *HfHubHTTPError.__bases__, ValueError) as error:  # type: ignore[misc]
        raise ExportError(f"--push-to-hub {repository}: nothing was uploaded: {_why(error, api.endpoint)}") from None
    return str(made)


def _why(error: Exception, endpoint: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = printable(str(getattr(error, "server_message", None) or "").strip())[:300]
    said = f" ({said})" if said else ""
    if status == 401:
        return f"{endpoint} does not know the token{said}; log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"{endpoint} does not allow the token to write there{said}; make one with the right to write"
    if status == 404:
        return f"{endpoint} has no such owner or repository{said}; look at the name"
    if status is not None and status >= 500:
        return f"{endpoint} has a fault of its own, {status}{said}; try again later"
    if status is not None:
        return f"{endpoint} answered {status}{said}"
    if type(error).__name__ == "LocalTokenNotFoundError":
        return "there is no token; log in with `hf auth login`, or set HF_TOKEN"
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{endpoint} cannot be reached: {printable(text)[:300]}"
