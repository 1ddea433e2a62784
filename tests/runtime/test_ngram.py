"""The suffix automaton against a naive search, and what the n-gram drafter makes of it."""

import random
from collections.abc import Sequence

import pytest

from dsopt.runtime.drafters.automaton import SuffixAutomaton
from dsopt.runtime.drafters.chain import ChainDrafter
from dsopt.runtime.drafters.ngram import NgramDrafter


def longest_repeat(text: Sequence[int]) -> int:
    """The length of the longest end of `text` that also ends earlier."""
    for length in range(len(text) - 1, 0, -1):
        if any(text[end - length : end] == text[-length:] for end in range(length, len(text))):
            return length
    return 0


@pytest.mark.parametrize("alphabet", [1, 2, 3, 20])
def test_the_match_is_the_longest_repeat_and_stands_where_it_says(alphabet: int) -> None:
    source = random.Random(alphabet)
    for _ in range(10):
        automaton = SuffixAutomaton()
        text = [source.randrange(alphabet) for _ in range(60)]
        for count, token in enumerate(text, 1):
            automaton.extend(token)
            length, end = automaton.match()
            assert length == longest_repeat(text[:count])
            assert end < count - 1
            assert text[end + 1 - length : end + 1] == text[count - length : count]


def test_the_latest_occurrence_counts() -> None:
    automaton = SuffixAutomaton()
    for token in [1, 2, 3, 9, 1, 2, 4, 9, 9, 1, 2]:
        automaton.extend(token)
    assert automaton.match() == (3, 5)  # 9 1 2
    automaton = SuffixAutomaton()
    for token in [1, 2, 3, 5, 1, 2, 4, 6, 1, 2]:
        automaton.extend(token)
    assert automaton.match() == (2, 5)


def test_states_and_work_stay_linear() -> None:
    automaton = SuffixAutomaton()
    for token in [1] * 3000 + [2, 1] * 1000:
        automaton.extend(token)
    assert len(automaton._next) <= 2 * len(automaton.tokens)


def follow(drafter: NgramDrafter, text: Sequence[int], prompt: int) -> float:
    """Let it draft at every token behind the prompt; the share of first tokens that were right."""
    drafter.begin()
    drafter.accept(text[:prompt], None)
    right = 0
    for index in range(prompt, len(text) - 1):
        drafted = drafter.draft(text[index], 3).tokens
        right += drafted[:1] == tuple(text[index + 1 : index + 2])
        drafter.accept(text[index : index + 1], None)
    return right / (len(text) - 1 - prompt)


def test_it_continues_what_came_before() -> None:
    drafter = NgramDrafter()
    drafter.accept([5, 1, 2, 3, 4, 6, 7, 8, 9, 1, 2], None)
    draft = drafter.draft(3, 4)
    assert draft.tokens == (4, 6, 7, 8)
    assert draft.distributions is None
    assert len(draft.survival) == 4
    assert all(0 < share < 1 for share in draft.survival)
    drafter.accept([3, 4, 6], None)  # two were accepted
    assert drafter.draft(7, 9).tokens == (8, 9, 1, 2, 3, 4, 6, 7, 8)
    drafter.accept([7], None)
    assert drafter.draft(100, 4).tokens == ()
    drafter.begin()
    assert drafter.draft(3, 4).tokens == ()


def test_a_period_goes_on_past_the_end() -> None:
    drafter = NgramDrafter()
    drafter.accept([1, 2, 3, 1, 2], None)
    assert drafter.draft(3, 7).tokens == (1, 2, 3, 1, 2, 3, 1)


def test_survival_follows_what_was_right() -> None:
    prompt = list(range(50))
    copied, shuffled = NgramDrafter(), NgramDrafter()
    assert follow(copied, prompt + prompt, 50) > 0.9
    scrambled = random.Random(0).choices(prompt, k=50)
    assert follow(shuffled, prompt + scrambled, 50) < 0.2
    for drafter in (copied, shuffled):
        drafter.begin()
        drafter.accept(prompt, None)
    assert copied.draft(7, 1).survival[0] > 3 * shuffled.draft(7, 1).survival[0]
    one, many = copied.draft(7, 8).survival[0], copied.draft(7, 8).survival[-1]
    assert many > one  # once seven were right the match is longer


def test_it_learns_without_being_asked() -> None:
    drafter, asked = NgramDrafter(), list(range(40)) * 2
    drafter.accept(asked[:40], None)
    before = drafter.draft(asked[40], 1).survival[0]
    drafter.accept(asked[40:], None)  # the scheduler paused: all this came without a draft
    assert drafter._survival(1, 0) > before or drafter._survival(20, 0) > 0.9


def test_a_chain_takes_the_first_that_is_sure() -> None:
    calls = []

    class Last(NgramDrafter):
        taps = (4,)

        def accept(self, tokens: Sequence[int], hidden: object) -> None:
            assert hidden is not None

        def draft(self, anchor: int, limit: int):
            calls.append(anchor)
            return super().draft(anchor, limit)

    import numpy as np

    chain = ChainDrafter([NgramDrafter(), Last()])
    assert chain.taps == (4,)
    text = list(range(30)) * 2
    chain.accept(text[:59], np.zeros((59, 1, 2), np.float32))
    assert chain.draft(text[59], 3).tokens == (0, 1, 2)
    assert calls == []
    chain.accept(text[59:60], np.zeros((1, 1, 2), np.float32))
    assert chain.draft(99, 3).tokens == ()
    assert calls == [99]
