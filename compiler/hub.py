"""Checkpoints of the Hugging Face hub, through its own library and its own cache."""

import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.safetensors_dir import open_safetensors_dir
from dsopt.runtime.errors import DsoptError

_WANTED = [
    *("config.json", "generation_config.json", "tokenizer*", "chat_template.jinja"),
    *("*.safetensors", "*.safetensors.index.json"),
]
_UNWANTED = ["*/*", "consolidated*"]  # the same weights again, under other names


def open_hub(repository: str) -> Checkpoint:
    """Download `repository` ("org/name") or find it in the cache, and open it.

    Without a network the cached snapshot is taken. Raises DsoptError when there is none, or the hub refuses.
    """
    return open_safetensors_dir(snapshot(repository), kind="huggingface", name=repository.split("/")[-1])


def snapshot(repository: str) -> Path:
    """The directory in the hub's cache where the files of `repository` are, downloaded if need be."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError as error:
        raise DsoptError(
            f"{repository} is gated: accept its terms on https://huggingface.co and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise DsoptError(
            f"the Hugging Face hub has no public model {repository}; check the name, or `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise DsoptError(
            f"{repository} is neither a path here nor in the Hugging Face cache, and the hub gives nothing "
            f"({_first_line(error)}); give a directory or a .gguf file, or go online"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DsoptError(f"{repository} could not be downloaded from the hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
