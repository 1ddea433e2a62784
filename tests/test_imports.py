"""The rooms: who may import whom, what must stay light, how long a file may be."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("cli", "compiler", "runtime")
MAY_IMPORT = {
    "cli": {"cli", "compiler", "runtime"},
    "compiler": {"compiler", "runtime"},
    "runtime": {"runtime"},
}
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
LONGEST = 400
COMPILER_ONLY = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "gguf"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for imported in imports(path):
        top, _, rest = imported.partition(".")
        assert top not in ROOMS, f"import dsopt.{imported}"
        if top == "dsopt":
            assert rest.split(".")[0] in MAY_IMPORT[room], imported
        if room == "runtime":
            assert top not in COMPILER_ONLY


def loaded_by(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter after `code`."""
    code += "\nimport json, sys; print(json.dumps([*sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {module.partition(".")[0] for module in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.parametrize("words", [["--help"], ["compile", "--help"], ["generate", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    run = "from dsopt.cli.main import main\ntry:\n    main()\nexcept SystemExit:\n    pass"
    loaded = loaded_by(f"import sys\nsys.argv[1:] = {words}\n{run}")
    assert "dsopt" in loaded
    assert not {"numpy", "onnxruntime", "rich", "tokenizers", "jinja2", *COMPILER_ONLY} & loaded


def test_running_a_model_loads_no_compiler_library() -> None:
    modules = [".".join(("dsopt", *path.relative_to(ROOT).with_suffix("").parts)) for path in SOURCES
               if path.parts[-2] == "runtime"]  # fmt: skip
    loaded = loaded_by("\n".join(f"import {module}" for module in modules))
    assert "onnxruntime" in loaded
    assert not COMPILER_ONLY & loaded


def test_files_stay_readable() -> None:
    lengths = sorted(((len(path.read_text().splitlines()), name(path)) for path in SOURCES), reverse=True)
    for lines, path in lengths[:10]:
        print(f"{lines:5} {path}")
    assert lengths[0][0] <= LONGEST, lengths[0]
