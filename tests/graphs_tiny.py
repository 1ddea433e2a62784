"""A graph of a tiny model run on ids, and how near its logits are to others."""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from dsopt.runtime.session import Session

IDS = np.random.default_rng(0).integers(0, 320, 24)


def run(graph: Path) -> np.ndarray:
    options = ort.SessionOptions()
    options.use_per_session_threads = Session._pool_threads is None  # a process has one kind of pool or the other
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in session.get_inputs() if i.name.startswith("past")}  # fmt: skip
    feeds = {"input_ids": IDS[None], "attention_mask": np.ones((1, len(IDS)), np.int64), **past}
    return session.run(["logits"], feeds)[0][0]


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Largest difference, relative to the largest logit."""
    off = float(np.abs(actual - expected).max() / np.abs(expected).max())
    assert off <= tolerance


def near(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Root mean square of the difference, relative to that of the logits: for activations in 8 bits."""
    off = float(np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean()))
    assert off <= tolerance


def unpack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers of one byte row; of 4 bits the first is in the low half of a byte (MatMulNBits)."""
    if bits == 8:
        return codes.astype(np.float64)
    return np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1).astype(np.float64)
