"""What speculation gains: real prompts with and without it in turn, and what a made-up acceptance would bring."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dsopt.runtime.curve import VerifyCurve
from dsopt.runtime.decoder import prefill
from dsopt.runtime.drafters import Drafter
from dsopt.runtime.drafters.curve import draft_seconds
from dsopt.runtime.drafters.deepspec import BlockDrafter
from dsopt.runtime.drafters.eagle3 import Eagle3Drafter
from dsopt.runtime.model import Model, Result
from dsopt.runtime.speculate import Speculation
from dsopt.runtime.tally import Tally

OVERALL = "overall"
_WARM_UP = 8  # tokens, not counted
_DEPTH = 512  # tokens in the cache, of the synthetic table


@dataclass(frozen=True)
class Task:
    """One prompt: its token ids."""

    category: str
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and how it went. `stamps`: seconds from the first token to each.

    `counted`: of how many tokens the rates are. Answers part at near ties, some end sooner than others, and tokens far
    into a long one take longer: each prompt counts as far as all of its answers go.
    """

    tokens: tuple[int, ...]
    result: Result
    stamps: tuple[float, ...]
    counted: int

    @property
    def answer_seconds(self) -> float:
        """From the first token to the last that counts."""
        return self.stamps[self.counted - 1]

    @property
    def seconds(self) -> float:
        return self.result.prompt_seconds + self.answer_seconds


@dataclass
class Comparison:
    """Answers to the prompts of one category: plain, speculative, and with exact mode its reference without a drafter.

    Rates are of all tokens that count and their seconds, so that a short answer weighs no more than its share.
    """

    category: str
    plain: list[Answer] = field(default_factory=list)
    speculative: list[Answer] = field(default_factory=list)
    reference: list[Answer] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """Of each answer that is not what it is without a drafter: by how many logits one token led the other where they
    part, in a run that reads the prompt and the answer so far anew."""

    @property
    def tally(self) -> Tally:
        total = Tally()
        for answer in self.speculative:
            if answer.result.speculation is not None:
                total.add(answer.result.speculation.tally)
        return total

    @property
    def identical(self) -> float:
        """The share of answers that are what they are without a drafter, token by token."""
        others = self.reference or self.plain
        same = [a.tokens == b.tokens for a, b in zip(self.speculative, others, strict=True)]
        return sum(same) / len(same)


def decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens a second after the first of each answer; 0 where no answer has two."""
    seconds = sum(answer.answer_seconds for answer in answers)
    return sum(answer.counted - 1 for answer in answers) / seconds if seconds else 0.0


def latency(answers: Sequence[Answer]) -> float:
    """Seconds a token, the prompt's time included."""
    return sum(answer.seconds for answer in answers) / sum(answer.counted for answer in answers)


def compare(
    model: Model, tasks: Sequence[Task], speculation: Speculation, reference: Speculation | None, limit: int
) -> Iterator[Comparison]:
    """Answer each task with at most `limit` tokens, greedily, without and with `speculation`, taking turns at being
    first. Yields a category when its last task is done, and all of them as `overall`."""
    ways: list[Speculation | None] = [None, speculation, *([reference] if reference else [])]
    for way in ways:
        _answer(model, tasks[0], way, min(limit, _WARM_UP))
    overall = Comparison(OVERALL)
    for category in dict.fromkeys(task.category for task in tasks):
        comparison = Comparison(category)
        for index, task in enumerate(task for task in tasks if task.category == category):
            order = ways[index % len(ways) :] + ways[: index % len(ways)]
            answers = {id(way): _answer(model, task, way, limit) for way in order}
            shortest = min(len(answer.tokens) for answer in answers.values())
            answers = {way: replace(answer, counted=shortest) for way, answer in answers.items()}
            for kept in (comparison, overall):
                kept.plain.append(answers[id(None)])
                kept.speculative.append(answers[id(speculation)])
                if reference:
                    kept.reference.append(answers[id(reference)])
            margin = _margin(model, task, answers[id(reference)], answers[id(speculation)])
            for kept in (comparison, overall):
                kept.margins += margin
        yield comparison
    yield overall


def _margin(model: Model, task: Task, one: Answer, other: Answer) -> list[float]:
    """[] where both are the same, or one goes on where the other ends."""
    pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
    parted = next(((index, a, b) for index, (a, b) in pairs if a != b), None)
    if parted is None:
        return []
    index, a, b = parted
    logits = prefill(model.session.bind(model.session.new_cache()), [*task.prompt, *one.tokens[:index]])
    assert isinstance(logits, np.ndarray)  # no candidates were asked for
    return [abs(float(logits[a] - logits[b]))]


def _answer(model: Model, task: Task, speculation: Speculation | None, limit: int) -> Answer:
    stream = model.stream(task.prompt, limit=limit, speculation=speculation)
    tokens, stamps = [], []
    for piece in stream:
        tokens.append(piece.step.token)
        stamps.append(stream.result.answer_seconds)
    return Answer(tuple(tokens), stream.result, tuple(stamps), len(tokens))


@dataclass(frozen=True)
class Prospect:
    """What verifying drafts of `drafted` tokens would bring, were each accepted with the same probability.

    break_even: tokens that a round must give to be no slower than plain decoding.
    """

    drafted: int
    draft_seconds: float
    verify_seconds: float
    break_even: float
    expected: float

    @property
    def speedup(self) -> float:
        return self.expected / self.break_even


def prospects(curve: VerifyCurve, accept: float, drafter: Drafter | None, model: Model) -> list[Prospect]:
    """For every width of the curve that a draft can fill. `accept`: of each drafted token, given those before it."""
    plain = curve.seconds(1, _DEPTH)
    longest = drafter.positions if isinstance(drafter, BlockDrafter | Eagle3Drafter) else curve.widths[-1]
    widths = [width for width in curve.widths[1:] if width <= longest + 1]
    drafted = [width - 1 for width in widths]
    costs = draft_seconds(drafter, model, drafted) if drafter is not None else [0.0] * len(drafted)
    rows = []
    for width, drafting in zip(widths, costs, strict=True):
        verifying = curve.seconds(width, _DEPTH)
        expected = sum(accept**position for position in range(width))
        rows.append(Prospect(width - 1, drafting, verifying, (drafting + verifying) / plain, expected))
    return rows
