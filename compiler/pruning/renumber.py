"""The same model over fewer tokens: tables as views of their rows, and new ids wherever ids are written."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.pruning.tensors import select
from dsopt.compiler.pruning.vocabulary import Vocabulary, pair
from dsopt.runtime.errors import DsoptError

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_IDS = frozenset(
    f"{name}_token_id" for name in ("bos", "eos", "pad", "unk", "decoder_start", "forced_bos", "forced_eos")
) | {"suppress_tokens", "begin_suppress_tokens"}


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
    model["merges"] = [merge for merge in model["merges"] if {*(parts := pair(merge)), "".join(parts)} <= kept.keys()]
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
