"""How often tokens that a text does not have will be met in other text of its kind.

Tokens of one kind (the script and shape of their text, how early they were learnt) stand for each other: how often one
half of the text has tokens of a kind that the other half lacks is measured, both ways, and shared out. Halves rather
than Good-Turing's counts of one, since texts are bursty: what was met once is soon met again.
"""

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from dsopt.runtime.tokenizer import Tokenizer

Kind = tuple[bool, str, int]
_FIRST = 1024  # tokens of the lowest ranks, one kind of age; then two kinds an octave


def unseen_rates(tokenizer: Tokenizer, ids: Sequence[int], candidates: Iterable[int]) -> dict[int, float]:
    """For each of `candidates` that `ids` lack the occurrences to expect, a token of text. 0 for kinds never met."""
    half = len(ids) // 2
    halves = Counter(ids[:half]), Counter(ids[half:])
    members = defaultdict(list)
    for id in candidates:
        members[kind(tokenizer, id)].append(id)
    seen = set(ids)
    rates: dict[int, float] = {}
    for group in members.values():
        rate = sum(_rate(a, b, group) for a, b in (halves, halves[::-1])) / 2
        rates |= dict.fromkeys((id for id in group if id not in seen), rate)
    return rates


def _rate(known: Mapping[int, int], other: Counter[int], group: Sequence[int]) -> float:
    unseen = [id for id in group if id not in known]
    return sum(other[id] for id in unseen) / max(1, len(unseen)) / max(1, other.total())


def kind(tokenizer: Tokenizer, id: int) -> Kind:
    """(whether a space leads, script and shape, age)."""
    text = tokenizer.token_bytes(id).decode("utf-8", "replace")
    age = max(0, math.ceil(2 * math.log2((id + 1) / _FIRST)))
    return text[:1] == " ", _shape(text.removeprefix(" ")), age


def _shape(text: str) -> str:
    if not text.isascii():
        return "latin" if all(ord(character) < 0x250 for character in text) else "other"
    if text.isalpha():
        return next((name for name in ("lower", "upper", "title") if getattr(text, f"is{name}")()), "mixed")
    if text.isdigit() or text.isspace():
        return "digits" if text.isdigit() else "space"
    return "code" if any(character.isalpha() for character in text) else "marks"


def general_rates(tokenizer: Tokenizer, ids: Sequence[int], candidates: Iterable[int]) -> dict[int, float]:
    """For each of `candidates` that is a word or a part of one, the occurrences to expect, a token of any text in the
    scripts of `ids`: a script's share there, by Zipf's law over the ranks of its tokens, those learnt first before all.
    """
    scripts = {id: script for id in candidates if (script := _script(tokenizer, id))}
    shares, weights = defaultdict[str, float](float), defaultdict[str, float](float)
    for id, count in Counter(ids).items():
        shares[scripts.get(id, "")] += count
    for id, script in scripts.items():
        weights[script] += _zipf(id)
    return {id: shares[s] / max(1, len(ids)) * _zipf(id) / weights[s] for id, s in scripts.items()}


def _zipf(id: int) -> float:
    return 1 / (id + _FIRST // 2)


def is_word(tokenizer: Tokenizer, id: int) -> bool:
    """Whether a token is letters alone, but for a space before them."""
    return bool(_script(tokenizer, id))


def _script(tokenizer: Tokenizer, id: int) -> str:
    text = tokenizer.token_bytes(id).decode("utf-8", "replace").removeprefix(" ")
    if not text.isalpha():
        return ""
    return "ASCII" if text.isascii() else unicodedata.name(text[0], "").split(" ")[0] or "other"
