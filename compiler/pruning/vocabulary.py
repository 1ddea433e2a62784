"""A smaller vocabulary, chosen by a text: what text of its kind does not need leaves tables and tokenizer.

What is kept: every token of the text's encoding, every part that a kept token is merged from, single bytes, added
tokens, and, because no text shows everything, the likeliest of the others (see `token_rates`). Other texts in the same
language are thought of too: what is no word (spaces, punctuation, digits) stays, since texts differ most in that and it
is little, and a part of what is to be encoded is taken to be any text in the same script. Where a size is said, text of
this very kind alone counts, and those stay without which it takes most pieces more. Any text still encodes: what is
gone comes in more pieces, down to bytes. Text of kept tokens encodes as before, since a merge that was taken is part of
how its token is made.
"""

import dataclasses
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsopt.compiler.pruning.token_rates import general_rates, is_word, unseen_rates
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.tokenizer import Tokenizer

ELSEWHERE = 0.2  # of what will be encoded, text unlike the one that chooses
DROPPED = 0.001  # pieces that a token of text may have more: the model never met them there, each costs 6 nats
MULTIPLE = 64  # rows of a table: what the kernels like


@dataclass(frozen=True)
class Vocabulary:
    """`kept` old ids ascending, int64; a token's new id is its place there. `record` is for the manifest.

    `parts`: by old id the two ids that a token is merged from.
    """

    kept: NDArray[np.int64]
    record: Mapping[str, Any]
    parts: Mapping[int, tuple[int, int]] = field(default_factory=dict, repr=False)

    def new_id(self, old: int) -> int | None:
        place = int(np.searchsorted(self.kept, old))
        return place if place < len(self.kept) and self.kept[place] == old else None


