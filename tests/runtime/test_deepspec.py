"""DeepSpec's drafters on ONNX Runtime against the forward pass of their training, in rounds as they are used."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deepspec_rounds import TOKENS, drafter_of, drafts, random_taps
from deepspec_tiny import open_reference

from dsopt.runtime.drafters import Draft
from dsopt.runtime.drafters.manifest import save_temperatures
from dsopt.runtime.drafters.waiting import Waiting

BLOCKS = ["vanilla", "gated", "rnn", "unsure", "dflash", "gemma-vanilla", "gemma-gated", "gemma-rnn", "gemma-dflash"]


def flat(taps: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(taps).flatten(1)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_rounds_are_the_masked_pass_of_training(name: str, compile_pair: Callable[..., Any]) -> None:
    """Rounds of all lengths, each after what the one before accepted."""
    pair = compile_pair(name)
    drafter, reference = drafter_of(pair), open_reference(pair.drafter)
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
        if confidence is None:  # the probability of the likeliest token, which counting then corrects
            assert len(draft.survival) == 4
            close(drafter.confidence, torch.logit(best_probability(allowed)))
        else:
            close(draft.survival, torch.sigmoid(confidence))


def best_probability(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().softmax(-1).amax(-1).clamp(1e-4, 1 - 1e-4)


@pytest.mark.parametrize("name", ["eagle3", "eagle3-llama", "gemma-eagle3"])
@torch.no_grad()
def test_eagle3_rounds_are_the_unrolled_pass_of_training(name: str, compile_pair: Callable[..., Any]) -> None:
    pair = compile_pair(name)
    drafter, reference = drafter_of(pair, temperature=1.0, seed=1), open_reference(pair.drafter)
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
        likeliest = torch.stack([logits[anchor - 1].topk(64).values for logits in steps])
        close(drafter.confidence, torch.logit(best_probability(likeliest)))


@pytest.mark.parametrize("name", ["vanilla", "eagle3", "gemma-vanilla", "gemma-eagle3"])
def test_pieces_and_drafts_between_change_nothing(name: str, compile_pair: Callable[..., Any]) -> None:
    """A draft sees every row that was accepted, and none that was drafted and rejected, whatever the order."""
    drafter = drafter_of(compile_pair(name), temperature=1.0, seed=1)
    taps = random_taps(drafter)
    whole = drafts(drafter, taps, [40])
    for pieces in ([1] * 40, [1, 2, 3, 4, 5, 6, 7, 8, 4], [39, 1]):
        for between in (False, True):
            fresh = drafter_of(compile_pair(name), temperature=1.0, seed=1)
            if between:  # so many draws are taken in between: compare what does not depend on them
                made = drafts(fresh, taps, pieces, between=True)
                close(made.distributions[0], whole.distributions[0])
            else:
                made = drafts(fresh, taps, pieces)
                assert made.tokens == whole.tokens
                close(made.distributions, whole.distributions)
                close(made.survival, whole.survival)


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_what_waits_may_be_read_in_pieces_or_left_out(name: str, compile_pair: Callable[..., Any]) -> None:
    drafter = drafter_of(compile_pair(name))
    taps, behind = random_taps(drafter), int(name == "eagle3")  # its last row waits for the token behind it
    whole, without = drafts(drafter, taps, [40]), draft_without(drafter, taps, 21)
    assert without.survival != pytest.approx(whole.survival)

    show(drafter, taps, (3, 27, 10))
    for piece, unread in ((2, 38), (11, 27), (1, 26), (20, 6)):
        drafter.read(piece)
        assert drafter.unread == unread - behind
    assert_same(drafter.draft(TOKENS[40], 4), whole)

    show(drafter, taps, (3, 27, 10))
    for count in (2, 19):
        drafter.leave_out(count)
    drafter.read(4)
    assert drafter.unread == 15 - behind
    assert_same(drafter.draft(TOKENS[40], 4), without)


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_tokens_without_hidden_states_are_left_out(name: str, compile_pair: Callable[..., Any]) -> None:
    drafter, behind = drafter_of(compile_pair(name)), int(name == "eagle3")
    taps = random_taps(drafter)
    without = draft_without(drafter, taps, 21)
    drafter.begin()
    drafter.accept(TOKENS[:8], taps[:8])
    drafter.accept(TOKENS[8:21], None)
    assert drafter.unread == 0
    drafter.accept(TOKENS[21:40], taps[21:40])
    assert drafter.unread == 19 - behind
    assert_same(drafter.draft(TOKENS[40], 4), without)


def test_what_waits_is_dropped_and_taken_across_its_pieces() -> None:
    rows, waiting = np.arange(40, dtype=np.float32).reshape(20, 2), Waiting()
    for start, stop in ((0, 3), (3, 3), (3, 9), (9, 10), (10, 20)):
        waiting.add(rows[start:stop])
    done = 0
    for dropped, taken in ((0, 1), (1, 1), (1, 7), (2, 4), (0, 3)):
        waiting.drop(dropped)
        done += dropped
        assert waiting.take(taken).tolist() == rows[done : done + taken].tolist()
        done += taken
        assert len(waiting) == 20 - done
    assert done == 20
    waiting.add(rows[:2])
    waiting.clear()
    waiting.add(rows[5:6])
    assert waiting.take(1).tolist() == rows[5:6].tolist()


def show(drafter: Any, taps: np.ndarray, pieces: tuple[int, ...], done: int = 0) -> None:
    drafter.begin()
    for piece in pieces:
        drafter.accept(TOKENS[done : done + piece], taps[done : done + piece])
        done += piece


def draft_without(drafter: Any, taps: np.ndarray, count: int) -> Draft:
    """Of one that was never given the first `count` of 40 rows."""
    show(drafter, taps, (40 - count,), count)
    return drafter.draft(TOKENS[40], 4)


def assert_same(made: Draft, wanted: Draft) -> None:
    assert made.tokens == wanted.tokens
    close(made.survival, wanted.survival)


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_a_cache_that_grows_keeps_its_rows(name: str, compile_pair: Callable[..., Any], monkeypatch: Any) -> None:
    expected = drafts(drafter_of(compile_pair(name)), random_taps(drafter_of(compile_pair(name))), [50])
    monkeypatch.setattr("dsopt.runtime.kv._FIRST", 8)
    drafter = drafter_of(compile_pair(name))
    made = drafts(drafter, random_taps(drafter), [5, 3, 10, 32], between=True)
    assert made.tokens == expected.tokens
    assert drafter._cache.capacity == 64


@pytest.mark.parametrize("name", ["vanilla", "dflash", "eagle3"])
def test_at_temperature_0_nothing_is_random_and_limits_are_kept(name: str, compile_pair: Callable[..., Any]) -> None:
    drafter = drafter_of(compile_pair(name))
    taps = random_taps(drafter)
    whole = drafts(drafter, taps, [20])
    assert whole.distributions is None
    assert len(whole.tokens) == 4
    for limit in range(6):
        draft = drafter.draft(TOKENS[20], limit)
        assert draft.tokens == whole.tokens[:limit]
        close(draft.survival, whole.survival[:limit])


@pytest.mark.parametrize("name", ["vanilla", "dflash", "eagle3"])
def test_drawn_tokens_follow_their_distributions(name: str, compile_pair: Callable[..., Any]) -> None:
    """Chi-square of the first two tokens of many drafts; the second one given the first."""
    drafter = drafter_of(compile_pair(name), temperature=1.0, seed=4)
    drafts(drafter, random_taps(drafter), [20])
    made = [drafter.draft(9, 2) for _ in range(2500)]
    first = np.array([draft.tokens[0] for draft in made])
    common = np.bincount(first).argmax()
    second = np.array([draft.tokens[1] for draft in made if draft.tokens[0] == common])
    after = next(draft.distributions[1] for draft in made if draft.tokens[0] == common)
    for drawn, law in ((first, made[0].distributions[0]), (second, after)):
        expected = law * len(drawn)
        observed = np.bincount(drawn, minlength=320)
        assert not observed[law == 0].any()
        often = expected >= 5
        cells = np.append(expected[often], expected[~often].sum()), np.append(observed[often], observed[~often].sum())
        statistic = ((cells[0] - cells[1]) ** 2 / np.maximum(cells[0], 1e-9)).sum()
        freedom = often.sum()
        assert often.sum() >= 3
        assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_temperatures_of_the_manifest_divide_the_confidence(compile_pair: Callable[..., Any], tmp_path: Path) -> None:
    artifact = shutil.copytree(compile_pair("vanilla").artifact, tmp_path / "copy")
    plain = drafter_of(SimpleNamespace(artifact=artifact))
    before = drafts(plain, random_taps(plain), [20])
    save_temperatures(artifact / "draft-dspark", "greedy", [2.0, 1.0, 0.5, 4.0])
    fitted = drafter_of(SimpleNamespace(artifact=artifact))
    after = drafts(fitted, random_taps(fitted), [20])
    close(fitted.confidence, plain.confidence)
    close(after.survival, 1 / (1 + np.exp(-plain.confidence / [2.0, 1.0, 0.5, 4.0])))
    assert before.survival != after.survival
    drawn = drafter_of(SimpleNamespace(artifact=artifact), temperature=1.0)  # another mode, not fitted
    assert drawn._temperatures.tolist() == [1.0] * 4


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_past_its_context_a_drafter_is_silent(name: str, compile_pair: Callable[..., Any]) -> None:
    drafter = drafter_of(compile_pair(name))
    taps = np.random.default_rng(0).normal(size=(300, 2, 32)).astype(np.float32)
    tokens = np.random.default_rng(0).integers(0, 320, 300).tolist()
    drafter.accept(tokens[:251], taps[:251])
    assert not drafter.silent
    assert len(drafter.draft(1, 4).tokens) == 4
    drafter.accept(tokens[251:254], taps[251:254])
    assert drafter.draft(1, 4).tokens == ()
    drafter.accept(tokens[254:], taps[254:])
    assert (drafter.silent, drafter.unread) == (True, 0)
    assert drafter.draft(1, 4).tokens == ()
    drafter.begin()
    assert not drafter.silent
    drafter.accept(tokens[:3], taps[:3])
    assert len(drafter.draft(1, 4).tokens) == 4
