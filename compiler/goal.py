"""What a search is to reach: a loss, a size, and the work that is to be fast."""

import math
import re
from dataclasses import dataclass

from dsopt.runtime.errors import UsageError
from dsopt.runtime.session import PREFILL_CHUNK

# How often a layer runs with how many rows, for one use: a prompt of 512 tokens and an answer of 128, of which drafts
# that were verified give a fifth; a token; a prompt; eight sequences at once; rounds that verify four drafted tokens.
WORKLOADS = {
    "chat": {1: 104, 5: 8, 128: 4},
    "decode": {1: 1},
    "prefill": {128: 1},
    "batch": {8: 1},
    "speculative": {5: 3, 1: 1},
}
_PROMPT = 512  # rows of a device's run over a prompt, which is not cut into chunks
_ENDLESS = 100.0  # nats; a perplexity that is larger yet has no use as a number


@dataclass(frozen=True)
class Goal:
    """What is wanted. `loss` in nats a token, `size` in bytes or None, `workload` a name of WORKLOADS.

    `quantity` is what the loss is measured by: `kld_mean`, or `ln_ppl_ratio`, which on text that the model wrote itself
    has the same expectation.
    """

    loss: float
    size: int | None = None
    workload: str = "chat"
    quantity: str = "kld_mean"

    @classmethod
    def parse(cls, loss: str, size: str | None, workload: str) -> "Goal":
        """`0.01` nats of KL divergence or `2%` of perplexity; `105MB`, `1.2GB`. Raises UsageError."""
        match = re.fullmatch(r"(\d*\.?\d+(?:e-?\d+)?)\s*(%?)", loss)
        if match is None:
            raise UsageError(f"--max-quality-loss is {loss!r}; nats, as 0.01, or per cent of perplexity, as 2%")
        value = float(match[1])
        if match[2]:
            return cls(math.log1p(value / 100), _bytes(size), workload, "ln_ppl_ratio")
        return cls(value, _bytes(size), workload)

    def __post_init__(self) -> None:
        if not 0 < self.loss < 100:
            raise UsageError(
                f"--max-quality-loss is {self.loss:g}; nats above 0, such as 0.01, or per cent, such as 2%"
            )
        if self.workload not in WORKLOADS:
            raise UsageError(f"--for is {self.workload!r}; it must be one of {', '.join(WORKLOADS)}")

    def said(self, loss: float) -> str:
        """A loss in nats, in the unit that the budget was given in: `0.0131 nats`, `1.32 % of perplexity`."""
        if self.quantity == "ln_ppl_ratio":
            return f"{100 * math.expm1(min(loss, _ENDLESS)):.3g} % of perplexity"
        return f"{loss:.4f} nats"

    @property
    def budget(self) -> str:
        """What is allowed, as short as it was said: `0.01 nats`, `2 %`."""
        if self.quantity == "ln_ppl_ratio":
            return f"{100 * math.expm1(self.loss):.4g} %"
        return f"{self.loss:.4g} nats"


def _bytes(size: str | None) -> int | None:
    if size is None:
        return None
    match = re.fullmatch(r"(\d*\.?\d+)\s*(kB|MB|GB)", size)
    if match is None or not 0 < float(match[1]) < 1e9:
        raise UsageError(f"--max-size is {size!r}; a number with kB, MB or GB, as 105MB")
    return int(float(match[1]) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[match[2]])


def rows_of(workload: str, target: str = "cpu") -> dict[int, int]:
    """How often a layer runs with how many rows, on this target."""
    work = WORKLOADS[workload]
    if target == "cpu":
        return work
    return {_PROMPT if m == PREFILL_CHUNK else m: -(-n * m // _PROMPT) if m == PREFILL_CHUNK else n
            for m, n in work.items()}  # fmt: skip
