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
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.pruning.tensors import select
from dsopt.compiler.pruning.token_rates import general_rates, is_word, unseen_rates
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.tokenizer import Tokenizer

ELSEWHERE = 0.15  # of what will be encoded, text unlike the one that chooses
DROPPED = 0.001  # pieces that a token of text may have more: the model never met them there, each costs 6 nats
MULTIPLE = 64  # rows of a table: what the kernels like
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_IDS = frozenset(
    f"{name}_token_id" for name in ("bos", "eos", "pad", "unk", "decoder_start", "forced_bos", "forced_eos")
) | {"suppress_tokens", "begin_suppress_tokens"}


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
    alike = rank_tokens(tokenizer_json, text).take(size)
    if size is not None:
        return alike
    made = rank_tokens(tokenizer_json, text, ELSEWHERE).take()
    return dataclasses.replace(made, record={**made.record, "alike": alike.record["tokens"]})


def rank_tokens(tokenizer_json: bytes, text: str, elsewhere: float = 0.0) -> Ranking:
    """By what is needed for text of this kind, and for other text in its language as a share `elsewhere` of all.

    Raises DsoptError on a tokenizer that is no BPE or cannot fall back to bytes.
    """
    spec = json.loads(tokenizer_json)
    _check(spec)
    tokenizer = Tokenizer.from_bytes(tokenizer_json, Path("tokenizer.json"))
    ids = tokenizer.encode(text, special=False)
    vocabulary, merges = spec["model"]["vocab"], [_pair(merge) for merge in spec["model"]["merges"]]
    added = {token["id"] for token in spec["added_tokens"]}
    parts = {a + b: (a, b) for a, b in reversed(merges)}  # of several merges that make a token, the first counts
    texts = {id: token for token, id in vocabulary.items()}
    counts = Counter(ids)
    rates = unseen_rates(tokenizer, ids, texts) | {id: count / len(ids) for id, count in counts.items()}
    basic = [token for token in vocabulary if len(token) == 1 or _is_byte(token)]
    basic += [unknown for unknown in (spec["model"].get("unk_token"),) if unknown in vocabulary]
    stays = added | {vocabulary[token] for token in basic}
    if elsewhere:
        general = general_rates(tokenizer, ids, texts)
        rates = {id: (1 - elsewhere) * rates.get(id, 0.0) + elsewhere * general.get(id, 0.0) for id in texts}
        other = (token for token, id in vocabulary.items() if not is_word(tokenizer, id))
        stays |= {vocabulary[token] for token in _closed(other, parts)}
    wanted = {vocabulary[token] for token in _closed((texts[id] for id in counts if id in texts), parts)}
    merges_of = {vocabulary[token]: (vocabulary[x], vocabulary[y]) for token, (x, y) in parts.items()}
    gone, costs = _drop_all([*texts], stays, wanted, merges_of, rates)
    order = [*sorted(stays), *reversed(gone)]
    left = np.concatenate([np.cumsum(costs)[::-1], np.zeros(len(stays) + 1)])
    left = np.concatenate([np.full(len(stays), left[0]), left[: len(gone) + 1]])
    return Ranking(np.array(order, np.int64), left, len(stays), len(stays | wanted), len(counts), merges_of)


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


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Both forms of the file: "a b" and ["a", "b"]."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _closed(tokens: Iterable[str], parts: Mapping[str, tuple[str, str]]) -> set[str]:
    """With everything that they are merged from."""
    closed, left = set(), list(tokens)
    while left:
        token = left.pop()
        if token not in closed:
            closed.add(token)
            left += parts.get(token, ())
    return closed


def prune_vocabulary(checkpoint: Checkpoint, vocabulary: Vocabulary) -> Checkpoint:
    """The same model over the kept tokens: tables as views of their rows, ids changed wherever they are written.

    Raises DsoptError where the tables have no row for a kept token.
    """
    size = int(checkpoint.config["vocab_size"])
    if vocabulary.kept[-1] >= size:
        raise DsoptError(
            f"{checkpoint.source.path}: the tokenizer has id {vocabulary.kept[-1]}, the model {size} tokens"
        )
    tables = {name: select(checkpoint.tensors[name], rows=vocabulary.kept)
              for name in _TABLES if name in checkpoint.tensors}  # fmt: skip
    config = _renumber_ids({**checkpoint.config, "vocab_size": len(vocabulary.kept)}, vocabulary)
    files = {**checkpoint.files, "tokenizer.json": _renumber_tokenizer(checkpoint.files["tokenizer.json"], vocabulary)}
    for name in ("generation_config.json", "tokenizer_config.json"):
        if name in files:
            files[name] = json.dumps(_renumber_ids(json.loads(files[name]), vocabulary), ensure_ascii=False).encode()
    return dataclasses.replace(
        checkpoint,
        config=config,
        tensors={**checkpoint.tensors, **tables},
        files=files,
        changes=hashlib.sha256(f"{checkpoint.changes} tokens".encode() + vocabulary.kept.tobytes()).hexdigest(),
    )


def _renumber_ids(fields: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The ids in a config.json, generation_config.json or tokenizer_config.json; an id that is gone becomes null."""
    found = dict(fields)
    for name in _IDS & found.keys():
        value = found[name]
        if isinstance(value, list):
            found[name] = [new for old in value if (new := vocabulary.new_id(old)) is not None]
        elif type(value) is int:
            found[name] = vocabulary.new_id(value)
    if isinstance(added := found.get("added_tokens_decoder"), dict):
        found["added_tokens_decoder"] = {str(vocabulary.new_id(int(id))): token for id, token in added.items()}
    return found


def _renumber_tokenizer(tokenizer_json: bytes, vocabulary: Vocabulary) -> bytes:
    spec = json.loads(tokenizer_json)
    model = spec["model"]
    kept = {token: new for token, old in model["vocab"].items() if (new := vocabulary.new_id(old)) is not None}
    model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    model["merges"] = [merge for merge in model["merges"] if {*(pair := _pair(merge)), "".join(pair)} <= kept.keys()]
    for token in spec["added_tokens"]:
        token["id"] = vocabulary.new_id(token["id"])
    _renumber_processor(spec.get("post_processor"), vocabulary)
    if isinstance(padding := spec.get("padding"), dict):
        padding["pad_id"] = vocabulary.new_id(padding["pad_id"]) or 0
    return json.dumps(spec, ensure_ascii=False).encode()


def _renumber_processor(processor: Any, vocabulary: Vocabulary) -> None:
    """In place: what puts special tokens around a text names them by id."""
    if not isinstance(processor, dict):
        return
    for step in processor.get("processors", []):
        _renumber_processor(step, vocabulary)
    special = processor.get("special_tokens")
    for token in special.values() if isinstance(special, dict) else []:
        token["ids"] = [vocabulary.new_id(id) for id in token["ids"]]
    for name in ("sep", "cls"):  # of BertProcessing and RobertaProcessing: [token, id]
        if isinstance(processor.get(name), list):
            processor[name][1] = vocabulary.new_id(processor[name][1])
