"""One file per model family, named as the checkpoint's `model_type`. Adding a family = adding a file.

A family exports `Config` (with `from_dict` and `rotary`) and `Model`, a torch module whose parameters are named as
in the checkpoint and which has `model.embed_tokens`, `model.layers`, `model.norm` and `lm_head`.
"""

import importlib
import pkgutil
from types import ModuleType

from dsopt.runtime.errors import DsoptError


def families() -> list[str]:
    """Model types that can be compiled."""
    return sorted({m.name for m in pkgutil.iter_modules(__path__)} - {"layers"})


def find_family(model_type: object) -> ModuleType:
    """The module of a `model_type`. Raises DsoptError that lists the known ones."""
    if model_type not in families():
        raise DsoptError(f"model type {model_type!r} is not supported; supported: {', '.join(families())}")
    return importlib.import_module(f"{__name__}.{model_type}")
