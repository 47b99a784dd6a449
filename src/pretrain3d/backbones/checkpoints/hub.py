"""``hf://owner/name[/file][@revision]``: checkpoints on the Hugging Face hub, fetched once and kept in its cache."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError

SCHEME = "hf://"
ENDINGS = (".pth", ".pt", ".ckpt", ".bin")
USUAL = "checkpoint_final.pth"  # of nnssl's repositories
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([\w./-]+))?")


def local(path: str | PathLike[str]) -> Path:
    """The file on this machine: a path as it is, an ``hf://`` address after its download.

    Raises:
        UserError: a malformed address, no `huggingface_hub`, no such repository or file, no access, or no network.
    """
    if not str(path).startswith(SCHEME):
        return Path(path)
    return _fetch(str(path))


def name_of(path: str | Path) -> str:
    """What a checkpoint is called where nothing in it says so: the repository's name, or the file's."""
    match = _ADDRESS.fullmatch(str(path))
    return match[1].partition("/")[2] if match else Path(path).stem


def _fetch(address: str) -> Path:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address}: expected hf://owner/name, hf://owner/name/file or either with @revision")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(f"{address} needs the hub's client: pip install 'pretrain3d[hub]'") from error
    repository, file, revision = match.groups()
    try:
        try:  # the usual name first: where it is in the cache, no network is needed
            return Path(huggingface_hub.hf_hub_download(repository, file or USUAL, revision=revision))
        except errors.EntryNotFoundError as error:
            if file or isinstance(error, errors.LocalEntryNotFoundError):
                raise
        file = _only_checkpoint(huggingface_hub.HfApi(), repository, revision, address)
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        if _status(error) is not None:
            raise _refused(address, error) from error
        raise UserError(f"{address} is not in the cache and the hub cannot be reached; try again online") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{address}: {repository} has no file {file}") from error
    except errors.GatedRepoError as error:
        raise UserError(f"{address}: accept its terms on the hub first, then `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"{address}: the hub has no such repository or revision, or it is private") from error
    except UserError:
        raise
    except Exception as error:  # the client has used three transports so far, whose errors have no common class
        if _status(error) is not None:
            raise _refused(address, error) from error
        raise UserError(f"{address}: the hub cannot be reached ({_reason(error)})") from error


def _only_checkpoint(api: Any, repository: str, revision: str | None, address: str) -> str:
    files = [name for name in api.list_repo_files(repository, revision=revision) if name.endswith(ENDINGS)]
    if len(files) != 1:
        known = ", ".join(files[:8]) or f"none of {', '.join(ENDINGS)}"
        raise UserError(f"{address}: say which file: {address}/FILE; it has {known}")
    return files[0]


def _status(error: BaseException | None) -> int | None:
    """The HTTP status with which the hub answered; None where it did not answer."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return int(error.response.status_code)  # type: ignore[attr-defined]
        error = error.__cause__
    return None


def _refused(address: str, error: Exception) -> UserError:
    status = _status(error)
    advice = "check the token (`hf auth login`, HF_TOKEN)" if status in (401, 403) else "try again later"
    return UserError(f"{address}: the hub answers with status {status}; {advice}")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
