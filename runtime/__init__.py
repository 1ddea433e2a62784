"""From an artifact to streamed tokens. Imports neither torch nor onnx."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsopt.runtime.model import Model


def load(
    directory: str | Path, *, threads: int | None = None, context: int | None = None, device: str = "auto"
) -> "Model":
    """Open a compiled model.

    `threads`: all physical cores unless said. `context`: positions it may use, at most and by default the
    model's own. `device`: auto, cpu or cuda; auto says on stderr where it falls back to the CPU. Raises
    DsoptError when the directory is no artifact, has changed since it was compiled, or cannot run on the device.
    """
    from dsopt.runtime.artifact import open_artifact
    from dsopt.runtime.devices import choose_device
    from dsopt.runtime.model import Model  # ONNX Runtime: not before it is needed

    artifact = open_artifact(Path(directory))
    chosen = choose_device(device, artifact.manifest, lambda line: print(line, file=sys.stderr))
    return Model(artifact, threads=threads, context=context, device=chosen)
