"""What a drafter was worth so far, with a model on a machine: kept, so that the next answer may begin with it."""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from dsopt.runtime.curve import cache_path
from dsopt.runtime.files import write_atomically
from dsopt.runtime.session import Session

_VERSION = 1
_WINDOW = 2000.0  # tokens that weigh; what came before them fades
_ENOUGH = 500.0  # tokens, of a few answers, that promise something for others
_TRIED = 64.0  # tokens that a disappointment takes
_MOST_WON = 500.0  # plain steps


@dataclass
class Experience:
    """In plain steps of the model, so that a machine that is slower today changes nothing.

    won: by all answers together, reading paid, never below 0: what may be staked on a start that is not saved up for.
    started, gained: tokens given since the drafter had read, and steps that its drafts won of them.
    answered, ended: tokens of all answers, and how many answers came to an end by themselves.
    """

    won: float = 0.0
    started: float = 0.0
    gained: float = 0.0
    answered: float = 0.0
    ended: float = 0.0
    path: Path | None = field(default=None, repr=False)

    def promise(self, left: int) -> float:
        """Plain steps that the drafter may be expected to win in an answer of at most `left` tokens more.

        Answers are taken to end with the same chance at every token.
        """
        if self.started < _ENOUGH:
            return 0.0
        mean = self.answered / self.ended if self.ended else math.inf
        tokens = mean * -math.expm1(-left / mean) if 0 < mean < math.inf else left
        return tokens * self.gained / self.started

    @property
    def disappoints(self) -> bool:
        """It was tried, and gained nothing."""
        return self.started >= _TRIED and self.gained <= 0

    def note(self, answered: int, *, ended: bool, started: float, gained: float, won: float) -> None:
        """One more answer. `won`: what it won or lost in all. Kept in the file, where there is one."""
        self.won = min(max(self.won + won, 0.0), _MOST_WON)
        fade = _fade(self.started, started)
        self.started, self.gained = self.started * fade + started, self.gained * fade + gained
        fade = _fade(self.answered, answered)
        self.answered, self.ended = self.answered * fade + answered, self.ended * fade + ended
        if self.path is None:
            return
        values = {name: getattr(self, name) for name in _NUMBERS}
        try:
            write_atomically(self.path, json.dumps(values).encode())
        except OSError:
            return  # a read-only cache: nothing is learnt beyond this process


_NUMBERS = tuple(entry.name for entry in fields(Experience) if entry.name != "path")


def _fade(known: float, more: float) -> float:
    return min(max(_WINDOW - more, 0.0) / known, 1.0) if known else 0.0


def open_experience(identity: str, session: Session, mode: str) -> Experience:
    """Of the drafter `identity` with the model of `session`, when tokens are chosen by `mode`; an empty one where
    nothing was noted, or what was is damaged."""
    path = cache_path("experience", session, identity, mode, _VERSION)
    try:
        raw = json.loads(path.read_bytes())
        if set(raw) != set(_NUMBERS) or not all(_is_number(value) for value in raw.values()):
            raise ValueError("not an experience")
    except (OSError, ValueError, TypeError, RecursionError):
        raw = {}
    return Experience(**raw, path=path)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)
