"""Which compiled model a command means, and where compiled models are kept."""

import json
import os
import sys
from pathlib import Path

from dsopt.runtime.artifact import MANIFEST, Artifact, open_artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import cache_dir, write_atomically

BUILT_IN = "smollm2"
_QUICK = "int4-min,head=int8"  # the built-in model's own weights, kept as they are: no search, an answer soon


def default_directory(name: str, recipe: str, sha256: str) -> Path:
    """Where `dsopt compile` puts a model unless told: `artifacts/NAME-RECIPE-HASH` in the cache.

    The hash is the checkpoint's, so that two of one name, or one before and after an edit, do not meet.
    """
    plain = recipe.replace(",", "+").replace("%", "pct").translate(str.maketrans("= :@", "----"))
    return cache_dir() / "artifacts" / f"{name}-{plain}-{sha256[:8]}"


def remember_last(directory: Path) -> None:
    write_atomically(cache_dir() / "last", os.fsencode(directory.absolute()))


def find_artifact(model: Path | None) -> Artifact:
    """The model asked for; else $DSOPT_MODEL; else the one compiled last; else the built-in one, compiled now.

    What was chosen without being asked for is said on stderr. Raises DsoptError where the choice cannot be read.
    """
    if model is not None:
        return open_artifact(model)
    if named := os.environ.get("DSOPT_MODEL"):
        return open_artifact(Path(named).expanduser())
    last = _last()
    if last is None:
        print(f"dsopt: no model compiled yet; compiling the built-in {BUILT_IN}", file=sys.stderr)
        from dsopt.cli.compile import compile_model
        from dsopt.cli.order import Order

        last = compile_model(BUILT_IN, order=Order(_QUICK))
    else:
        print(f"dsopt: using {last}", file=sys.stderr)
    return open_artifact(last)


def _last() -> Path | None:
    """The artifact compiled last, None before the first. Raises DsoptError when it is gone."""
    try:
        path = Path(os.fsdecode((cache_dir() / "last").read_bytes()))
    except FileNotFoundError:
        return None
    if not (path / MANIFEST).is_file():
        raise DsoptError(f"{path}: the model compiled last is gone; name another with -m, or compile one")
    return path


def check_overwrite(directory: Path, *, force: bool) -> None:
    """Raises DsoptError when `directory` exists and may not be replaced."""
    if Path.cwd().is_relative_to(directory.resolve()):
        raise DsoptError(f"{directory}: is the current directory or above it; choose another -o")
    if not directory.exists():
        return
    if force and (directory / MANIFEST).is_file():
        _check_own(directory)
        return
    if force and directory.is_dir() and not any(directory.iterdir()):
        return
    if force:
        raise DsoptError(f"{directory}: exists and is no compiled model; --force replaces only those")
    raise DsoptError(f"{directory}: exists already; choose another -o, or --force to replace it")


def _check_own(directory: Path) -> None:
    """Raises DsoptError when a user's file is among those of the artifact: it would go with them."""
    from dsopt.runtime.drafters.temperatures import CALIBRATION

    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        files = {*manifest["files"], *manifest["drafters"], MANIFEST, CALIBRATION}
    except (ValueError, KeyError, TypeError):
        return  # a damaged manifest: whatever is here was a compiled model
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in files)
    if foreign:
        raise DsoptError(f"{directory}: has files that are not the model's ({', '.join(foreign[:3])}); move them first")
