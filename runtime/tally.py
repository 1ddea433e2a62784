"""What speculation did in one generation: counted by the verifier, the same way for every drafter."""

from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts of tokens and rounds, and seconds of wall time (the reader's left out).

    A round is one run of the model. reached[j] of them verified a token at position j of a draft, passed[j] accepted
    it and all before it.
    """

    rounds: int = 0
    drafted_rounds: int = 0  # that verified at least one token
    paused_rounds: int = 0  # in which the schedule left the drafter alone: it loses, or could not begin yet
    emitted: int = 0  # tokens of all rounds
    proposed: int = 0  # tokens verified
    accepted: int = 0
    near_ties: int = 0  # greedy tokens, from the first draft on, with a lead so small that another width might flip it
    reached: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)
    starts: int = 0  # answers in which a drafter that must read has drafted
    start_tokens: int = 0  # of these answers, given before the first of its drafts
    read_tokens: int = 0  # by the drafter, before it could draft; what a round accepted belongs to the next draft
    reread_tokens: int = 0  # of a cached prompt, computed again for a drafter that reads layers
    read_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0  # in the model's runs
    overhead_seconds: float = 0.0  # choosing tokens, scheduling, everything else between two tokens
    plain_seconds: float = 0.0  # what plain decoding would have taken for `emitted`, by the verify curve

    def propose(self, count: int) -> None:
        """A round verifies `count` tokens."""
        self.rounds += 1
        self.drafted_rounds += count > 0
        self.proposed += count
        self.reached += [0] * (count - len(self.reached))
        self.passed += [0] * (count - len(self.passed))
        for position in range(count):
            self.reached[position] += 1

    def accept(self, position: int) -> None:
        """The token at `position` of this round's draft is accepted."""
        self.accepted += 1
        self.passed[position] += 1

    def add(self, other: "Tally") -> None:
        """Count what another generation did, too."""
        for name, value in vars(other).items():
            if isinstance(value, list):
                mine = getattr(self, name)
                mine += [0] * (len(value) - len(mine))
                setattr(self, name, [a + (value[i] if i < len(value) else 0) for i, a in enumerate(mine)])
            else:
                setattr(self, name, getattr(self, name) + value)

    @property
    def seconds(self) -> float:
        return self.read_seconds + self.draft_seconds + self.verify_seconds + self.overhead_seconds

    @property
    def accept_rate(self) -> float | None:
        """Of the tokens verified; None where none was."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens that a round with a draft gave, the model's own one included; None where there was none."""
        return 1 + self.accepted / self.drafted_rounds if self.drafted_rounds else None

    @property
    def accept_per_position(self) -> list[float]:
        """For each position: of the rounds that verified it, how many accepted the draft up to there."""
        return [passed / reached for passed, reached in zip(self.passed, self.reached, strict=True)]

    @property
    def gain(self) -> float | None:
        """Speed against plain decoding, as the verify curve has it; None before the first round."""
        return self.plain_seconds / self.seconds if self.seconds else None
