"""The text that a model is calibrated on: windows of a file."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsopt.compiler.calibrate import SAMPLE
from dsopt.compiler.checkpoint import Checkpoint, open_checkpoint
from dsopt.compiler.corpus import HELD, TOKENS, WINDOWS, read_windows
from dsopt.runtime.errors import DsoptError


@pytest.fixture
def short(tiny_llama_dir: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(str(tiny_llama_dir(max_position_embeddings=32)))


def test_windows_are_from_all_over_a_text(short: Checkpoint, tmp_path: Path) -> None:
    """A token is a byte here: windows can be read back."""
    path = tmp_path / "text"
    path.write_text("".join(f"{n:06} " for n in range(1000)))
    windows = read_windows(path, short)
    assert windows.shape == (WINDOWS, min(TOKENS, 32))
    alphabet = {index: character for character, index in tokens(short).items()}
    starts = ["".join(alphabet[i] for i in window) for window in windows]
    for kept in (starts[:SAMPLE], starts[SAMPLE:-HELD], starts[-HELD:]):  # what is priced on, calibrated by, judged on
        places = [int(re.findall(r"\d{6}", start)[0]) for start in kept]
        assert max(places) - min(places) > 500
    assert any(start.startswith("000000") for start in starts)
    assert any("00099" in start for start in starts)
    assert len(set(starts)) == WINDOWS


def tokens(checkpoint: Checkpoint) -> dict[str, int]:
    return json.loads(checkpoint.files["tokenizer.json"])["model"]["vocab"]


def test_json_lines(short: Checkpoint, tmp_path: Path) -> None:
    plain, lines = tmp_path / "text.txt", tmp_path / "text.jsonl"
    plain.write_text(f"{'a' * 300}\n\n{'b' * 300}")
    lines.write_text(f'{{"prompt": "{"a" * 300}"}}\n\n{{"text": "{"b" * 300}"}}\n')
    np.testing.assert_array_equal(read_windows(lines, short), read_windows(plain, short))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"too short", "has 9 tokens; --calib needs 512, and uses 1408"),
        ("a.txt", b"\xff" * 9, "is not UTF-8"),
        ("a.txt", None, "could not be read"),
        ("a.jsonl", b'{"text": "x"}\n{"answer": 4}', "line 2"),
        ("a.jsonl", b"[1]", "line 1"),
        ("a.jsonl", b"5", "line 1"),
        ("a.jsonl", b"{", "line 1"),
    ],
)
def test_texts_that_are_none(name: str, content: bytes | None, says: str, short: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DsoptError, match=says) as caught:
        read_windows(path, short)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
