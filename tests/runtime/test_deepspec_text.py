"""Text with DeepSpec's drafters is the text without; what their rounds cost."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from deepspec_rounds import TOKENS, drafter_of, drafts, random_taps
from toy import Forced

from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.drafters import Draft
from dsopt.runtime.drafters.choice import open_drafter, open_speculation
from dsopt.runtime.drafters.cost import draft_cost
from dsopt.runtime.drafters.graph import CachedGraph
from dsopt.runtime.model import Model
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.speculate import Speculation, speculate


class Helped:
    """A drafter that is never right, because untrained, with some of the answer put into each second draft."""

    def __init__(self, drafter: Any, text: list[int]) -> None:
        self.drafter, self.text, self.taps = drafter, text, drafter.taps
        self.begin, self.drafts, self.seen = drafter.begin, 0, 0

    def accept(self, tokens: list[int], hidden: np.ndarray) -> None:
        assert list(tokens) == self.text[self.seen : self.seen + len(tokens)]
        self.seen += len(tokens)
        self.drafter.accept(tokens, hidden)

    def draft(self, anchor: int, limit: int) -> Draft:
        assert anchor == self.text[self.seen]
        made, self.drafts = self.drafter.draft(anchor, limit), self.drafts + 1
        if self.drafts % 2:
            return made
        known = self.text[self.seen + 1 :][: self.drafts % 4 + 1]
        return Draft((*known, *made.tokens[len(known) :])[:limit])


@pytest.mark.parametrize("name", ["vanilla", "gated", "eagle3", "gemma-vanilla", "gemma-eagle3"])
def test_text_with_a_drafter_is_the_text_without(name: str, compile_pair: Callable[..., Any]) -> None:
    pair = compile_pair(name)
    model = Model(open_artifact(pair.artifact), threads=1)
    model.end, prompt = frozenset(), TOKENS[:9]
    plain = [piece.step.token for piece in model.stream(prompt, limit=40)]
    opened = open_drafter(str(next(pair.artifact.glob("draft-*"))), model, Sampling())
    helped = Helped(opened, [*prompt, *plain])
    speculation = Speculation(helped, Forced(seed=2, longest=4))  # type: ignore[arg-type]
    stream = model.stream(prompt, limit=40, speculation=speculation)
    assert [piece.step.token for piece in stream] == plain
    tally = stream.result.speculation.tally  # type: ignore[union-attr]
    assert tally.accepted >= 5
    # Round by round the drafter was where a fresh one is that reads the text at once.
    hidden = model.session.bind(model.session.new_cache(), helped.taps)
    hidden.run(np.array(helped.text[: helped.seen]))
    fresh = drafter_of(pair, model.session)
    fresh.accept(helped.text[: helped.seen], hidden.hidden)
    anchor = helped.text[helped.seen]
    assert fresh.draft(anchor, 4).tokens == helped.drafter.draft(anchor, 4).tokens


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_costs_are_measured_and_what_they_allow_changes_no_token(name: str, compile_pair: Callable[..., Any]) -> None:
    pair = compile_pair(name)
    model = Model(open_artifact(pair.artifact), threads=1)
    model.end, prompt = frozenset(), TOKENS[:30]
    plain = [piece.step.token for piece in model.stream(prompt, limit=100)]
    for kind in (str(next(pair.artifact.glob("draft-*"))), "auto"):
        speculation = open_speculation(model, kind)
        assert speculation is not None
        reader = speculation.scheduler.reader
        assert reader is not None
        assert reader.beside == (kind == "auto")
        assert reader.curve.pieces == (16, 64)
        assert reader.curve.counts == (1, 4, 8)
        reader.experience.won, reader.experience.started, reader.experience.gained = 1e9, 1000.0, 1e9
        state = model.new_state()
        stream = model.stream(prompt, limit=100, state=state, speculation=speculation)
        assert [piece.step.token for piece in stream] == plain
        assert stream.result.speculation.tally.read_tokens >= len(prompt) - 1  # type: ignore[union-attr]

        reader.experience.won = 0.0  # not worth to compute the prompt again
        longer = [*prompt, *plain, 7, 8, 9]
        fresh = [piece.step.token for piece in model.stream(longer, limit=20)]
        again = model.stream(longer, limit=20, state=state, speculation=speculation)
        assert [piece.step.token for piece in again] == fresh
        assert again.result.cached_tokens >= len(prompt) + len(plain) - 1
        assert again.result.speculation.tally.read_tokens <= 3 + 20  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_drawn_text_with_a_drafter(name: str, compile_pair: Callable[..., Any]) -> None:
    """At a temperature the loop takes the drafter's distributions: of 1500 second tokens, those of plain decoding."""
    pair = compile_pair(name)
    model = Model(open_artifact(pair.artifact), threads=1)
    sampling = Sampling(temperature=2.0, top_k=4, seed=5)
    (folder,) = pair.artifact.glob("draft-*")
    speculation = Speculation(open_drafter(str(folder), model, sampling), Forced(longest=3))
    binding = model.session.bind(model.session.new_cache(), (0, 2))
    sampler, expected, counted = Sampler(sampling), np.zeros(320), np.zeros(320)
    prompt = TOKENS[:4]
    tokens, chances = sampler.distribution(binding.run(np.array(prompt))[-1].copy(), prompt)
    for token, chance in zip(tokens, chances, strict=True):
        binding.cache.trim(len(prompt))
        after, law = sampler.distribution(binding.run(np.array([token]))[-1].copy(), [*prompt, int(token)])
        expected[after] += chance * law
    for _ in range(1500):
        steps = speculate(binding, prompt, speculation, sampler=sampler, limit=3)
        counted[[step.token for step in steps][1]] += 1
    often = expected * 1500 >= 5
    assert often.sum() >= 3
    gaps = (counted - expected * 1500)[often] ** 2 / (expected * 1500)[often]
    assert gaps.sum() < often.sum() + 4 * np.sqrt(2 * often.sum()) + 4
    assert not counted[expected == 0].any()


def test_the_cost_of_a_round_is_split(compile_pair: Callable[..., Any]) -> None:
    drafter = drafter_of(compile_pair("vanilla"))
    taps = random_taps(drafter)
    before = drafts(drafter, taps, [20])
    cost = draft_cost(drafter, depth=50, rows=3, repeats=5)
    assert 0 < cost.ingest < 1
    assert 0 < cost.block < 1
    assert 0 <= cost.chain < 1
    assert drafts(drafter, taps, [20]) == before


def test_a_block_can_run_without_its_chain(compile_pair: Callable[..., Any]) -> None:
    """What `draft_cost` times: the same candidates, and nothing of the chain is computed."""
    pair = compile_pair("vanilla")
    drafter = drafter_of(pair)
    drafts(drafter, random_taps(drafter), [20])
    expected = drafter._block.outputs["candidates"].copy()
    alone = CachedGraph(drafter.graph, drafter.manifest, {"candidates": np.zeros((4, 64), np.int64)})
    alone.cache.reserve(24)
    for name, buffer in alone.cache.buffers.items():
        buffer[:, :, :20] = drafter._cache.buffers[name][:, :, :20]
    alone.cache.length = 20
    noise = np.full((4, 64), np.nan)  # only the chain would read it
    alone.run({"input_ids": drafter._ids, "noise": noise}, 4)
    assert (alone.outputs["candidates"] == expected).all()
