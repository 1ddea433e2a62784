"""One file per model family, named as the checkpoint's `model_type`. Adding a family = adding a file.

A family exports `Config` (with `from_dict`, `layer` and `rotary`) and `Model`, a torch module whose parameters are
named as in the checkpoint and which has `model.embed_tokens`, `model.layers`, `model.norm` and `lm_head`.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from dsopt.runtime.errors import DsoptError

_SAME = {"gemma4_unified_text": "gemma4_text"}  # model types that are another one's by another name


def families() -> list[str]:
    """Model types that can be compiled."""
    return sorted({m.name for m in pkgutil.iter_modules(__path__)} - {"layers"} | set(_SAME))


def kinds_of(config: Any) -> list[Any]:
    """The configs of single layers that a model has, each once: those of equal layers are equal."""
    kinds: list[Any] = []
    for index in range(config.num_hidden_layers):
        if (kind := config.layer(index)) not in kinds:
            kinds.append(kind)
    return kinds


def find_family(model_type: object) -> ModuleType:
    """The module of a `model_type`. Raises DsoptError that lists the known ones."""
    if model_type not in families():
        raise DsoptError(f"model type {model_type!r} is not supported; supported: {', '.join(families())}")
    return importlib.import_module(f"{__name__}.{family_name(str(model_type))}")


def family_name(model_type: str) -> str:
    """What a known model type is called as a family."""
    return _SAME.get(model_type, model_type)
