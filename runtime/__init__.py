"""From an artifact to streamed tokens. Imports neither torch nor onnx."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsopt.runtime.model import Model


def load(directory: str | Path, *, threads: int | None = None, context: int | None = None) -> "Model":
    """Open a compiled model.

    `threads`: all physical cores unless said. `context`: positions it may use, at most and by default the
    model's own. Raises DsoptError when the directory is no artifact or has changed since it was compiled.
    """
    from dsopt.runtime.artifact import open_artifact
    from dsopt.runtime.model import Model  # ONNX Runtime: not before it is needed

    return Model(open_artifact(Path(directory)), threads=threads, context=context)
