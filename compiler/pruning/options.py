"""What to prune, as one small language: `none`, `ffn=10%`, `layers=2,ffn=10%`, `blocks=3`, `kv=1`, `vocab=corpus.txt`.

ffn=P%      that share of all feed-forward channels, more of them where they matter less
layers=N    N whole layers
blocks=N    N single blocks, each the attention or the feed-forward of a layer
kv=N        N key-value groups, and the query heads that read them, of every layer
vocab=FILE  every token that FILE, a UTF-8 text, does not need (beside the most frequent ones)
auto:F      what makes a step of one token F times as fast at the least loss: blocks, and tokens that vocab=FILE needs
            least
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from dsopt.runtime.errors import DsoptError, UsageError

_EXAMPLE = "none, or some of ffn=10%, layers=2, blocks=3, kv=1, vocab=FILE; auto:1.15 alone or with vocab=FILE"
_KINDS = ("ffn", "layers", "blocks", "kv", "vocab", "auto")
_FASTEST = 4.0  # more than that no repair saves
_MOST = 0.9  # of the feed-forward channels: with fewer than a tenth left there is nothing to repair with


@dataclass(frozen=True)
class Pruning:
    """How much of each kind to remove; all zero is no pruning."""

    ffn: float = 0.0
    layers: int = 0
    blocks: int = 0
    kv: int = 0
    vocab: Path | None = None
    tokens: int | None = None  # of vocab=FILE:N
    head: float = 0.0  # share of tokens that the head can say, 0 for all: not for users, it is fit for drafting only
    auto: float = 0.0  # how many times as fast; 0 where it is not asked for

    def __post_init__(self) -> None:
        if not 0 <= self.ffn <= _MOST:
            raise UsageError(f"--prune: ffn={100 * self.ffn:g}% is not between 0% and {100 * _MOST:g}%")
        for name in ("layers", "blocks", "kv"):
            if getattr(self, name) < 0:
                raise UsageError(f"--prune: {name}={getattr(self, name)} is negative")
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"--prune: vocab=FILE:{self.tokens} keeps no token; say how many, or only FILE")
        if not 0 <= self.head <= 1:
            raise UsageError(f"--prune: head={self.head:g} is no share")
        if self.auto and not 1 < self.auto <= _FASTEST:
            raise UsageError(f"--prune: auto:{self.auto:g} is not a speed-up above 1 and up to {_FASTEST:g}")
        if self.auto and (self.ffn or self.layers or self.blocks or self.kv or self.tokens):
            raise UsageError("--prune: auto chooses by itself; with it works vocab=FILE, without a number of tokens")

    @classmethod
    def parse(cls, text: str) -> "Pruning":
        """Raises UsageError on an unknown or repeated kind and on a value that is none."""
        if text.strip() == "none":
            return cls()
        found: dict[str, float | int | Path] = {}
        for part in text.split(","):
            name, _, value = (side.strip() for side in part.partition(":" if part.strip()[:4] == "auto" else "="))
            if name not in _KINDS or not value:
                raise UsageError(f"--prune: {part.strip()!r} is not understood; works: {_EXAMPLE}")
            if name in found:
                raise UsageError(f"--prune: {name} is said twice")
            found[name] = _parse_value(name, value)
        if (named := re.fullmatch(r"(.+):(\d+)", str(found.get("vocab", "")))) is not None:
            found |= {"vocab": Path(named[1]), "tokens": int(named[2])}
        return cls(**found)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self != Pruning()

    @property
    def needs_text(self) -> bool:
        """Whether a choice depends on calibration text."""
        return bool(self.ffn or self.layers or self.blocks or self.kv or self.auto)

    @property
    def text(self) -> str:
        """As the user would write it, the vocabulary's file by its name and the start of its hash: content counts.

        Raises DsoptError when that file cannot be read.
        """
        parts = [f"auto:{self.auto:g}"] if self.auto else []
        parts += [f"ffn={100 * self.ffn:g}%"] if self.ffn else []
        parts += [f"{name}={getattr(self, name)}" for name in ("layers", "blocks", "kv") if getattr(self, name)]
        if self.vocab:
            digest = hashlib.sha256(self.read_corpus().encode()).hexdigest()[:8]
            parts.append(f"vocab={self.vocab.name}{f':{self.tokens}' * bool(self.tokens)}@{digest}")
        if self.head:
            parts.append(f"head={self.head:g}")
        return ",".join(parts) or "none"

    def read_corpus(self) -> str:
        """The text whose tokens are kept. Raises DsoptError when it is missing, not UTF-8 or empty."""
        assert self.vocab is not None
        try:
            text = self.vocab.read_text(encoding="utf-8")
        except OSError as error:
            raise DsoptError(f"{self.vocab} could not be read ({error.strerror}); vocab= names a text file") from error
        except UnicodeDecodeError as error:
            raise DsoptError(f"{self.vocab} is not UTF-8 text (byte {error.start}); convert it") from error
        if not text.strip():
            raise DsoptError(f"{self.vocab} is empty; vocab= names a text of the kind that the model is to be used on")
        return text


NOTHING = Pruning()


def full_text(recipe: str, pruning: Pruning) -> str:
    """A recipe and what is pruned beside it: what two artifacts of one checkpoint may differ in."""
    return f"{recipe} prune {pruning.text}" if pruning else recipe


def _parse_value(name: str, value: str) -> float | int | Path:
    if name == "vocab":
        return Path(value).expanduser()
    if name == "auto":
        if not re.fullmatch(r"\d+(\.\d+)?", value):
            raise UsageError(f"--prune: auto:{value} is not a factor, as auto:1.15")
        return float(value)
    if name == "ffn":
        if not re.fullmatch(r"\d+(\.\d+)?%", value):
            raise UsageError(f"--prune: ffn={value} is not a percentage, as ffn=10%")
        return float(value[:-1]) / 100
    if not value.isascii() or not value.isdigit():
        raise UsageError(f"--prune: {name}={value} is not a number, as {name}=2")
    return int(value)
