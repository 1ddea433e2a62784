"""DeepSpec's drafters on ONNX Runtime against the forward pass of their training, in rounds as they are used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspec_tiny import Reference

from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.drafters.deepspec import open_deepspec
from dsopt.runtime.sampling import Sampling
from dsopt.runtime.session import Session

BLOCKS = ["vanilla", "gated", "rnn", "dflash"]
RNG = np.random.default_rng(3)
TOKENS = RNG.integers(0, 320, 60).tolist()


def session_of(artifact: Path) -> Session:
    return Session(open_artifact(artifact), threads=1)


def drafter_of(pair: Any, session: Session | None = None, **sampling: Any) -> Any:
    session = session or session_of(pair.artifact)
    (name,) = session.artifact.manifest.drafters
    return open_deepspec(pair.artifact / name, session, Sampling(**sampling))


def random_taps(drafter: Any, count: int = 60) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(count, len(drafter.taps), 32)).astype(np.float32)


def flat(taps: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(taps).flatten(1)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_rounds_are_the_masked_pass_of_training(name: str, compile_pair: Callable[..., Any]) -> None:
    """Rounds of all lengths, each after what the one before accepted."""
    pair = compile_pair(name)
    drafter, reference = drafter_of(pair), Reference(pair.drafter)
    taps, anchors = random_taps(drafter), [5, 6, 8, 11, 15, 20, 21, 50]
    blocks = reference.blocks(flat(taps), TOKENS, anchors)
    done = 0
    for anchor, rows in zip(anchors, blocks, strict=True):
        drafter.accept(TOKENS[done:anchor], taps[done:anchor])
        done = anchor
        draft = drafter.draft(TOKENS[anchor], 4)
        outputs = drafter._block.outputs
        logits, confidence = reference.logits(rows, [TOKENS[anchor], *draft.tokens[:-1]])
        chosen = np.sort(outputs["candidates"], -1)
        best = reference._linear("lm_head", rows).topk(64).indices.sort(-1).values
        assert (chosen == best.numpy()).all()
        close(outputs["logits"], logits.numpy()[np.arange(4)[:, None], outputs["candidates"]])
        allowed = torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))
        assert list(draft.tokens) == allowed.argmax(-1).tolist()
        if confidence is None:
            assert draft.survival == ()
        else:
            close(draft.survival, torch.sigmoid(confidence))


@torch.no_grad()
def test_eagle3_rounds_are_the_unrolled_pass_of_training(compile_pair: Callable[..., Any]) -> None:
    pair = compile_pair("eagle3")
    drafter, reference = drafter_of(pair, temperature=1.0, seed=1), Reference(pair.drafter)
    taps, done = random_taps(drafter), 0
    for anchor in [1, 4, 5, 10, 30]:
        drafter.accept(TOKENS[done:anchor], taps[done:anchor])
        done = anchor
        for _ in range(2):  # a draft leaves nothing behind
            draft = drafter.draft(TOKENS[anchor], 4)
        assert len(draft.tokens) == 4
        steps = reference.unrolled(flat(taps[:anchor]), [*TOKENS[: anchor + 1], *draft.tokens], 4)
        for drawn_from, logits in zip(draft.distributions, steps, strict=True):
            last = logits[anchor - 1].double()
            best = last.topk(64).indices
            close(drawn_from[best], last[best].softmax(0))
            assert drawn_from.sum() == pytest.approx(1)
