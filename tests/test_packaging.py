"""The wheel: it has the folders' files and no others, and it works where it is installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("cli", "compiler", "runtime")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def source_files() -> set[str]:
    """What a wheel must hold, by path in it."""
    found = [path for room in ROOMS for pattern in ("*.py", "py.typed") for path in (ROOT / room).rglob(pattern)]
    return {f"dsopt/{path.relative_to(ROOT).as_posix()}" for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the tree and nothing left there gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / "tree" / room, ignore=skip)
    for path in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / path).exists():
            shutil.copy(ROOT / path, folder / "tree")
    command = [
        *PIP,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(folder / "tree"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_the_package_list_is_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    assert sorted(listed) == sorted(".".join(("dsopt", *folder.relative_to(ROOT).parts)) for folder in folders)
    with_code = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert with_code == set(folders), "a folder of code without __init__.py"


def test_the_wheel_has_the_files_of_the_folders(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = [name for name in names if ".dist-info/" in name]
    assert set(names) - set(metadata) == source_files()
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert {"dsopt/cli/py.typed", "dsopt/compiler/py.typed", "dsopt/runtime/py.typed"} <= set(names)


def test_the_wheel_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own that borrows this one's libraries, from another folder."""
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    options = ["--no-deps", "--no-index", "--ignore-installed", "--prefix", str(home)]
    subprocess.run([*PIP, "install", "--quiet", *options, str(wheel)], check=True)
    # After the wheel's own folder on the path; the editable install's finder must stay out.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    script = home / "bin" / "dsopt"
    script.write_text(f"#!{home}/bin/python\n" + script.read_text().split("\n", 1)[1])
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment, "check": False}
    done = subprocess.run([script, "--version"], **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dsopt ")
    code = "import dsopt.cli.main, dsopt.compiler.models.llama as deep; print(deep.__file__)"
    where = subprocess.run([home / "bin" / "python", "-c", code], **run)  # type: ignore[call-overload]
    assert where.stdout.startswith(str(site)), where.stdout + where.stderr
