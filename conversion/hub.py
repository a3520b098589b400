"""Folders of the Hugging Face hub, through huggingface_hub and its local cache."""

import re
from collections.abc import Sequence
from pathlib import Path

_REPO_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_SHARED = ("model_index.json", "clvr.json", "*/config.json", "tokenizer/*", "scheduler/*")
# a model on its own: weights, configs and, of a language model, tokenizer and processor
_SINGLE = ("*.safetensors", "*.json", "merges.txt", "*.jinja")


class HubError(OSError):
    """A repository could not be had; the message says why and what to do."""


def is_repo_id(text: str) -> bool:
    """Return whether `text` has the form `org/name`."""
    return _REPO_ID.fullmatch(text) is not None


def download(repo_id: str, components: Sequence[str]) -> Path:
    """Return the local folder of a repository with the chosen components; cached files are reused.

    A repository without model_index.json is one model: its weights and small files are fetched.

    Raises:
      HubError: gated, missing, or not cached while the hub is out of reach.
    """
    folder = _snapshot(repo_id, [*_SHARED, *(f"{name}/*" for name in components)])
    if not any((folder / name).exists() for name in ("model_index.json", "clvr.json")):
        folder = _snapshot(repo_id, list(_SINGLE))
    return folder


def _snapshot(repo_id: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo_id}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo_id} is gated: accept its licence at {page} with your account, then {login}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id} is neither a local path nor a repository you can see on the hub; check the "
            f"spelling at {page}, or, if it is private, {login}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{repo_id} is not in the local cache (or not complete) and the hub is out of reach; "
            "connect (unset HF_HUB_OFFLINE), set HF_HOME to the folder that holds the cache, or "
            f"give a local path. {_first_line(error)}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise HubError(f"{repo_id}: access refused (HTTP {status}); {login}") from error
        raise HubError(f"{repo_id}: the hub answered HTTP {status}; try again later") from error
    except (errors.HTTPError, OSError) as error:
        raise HubError(
            f"{repo_id} could not be downloaded; what came is cached, so run again to go on. "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else ""
