"""A graph for CUDA of a tiny model, and its logits however its tokens are cut into runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsopt.runtime.cuda import DeviceBinding, DeviceCache
from dsopt.runtime.kv import CACHE_TYPES
from dsopt.runtime.session import Binding, Session

SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "max_position_embeddings": 600}
IDS = np.random.default_rng(0).integers(0, 300, 60)
SPLITS = ([60], [1] * 60, [20, *[1] * 40], [17, *[4] * 10, 3], [1, 16, 16, 16, 8, 2, 1])


def device_binding(session: Session, captured: int = 16) -> DeviceBinding:
    cache = DeviceCache(session.layers, session.context, CACHE_TYPES["tensor(float16)"], "cpu")
    return DeviceBinding(session._session, cache, session.vocab_size, "cpu", captured)


def logits(binding: Binding, split: Sequence[int]) -> np.ndarray:
    rows, start = [], 0
    for count in split:
        rows.append(binding.run(IDS[start : start + count], count).copy())
        start += count
    return np.concatenate(rows)
