"""How far keys and values reach, by channel: what a cache in 8 bits is scaled by."""

from dataclasses import dataclass

import numpy as np
import torch

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.reference import Reference
from dsopt.compiler.self_text import write_windows
from dsopt.compiler.stream import BlockStream

_WINDOWS, _SIZE = 32, 32  # short: the text that a search writes takes a minute, maxima are found sooner


@dataclass(frozen=True)
class Reach:
    """The largest magnitudes of one layer's cached keys and values, float32 [kv_heads * head_dim] each."""

    key: np.ndarray
    value: np.ndarray


def measure_reach(checkpoint: Checkpoint) -> list[Reach]:
    """Of each layer, over text that the model writes itself.

    Keys are cached turned by their position's angle, each pair (i, i + d / 2) by its own: the pair's length bounds
    both at every position, whichever the text had.
    """
    size = min(_SIZE, int(checkpoint.config["max_position_embeddings"]))
    windows = np.stack(write_windows(Reference(checkpoint), _WINDOWS, size))
    stream = BlockStream(checkpoint)
    found = []
    with torch.inference_mode():
        x = stream.embed(windows)
        for layer in range(stream.depth):
            x, key, value = stream.block(layer)(x, *stream.state(layer, *x.shape[:2]))
            pairs = torch.hypot(*key.chunk(2, -1)).amax((0, 2))
            reach = torch.cat([pairs, pairs], -1).flatten(), value.abs().amax((0, 2)).flatten()
            found.append(Reach(*(part.numpy() for part in reach)))
    return found
