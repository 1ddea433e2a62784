"""A checkpoint run as it is: the family's torch model, eagerly, in float32. What others are compared with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.models import find_family
from dsopt.runtime.errors import DsoptError

Progress = Callable[[int, int], None]  # bytes read, bytes in all


def read_config(checkpoint: Checkpoint) -> Any:
    """The family's `Config` of a checkpoint. Raises DsoptError on a model that is not supported."""
    config = find_family(checkpoint.config.get("model_type")).Config.from_dict(checkpoint.config)
    checkpoint.check_no_biases()
    return config


class Reference:
    """Holds the weights in float32, four bytes a parameter; each is read straight into its place."""

    def __init__(self, checkpoint: Checkpoint, progress: Progress | None = None, threads: int | None = None) -> None:
        """Raises DsoptError on an unsupported model or one whose tensors are not those of its config."""
        if threads:
            torch.set_num_threads(threads)
        family, config = find_family(checkpoint.config.get("model_type")), read_config(checkpoint)
        with torch.device("meta"):
            self.model = family.Model(config)
        self._load(checkpoint, progress)
        self.model.eval().requires_grad_(False)

    def __call__(self, ids: NDArray[np.int64], rows: int) -> NDArray[np.float32]:
        """Logits float32 [rows, vocab] of the last `rows` of ids [n], from an empty context."""
        with torch.inference_mode():
            logits, _ = self.model(torch.from_numpy(ids)[None])
        return logits[0, -rows:].numpy()

    def _load(self, checkpoint: Checkpoint, progress: Progress | None) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        total = sum(4 * parameter.numel() for parameter in self.model.parameters())
        done, loaded = 0, {}  # by parameter: a tied head is one with two names
        for name, parameter in parameters.items():
            if parameter in loaded:
                continue
            loaded[parameter] = _read(checkpoint, name, tuple(parameter.shape))
            done += 4 * parameter.numel()
            if progress:
                progress(done, total)
        state = {name: loaded[parameter] for name, parameter in parameters.items()}
        self.model.load_state_dict(state, assign=True)


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise DsoptError(f"{checkpoint.source.path}: tensor {name} is missing")
    if tensor.shape != shape:
        raise DsoptError(
            f"{checkpoint.source.path}: tensor {name} is {list(tensor.shape)}, config.json says {list(shape)}"
        )
    return torch.from_numpy(tensor.read())
