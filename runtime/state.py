"""What a generation leaves behind: its tokens and their cache, to go on from, now or by a file later."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dsopt.runtime.artifact import GRAPH, WEIGHTS, Artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import write_atomically
from dsopt.runtime.kv import KvCache
from dsopt.runtime.sampling import Sampler, Sampling

_KIND, _VERSION = "dsopt-state", "1"
_IDENTITY = (GRAPH, WEIGHTS, "tokenizer.json")  # what token ids and cache mean
# What reading foreign bytes raises: the file's form, JSON, NumPy, the checks here and that of the sampler.
_DAMAGE = (
    *(SafetensorError, KeyError, ValueError, IndexError, StopIteration, TypeError, OverflowError),
    *(RecursionError, DsoptError),
)


@dataclass
class State:
    """A sequence in the making.

    tokens: the ids so far, prompts and answers. The cache holds a prefix of them: all but the last one, which
        is fed only when its successor is wanted, or fewer after an interrupt.
    sampling: `Sampler.state()` after the last token.
    messages: the conversation, for a chat template to go on; None for raw text.
    """

    cache: KvCache
    tokens: list[int] = field(default_factory=list)
    sampling: Mapping[str, Any] | None = None
    messages: list[Mapping[str, Any]] | None = None

    def become(self, tokens: Sequence[int]) -> int:
        """Make `tokens` the sequence; returns how many need not be computed again (never the last)."""
        kept = min(common_prefix(self.tokens, tokens), len(tokens) - 1)
        self.cache.trim(min(kept, self.cache.length))
        self.tokens = list(tokens)
        return self.cache.length


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def save_state(path: Path, state: State, artifact: Artifact) -> None:
    """Write a safetensors file: the cache, float32 [heads, length, head_dim] a layer and part, and the token
    ids int64 [n] as tensors, all else as metadata.

    Raises DsoptError when the file cannot be written; what stood there is then as before.
    """
    tensors = {f"kv.{name}": np.ascontiguousarray(part) for name, part in state.cache.valid().items()}
    tensors["tokens"] = np.asarray(state.tokens, np.int64)
    metadata = {
        "kind": _KIND,
        "version": _VERSION,
        "model": f"{artifact.manifest.name} {artifact.manifest.recipe}",
        "identity": _identity(artifact),
        "sampling": json.dumps(state.sampling),
        "messages": json.dumps(state.messages),
    }
    try:
        write_atomically(path, save(tensors, metadata), parents=False)
    except OSError as error:
        raise DsoptError(f"{path}: the state cannot be written ({error.strerror})") from error


def check_replaceable(path: Path) -> None:
    """Raises DsoptError when no file can be made beside `path`, or it exists and is no saved state: only those
    are replaced."""
    try:
        tempfile.TemporaryFile(dir=path.parent).close()  # permission bits do not tell all, such as of /proc
        if not path.exists():
            return
    except OSError as error:
        what = error.strerror or error
        raise DsoptError(f"{path}: the state cannot be written ({what}); choose another --save-state") from error
    try:
        _read_metadata(path)
    except DsoptError as error:
        raise DsoptError(f"{path}: exists and is no saved state; choose another --save-state") from error


def load_state(path: Path, artifact: Artifact, cache: KvCache) -> State:
    """Read a state into an empty cache of the same model.

    Raises DsoptError when the file is missing, no state, cut short, damaged, of another model or longer than
    the context.
    """
    metadata = _read_metadata(path)
    if metadata.get("identity") != _identity(artifact):
        raise DsoptError(
            f"{path}: saved with another model ({metadata.get('model')}), this one is "
            f"{artifact.manifest.name} {artifact.manifest.recipe}; load it with the model that saved it"
        )
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tokens = _checked_tokens(tensors.pop("tokens"), artifact.manifest.model["vocab_size"])
        parts = {name.removeprefix("kv."): part for name, part in tensors.items()}
        length = _checked_length(parts, len(tokens))
        sampling, messages = json.loads(metadata["sampling"]), _checked_messages(json.loads(metadata["messages"]))
        if sampling is not None:
            Sampler(Sampling()).restore(sampling)
    except _DAMAGE as error:
        raise DsoptError(f"{path}: damaged state ({' '.join(repr(error).split())}); generate anew") from error
    cache.restore(parts, length)
    return State(cache, tokens, sampling, messages)


def _checked_tokens(tokens: NDArray[Any], vocab_size: int) -> list[int]:
    if tokens.dtype != np.int64 or tokens.ndim != 1:
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}, not int64 [n]")
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise ValueError(f"a token outside the vocabulary of {vocab_size}")
    return [int(token) for token in tokens]


def _checked_length(parts: Mapping[str, NDArray[Any]], tokens: int) -> int:
    if any(part.dtype != np.float32 for part in parts.values()):
        raise ValueError("a cache that is not float32")
    length = int(next(iter(parts.values())).shape[1])
    if length > tokens:
        raise ValueError(f"a cache of {length} positions for {tokens} tokens")
    return length


def _checked_messages(messages: Any) -> Any:
    """None or a list of objects with role and content, as a chat template takes them."""
    good = messages is None or isinstance(messages, list)
    for message in messages or () if good else ():
        good &= isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
    if not good:
        raise ValueError("messages that are no list of role and content")
    return messages


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "numpy") as file:  # maps the file, and checks that all of it is there
            metadata = file.metadata() or {}
    except OSError as error:
        raise DsoptError(f"{path}: the state cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise DsoptError(f"{path}: no saved state, or cut short ({error}); generate anew") from error
    if metadata.get("kind") != _KIND or metadata.get("version") != _VERSION:
        raise DsoptError(f"{path}: no saved state of this dsopt; make one with --save-state")
    return metadata


def _identity(artifact: Artifact) -> str:
    hashes = [str(artifact.manifest.files[name]["sha256"]) for name in _IDENTITY]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