@dataclass(frozen=True)
class Ranking:
    """Tokens in the order in which they are worth keeping: any start of `order` can stand alone.

    order int64 [tokens]: bytes and added tokens first, then what the text needs, then the others; each behind what it
    is merged from. `least` of them cannot go, `whole` has all of the text. left float64 [tokens + 1]: by how many
    pieces more a token of text is said where so many are kept. seen: distinct tokens of the text. parts: by id, the
    two that a token is merged from.
    """

    order: NDArray[np.int64]
    left: NDArray[np.float64]
    least: int
    whole: int
    seen: int
    parts: Mapping[int, tuple[int, int]]

    def take(self, size: int | None = None) -> Vocabulary:
        """About `size` tokens, or all of the text and so many others that no more than DROPPED is gone."""
        wanted = self.least if size is None else max(size, self.least)
        if size is None:
            wanted = max(self.whole, int((self.left > DROPPED).sum()))
        count = min(len(self.order), -(-wanted // MULTIPLE) * MULTIPLE)
        record = {
            "tokens": count,
            "of": len(self.order),
            "seen": self.seen,
            "dropped_share": max(float(self.left[count]), 0.0),
        }
        return Vocabulary(np.sort(self.order[:count]), record, self.parts)


def choose_vocabulary(tokenizer_json: bytes, text: str, size: int | None = None) -> Vocabulary:
    """The tokens to keep: about `size`, by text of this kind, or as many as leave out DROPPED of the tokens of text in
    this language; `alike` in the record is how many would do for text of this kind.

    Raises DsoptError on a tokenizer that is no BPE or cannot fall back to bytes.
    """
    tokens = _Tokens(tokenizer_json, text)
    alike = tokens.rank().take(size)
    if size is not None:
        return alike
    made = tokens.rank(ELSEWHERE).take()
    return dataclasses.replace(made, record={**made.record, "alike": alike.record["tokens"]})


def rank_tokens(tokenizer_json: bytes, text: str, elsewhere: float = 0.0) -> Ranking:
    """By what is needed for text of this kind, and for other text in its language as a share `elsewhere` of all.

    Raises DsoptError on a tokenizer that is no BPE or cannot fall back to bytes.
    """
    return _Tokens(tokenizer_json, text).rank(elsewhere)


class _Tokens:
    """A tokenizer's, and how often a text has them. `parts`: by id, the two that a token is merged from."""

    def __init__(self, tokenizer_json: bytes, text: str) -> None:
        spec = json.loads(tokenizer_json)
        _check(spec)
        self.tokenizer = Tokenizer.from_bytes(tokenizer_json, Path("tokenizer.json"))
        self.ids = self.tokenizer.encode(text, special=False)
        self.counts = Counter(self.ids)
        known: dict[str, int] = spec["model"]["vocab"]
        self.all = list(known.values())
        merges = [pair(merge) for merge in spec["model"]["merges"]]
        # Of several merges that make a token, the first counts.
        self.parts = {known[a + b]: (known[a], known[b]) for a, b in reversed(merges)}
        basic = [token for token in known if len(token) == 1 or _is_byte(token)]
        basic += [unknown for unknown in (spec["model"].get("unk_token"),) if unknown in known]
        self.basic = {token["id"] for token in spec["added_tokens"]} | {known[token] for token in basic}

    def rank(self, elsewhere: float = 0.0) -> Ranking:
        rates = unseen_rates(self.tokenizer, self.ids, self.all)
        rates |= {id: count / len(self.ids) for id, count in self.counts.items()}
        stays, known = self.basic, {*self.all}
        if elsewhere:
            general = general_rates(self.tokenizer, self.ids, self.all)
            rates = {id: (1 - elsewhere) * rates.get(id, 0.0) + elsewhere * general.get(id, 0.0) for id in self.all}
            stays = stays | self._closed(id for id in self.all if not is_word(self.tokenizer, id))
        wanted = self._closed(id for id in self.counts if id in known)
        gone, costs = _drop_all(self.all, stays, wanted, self.parts, rates)
        left = np.concatenate([np.cumsum(costs)[::-1], np.zeros(len(stays) + 1)])
        left = np.concatenate([np.full(len(stays), left[0]), left[: len(gone) + 1]])
        order = np.array([*sorted(stays), *reversed(gone)], np.int64)
        return Ranking(order, left, len(stays), len(stays | wanted), len(self.counts), self.parts)

    def _closed(self, ids: Iterable[int]) -> set[int]:
        """With everything that they are merged from."""
        closed, left = set[int](), list(ids)
        while left:
            id = left.pop()
            if id not in closed:
                closed.add(id)
                left += self.parts.get(id, ())
        return closed


def _drop_all(
    ids: list[int],
    stays: set[int],
    wanted: set[int],
    parts: Mapping[int, tuple[int, int]],
    rates: Mapping[int, float],
) -> tuple[list[int], list[float]]:
    """(what goes, in order, those `wanted` last; the pieces that a token of text has more without each).

    A token that goes is said by its two parts from then on: its rate counts for them too. So the next to go is the one
    with the least rate by then, of those that no other token is merged from.
    """
    said = {id: rates.get(id, 0.0) for id in ids}
    users = Counter(part for id in ids for part in set(parts.get(id, ())))
    heap = [(id in wanted, said[id], -id) for id in ids if not users[id] and id not in stays]
    heapq.heapify(heap)
    gone: list[int] = []
    costs: list[float] = []
    while heap:
        late, cost, negative = heapq.heappop(heap)
        id = -negative
        if said[id] > cost:  # it stands for more since it was put there
            heapq.heappush(heap, (late, said[id], negative))
            continue
        gone.append(id)
        costs.append(cost)
        for part in parts.get(id, ()):
            said[part] += cost
        for part in set(parts.get(id, ())):
            users[part] -= 1
            if not users[part] and part not in stays:
                heapq.heappush(heap, (part in wanted, said[part], -part))
    return gone, costs


def _check(spec: Mapping[str, Any]) -> None:
    model = spec["model"]
    steps = json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    if model.get("type") != "BPE" or not ("ByteLevel" in steps or model.get("byte_fallback")):
        raise DsoptError(
            f"--prune vocab= works with BPE tokenizers over bytes; this one is {model.get('type')} without them"
        )


def pair(merge: str | list[str]) -> tuple[str, str]:
    """Both forms of the file: "a b" and ["a", "b"]."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
