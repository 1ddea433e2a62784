"""Fitted temperatures where the drafter finds them again: in its directory, whatever kind of drafter it is.

A DeepSpec drafter belongs to one model and has them in its manifest. A compiled model may draft for several: its
`calibration.json` has them by the hash of the model's weights that they were fitted with.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsopt.runtime.artifact import WEIGHTS
from dsopt.runtime.drafters.manifest import DRAFT_MANIFEST, MODES, save_temperatures
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import write_atomically
from dsopt.runtime.model import Model

CALIBRATION = "calibration.json"


def store_temperatures(directory: Path, target: Model, mode: str, values: list[float]) -> None:
    """Note what was fitted for the drafter in `directory` with `target`.

    Raises DsoptError where nothing can be written.
    """
    try:
        if (directory / DRAFT_MANIFEST).is_file():
            save_temperatures(directory, mode, values)
            return
        known = _read(directory)
        mine = {**known.get(_weights(target), {}), mode: values}
        text = json.dumps({**known, _weights(target): mine}, indent=1) + "\n"
        write_atomically(directory / CALIBRATION, text.encode(), parents=False)
    except OSError as error:
        raise DsoptError(f"{directory}: the temperatures cannot be written ({error.strerror})") from error


def model_temperatures(directory: Path, target: Model, mode: str) -> list[float]:
    """Of a compiled model that drafts for `target`; [] where none were fitted."""
    values: list[float] = _read(directory).get(_weights(target), {}).get(mode, [])
    return values


def _weights(target: Model) -> str:
    return str(target.artifact.manifest.files[WEIGHTS]["sha256"])


def _read(directory: Path) -> dict[str, dict[str, list[float]]]:
    path = directory / CALIBRATION
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict) or not all(map(_is_calibration, raw.values())):
        raise DsoptError(f"{path}: no temperatures by model and mode; delete it, or fit them again")
    return raw


def _is_calibration(modes: Any) -> bool:
    return isinstance(modes, Mapping) and all(
        mode in MODES
        and isinstance(values, list)
        and values
        and all(isinstance(value, float) and value > 0 for value in values)
        for mode, values in modes.items()
    )
