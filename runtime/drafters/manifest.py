"""The manifest of a drafter's directory in an artifact: what its graphs are and what they borrow from the model's."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import sha256_file, write_atomically
from dsopt.runtime.sampling import Sampling

FORMAT = 1
DRAFT_MANIFEST = "draft.json"
KINDS = ("dspark", "dflash", "eagle3")
MODES = ("greedy", "sampled")

_SHAPE = ("layers", "hidden_size", "kv_heads", "head_dim", "vocab_size", "context_length")
_TYPES: Mapping[str, type] = {
    "format": int, "kind": str, "name": str, "recipe": str, "source": dict, "model": dict, "taps": list, "steps": int,
    "mask_token": int, "candidates": int, "confidence": bool, "target_weights": str, "borrowed": dict, "files": dict,
    "versions": dict, "temperatures": dict,
}  # fmt: skip


def mode_of(sampling: Sampling) -> str:
    """Drafts are accepted more or less often when tokens are drawn: temperatures are fitted apart."""
    return "sampled" if sampling.temperature else "greedy"


@dataclass(frozen=True)
class DraftManifest:
    """What a drafter is. `borrowed`: by graph and initializer, where in the model's weights file it stands."""

    kind: str  # dspark | dflash | eagle3
    name: str  # the checkpoint's short name
    recipe: str
    source: Mapping[str, str]  # kind, name, sha256
    model: Mapping[str, int]  # layers, hidden_size, kv_heads, head_dim, vocab_size, context_length
    taps: tuple[int, ...]
    steps: int  # tokens a draft has at most
    mask_token: int
    candidates: int  # tokens that each is chosen among
    confidence: bool
    target_weights: str  # sha256 of the weights file that is borrowed from
    borrowed: Mapping[str, Mapping[str, Mapping[str, Any]]]  # offset, shape, dtype
    files: Mapping[str, Mapping[str, Any]]  # by file name: bytes, sha256
    versions: Mapping[str, str]
    # By mode, greedy or sampled: what the confidence of each position is divided by, once it has been fitted.
    temperatures: Mapping[str, list[float]] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: Path) -> "DraftManifest":
        """Raises DsoptError when the data is no such manifest."""
        try:
            raw = json.loads(data)
            odd = list({f.name for f in fields(cls)} ^ set(raw))
            odd += [name for name, kind in _TYPES.items() if type(raw.get(name)) is not kind]
            odd += [name for name in _SHAPE if type(raw["model"].get(name)) is not int]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DsoptError(f"{where}: not a drafter's manifest ({error!r}); compile the drafter again") from error
        if odd or raw["format"] != FORMAT or raw["kind"] not in KINDS or not _is_list(raw["taps"], int):
            what = ", ".join(sorted(odd)) or "format, kind or taps"
            raise DsoptError(f"{where}: missing or unknown values ({what}); compile the drafter again")
        for mode, values in raw["temperatures"].items():
            if mode not in MODES or not _is_list(values, float) or len(values) != raw["steps"] or min(values) <= 0:
                raise DsoptError(
                    f"{where}: temperatures of {mode} are not {raw['steps']} positive numbers; fit them again"
                )
        return cls(**{**raw, "taps": tuple(raw["taps"])})


def _is_list(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def open_draft(directory: Path, target_weights: str) -> DraftManifest:
    """Read and check a drafter's directory. `target_weights`: sha256 of the weights of the model it stands in.

    Raises DsoptError when a file is missing or changed, or the drafter was compiled with another model.
    """
    path = directory / DRAFT_MANIFEST
    if not path.is_file():
        raise DsoptError(f"{directory}: no drafter ({DRAFT_MANIFEST} is missing); compile the model with --draft")
    manifest = DraftManifest.from_json(path.read_bytes(), path)
    if manifest.target_weights != target_weights:
        raise DsoptError(f"{directory}: was compiled with another model; compile model and drafter together")
    for name, entry in manifest.files.items():
        file = directory / name
        if not file.is_file() or sha256_file(file) != entry.get("sha256"):
            raise DsoptError(f"{file}: missing or changed since it was compiled; compile the drafter again")
    return manifest


def save_temperatures(directory: Path, mode: str, values: list[float]) -> None:
    """Note the fitted temperatures of `mode` in a drafter's manifest."""
    path = directory / DRAFT_MANIFEST
    manifest = DraftManifest.from_json(path.read_bytes(), path)
    made = replace(manifest, temperatures={**manifest.temperatures, mode: [float(value) for value in values]})
    write_atomically(path, made.to_json(), parents=False)
