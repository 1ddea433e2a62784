"""Drafters of DeepSpec's kinds, opened, and what they draft for given hidden states."""

from pathlib import Path
from typing import Any

import numpy as np

from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.drafters import Draft
from dsopt.runtime.drafters.deepspec import open_deepspec
from dsopt.runtime.sampling import Sampling
from dsopt.runtime.session import Session

TOKENS = np.random.default_rng(3).integers(0, 320, 60).tolist()


def session_of(artifact: Path) -> Session:
    return Session(open_artifact(artifact), threads=1)


def drafter_of(pair: Any, session: Session | None = None, **sampling: Any) -> Any:
    session = session or session_of(pair.artifact)
    (name,) = session.artifact.manifest.drafters
    return open_deepspec(pair.artifact / name, session, Sampling(**sampling))


def random_taps(drafter: Any, count: int = 60) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(count, len(drafter.taps), 32)).astype(np.float32)


def drafts(drafter: Any, taps: np.ndarray, pieces: list[int], *, between: bool = False) -> Draft:
    """The draft after all pieces were accepted; with `between` one is made and forgotten after each piece."""
    drafter.begin()
    done = 0
    for piece in pieces:
        drafter.accept(TOKENS[done : done + piece], taps[done : done + piece])
        done += piece
        if between:
            drafter.draft(7, 3)
    return drafter.draft(TOKENS[done], 4)
