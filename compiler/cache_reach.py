"""How far keys and values reach, by channel: what a cache in 8 bits is scaled by; and what it loses."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.reference import Reference
from dsopt.compiler.self_text import write_windows
from dsopt.compiler.stream import BlockStream

_WINDOWS, _SIZE = 32, 32  # short: the text that a search writes takes a minute, maxima are found sooner
_MARGIN = 1.1  # beyond what was seen; further out is clipped


@dataclass(frozen=True)
class Reach:
    """The largest magnitudes of one layer's cached keys and values, float32 [kv_heads * head_dim] each."""

    key: np.ndarray
    value: np.ndarray

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the codes -128 ... 127 of keys and values, float32 by channel."""
        return _steps(self.key), _steps(self.value)

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What a cache in int8 makes of keys and values [b, kv_heads, s, d]."""
        return tuple(map(_rounded, (key, value), self.steps()))  # type: ignore[return-value]


def _steps(reach: np.ndarray) -> np.ndarray:
    return np.maximum(_MARGIN * reach / 127, 1e-8).astype(np.float32)


def _rounded(x: Tensor, steps: np.ndarray) -> Tensor:
    by_head = torch.from_numpy(steps).view(x.shape[1], 1, x.shape[3])
    return (x / by_head).round().clamp(-128, 127) * by_head


def measure_reach(checkpoint: Checkpoint) -> list[Reach]:
    """Of each layer, over text that the model writes itself."""
    size = min(_SIZE, int(checkpoint.config["max_position_embeddings"]))
    return reach_of(BlockStream(checkpoint), np.stack(write_windows(Reference(checkpoint), _WINDOWS, size)))


def reach_of(stream: BlockStream, windows: np.ndarray) -> list[Reach]:
    """Of each layer, over windows int64 [n, tokens].

    Keys are cached turned by their position's angle, each pair (i, i + d / 2) by its own: the pair's length bounds
    both at every position, whichever the text had.
    """
    found: list[Reach] = []

    def look(_layer: int, block: Any) -> None:
        def seen(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            pairs = torch.hypot(*key.chunk(2, -1)).amax((0, 2))
            reach = torch.cat([pairs, pairs], -1).flatten(), value.abs().amax((0, 2)).flatten()
            found.append(Reach(*(part.numpy() for part in reach)))
            return key, value

        block.self_attn.store = seen

    stream.run(windows, prepare=look)
    return found


def states_through(stream: BlockStream, reach: list[Reach], windows: np.ndarray) -> Tensor:
    """The last hidden states [n, tokens, width] where each layer's cache is in int8."""

    def narrow(layer: int, block: Any) -> None:
        block.self_attn.store = reach[layer].store

    return stream.run(windows, prepare=narrow)
