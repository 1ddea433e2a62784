"""A search without a clock, and `dsopt compile` in this process."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from dsopt.cli import main
from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.recipe import Format

SPEEDS = {"w7a8": 0.8, "w8a8": 1, "w7a8-token": 1.1, "w8a8-token": 1.3, "w7a8-rot": 1, "w8a8-rot": 1.2,
          "w7a8-token-rot": 1.3, "w8a8-token-rot": 1.5, "int4-zp-b64": 1.9, "int4-zp": 2, "int4-min": 3,
          "int4": 1.8, "int4-b64": 1.7, "int8-b64": 3.9, "int8": 4}  # fmt: skip


def made_up(shapes: Mapping[tuple[int, int], Sequence[Format]], rows: Sequence[int], **_: Any) -> KernelTable:
    """Times without a clock."""
    cells = {
        (n, k, str(form), m): 1e-9 * n * k * m**0.5 * SPEEDS[str(form)]
        for (n, k), forms in shapes.items()
        for form in forms
        for m in rows
    }
    return KernelTable({"device": "none"}, cells, {1: 1e-6})


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `dsopt compile WORDS`."""
    monkeypatch.setattr("sys.argv", ["dsopt", "compile", *words])
    with pytest.raises(SystemExit) as caught:
        main.main()
    captured = capsys.readouterr()
    return int(str(caught.value.code)), captured.out, captured.err
