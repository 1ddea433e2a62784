"""The text to calibrate on: a user's file, or what the model writes itself; in windows of token ids."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dsopt.compiler.calibrate import SAMPLE
from dsopt.compiler.checkpoint import Checkpoint
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import cache_dir
from dsopt.runtime.tokenizer import Tokenizer

Progress = Callable[[int, int], None]

TOKENS = 256  # of a window
HELD = 8  # windows, kept for judging
WINDOWS = 32 + SAMPLE + HELD  # at most
_VERSION = 2


def read_windows(path: Path, checkpoint: Checkpoint) -> np.ndarray:
    """A text, or JSON lines with `prompt` or `text`: int64 [windows, TOKENS], from places spread over all of it.

    Raises DsoptError when it cannot be read or is too short.
    """
    tokenizer = Tokenizer.from_bytes(checkpoint.files["tokenizer.json"], checkpoint.source.path / "tokenizer.json")
    ids = tokenizer.encode(read_text(path), special=False)
    size = min(TOKENS, int(checkpoint.config["max_position_embeddings"]))
    count = len(ids) // size
    least = 2 * SAMPLE + HELD
    if count < least:
        raise DsoptError(f"{path}: has {len(ids)} tokens; --calib needs {least * size}, and uses {WINDOWS * size}")
    cut = np.asarray(ids[: count * size], np.int64).reshape(count, size)
    taken = np.linspace(0, count - 1, min(count, WINDOWS)).round().astype(int)
    # Mixed: a file may be in order of kinds, and the first are priced on, the last judged on.
    return cut[np.random.default_rng(0).permutation(taken)]


def read_text(path: Path) -> str:
    """A text, or what JSON lines say. Raises DsoptError when it cannot be read."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DsoptError(f"{path} could not be read ({error.strerror}); --calib names a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise DsoptError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    return "\n\n".join(_lines(path, content)) if path.suffix == ".jsonl" else content


def _lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            texts.append(str(entry["prompt"] if "prompt" in entry else entry["text"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DsoptError(f"{path}, line {number}: no JSON object with prompt or text ({error!r})") from error
    return texts


def self_windows(checkpoint: Checkpoint, progress: Progress = lambda done, total: None) -> np.ndarray:
    """What the model writes itself, kept in the cache by its fingerprint; int64 [WINDOWS, TOKENS]."""
    size = min(TOKENS, int(checkpoint.config["max_position_embeddings"]))
    tokens = hashlib.sha256(checkpoint.files["tokenizer.json"]).hexdigest()  # of a pruned vocabulary: others
    key = hashlib.sha256(f"{_VERSION} {checkpoint.source.sha256} {tokens} {WINDOWS} {size}".encode()).hexdigest()[:32]
    path = cache_dir() / "texts" / f"{key}.npy"
    if path.exists():
        return np.asarray(np.load(path, allow_pickle=False), np.int64)
    from dsopt.compiler.reference import Reference
    from dsopt.compiler.self_text import write_windows

    windows = np.stack(write_windows(Reference(checkpoint), WINDOWS, size, progress=progress))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial.npy")
    np.save(aside, windows)
    aside.replace(path)
    return windows
