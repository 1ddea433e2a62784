"""The text decoder of a checkpoint that sees and hears too: config and tensors named as in one of text alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsopt.compiler.checkpoint import Checkpoint, Tensor
from dsopt.runtime.errors import DsoptError

_WHOLE = ("gemma4", "gemma4_unified")  # model types with a `text_config`
_TEXT, _PART = "model.language_model.", "model."
_FAMILY = "gemma4"
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_ABOVE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # the whole model's word counts


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, unless its model type has more than text. Raises DsoptError without a text config."""
    config, tensors = checkpoint.config, checkpoint.tensors
    if not str(config.get("model_type")).startswith(_FAMILY):
        return checkpoint
    left_out: tuple[str, ...] = ()
    if config["model_type"] in _WHOLE:
        config = _text_config(checkpoint)
        left_out = tuple(sorted(name for name in tensors if not _is_text(name)))
        tensors = {_text_name(name): tensor for name, tensor in tensors.items() if _is_text(name)}
    config = with_dtype(config, tensors, "model.embed_tokens.weight")
    return dataclasses.replace(checkpoint, config=config, tensors=tensors, left_out=left_out)


def with_dtype(config: Mapping[str, Any], tensors: Mapping[str, Tensor], embedding: str) -> dict[str, Any]:
    """The config with the type that the embedding is stored in as `dtype`."""
    stored = _DTYPES.get(tensors[embedding].dtype) if embedding in tensors else None
    return {**config, **({"dtype": stored} if stored else {})}


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config, text = checkpoint.config, checkpoint.config.get("text_config")
    if not isinstance(text, Mapping):
        raise DsoptError(f"{checkpoint.source.path}: config.json of a {config['model_type']} model has no text_config")
    said = {name: config[name] for name in _ABOVE if config.get(name) is not None}
    return {"model_type": f"{config['model_type']}_text", **text, **said}


def _is_text(name: str) -> bool:
    return name.startswith((_TEXT, "lm_head."))


def _text_name(name: str) -> str:
    return _PART + name.removeprefix(_TEXT) if name.startswith(_TEXT) else name
