"""The tokenizer inside a GGUF file as Hugging Face's files, with its chat template and stop tokens."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from dsopt.compiler.gguf_vocabulary import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    byte_level,
    sentencepiece,
)
from dsopt.runtime.errors import DsoptError

_BUILDERS = {"gpt2": byte_level, "llama": sentencepiece}
# What ends a turn in the chat formats of the families here; llama.cpp too looks for these when no key says.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def tokenizer_files(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and perhaps chat_template.jinja.

    Raises DsoptError when the tokenizer is malformed, or of a kind that cannot be rebuilt exactly.
    """
    files = {
        "tokenizer.json": build_tokenizer(vocabulary).to_str(pretty=False).encode(),
        "tokenizer_config.json": _encode(_tokenizer_config(vocabulary, metadata)),
        "generation_config.json": _encode(_generation_config(vocabulary)),
    }
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        files["chat_template.jinja"] = template.encode()
    return files


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer with its added tokens and its begin and end tokens."""
    if vocabulary.model not in _BUILDERS:
        raise DsoptError(
            f"tokenizer.ggml.model {vocabulary.model!r} is not supported; supported: {', '.join(_BUILDERS)}"
        )
    try:
        tokenizer = _BUILDERS[vocabulary.model](vocabulary)
    except DsoptError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        first_line = str(error).partition("\n")[0]
        raise DsoptError(f"the GGUF file's tokenizer contradicts itself: {first_line}") from error
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    _wrap(tokenizer, vocabulary)
    return tokenizer


def _wrap(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Put the begin and end tokens around every encoded text, where the model was trained so."""
    bos = vocabulary.token("bos") if vocabulary.add_bos else None
    eos = vocabulary.token("eos") if vocabulary.add_eos else None
    if bos is None and eos is None:
        return
    wrap = [([bos] if bos else []) + [f"${part}"] + ([eos] if eos else []) for part in ("A", "B")]
    tokenizer.post_processor = TemplateProcessing(
        single=wrap[0],
        pair=wrap[0] + [f"{piece}:1" for piece in wrap[1]],
        special_tokens=[(token, vocabulary.tokens.index(token)) for token in {bos, eos} if token],
    )


def _tokenizer_config(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> dict[str, Any]:
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return {
        # onnxruntime-genai knows few class names; this one, transformers takes as it stands.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": vocabulary.token(role) for role in vocabulary.roles},
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": context} if isinstance(context, int) else {}),
    }


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    ends = [vocabulary.roles[role] for role in ("eos",) if role in vocabulary.roles]
    turn_ends = vocabulary.turn_ends or [
        index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind == CONTROL and token in _TURN_ENDS
    ]
    ends = list(dict.fromkeys([*ends, *turn_ends]))
    config: dict[str, Any] = {f"{r}_token_id": vocabulary.roles[r] for r in ("bos", "pad") if r in vocabulary.roles}
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return config


def _encode(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
