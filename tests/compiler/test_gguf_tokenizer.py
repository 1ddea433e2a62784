"""Tokenizers from GGUF metadata give the ids of the model's own.

The ids and pieces written out here were given by llama.cpp (llama-cpp-python 0.3.36) for the same vocabulary;
those of the SentencePiece kind come from the sentencepiece library, in the test.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, pre_tokenizers

from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.gguf_tokenizer import build_tokenizer, tokenizer_files
from dsopt.compiler.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from dsopt.runtime.errors import DsoptError

MERGES = [*("Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "1 2", "12 3", "Ġ 1", "Ġ a", "a b", "a 1", "' s", "' S", "s s"),
          *("Ġ .", ". .", ". Ċ", "( a", "Ġ (", "ĉ a", "$ 1", "! !", "Ġ '", "e Ì", "eÌ ģ", "Ã ©")]  # fmt: skip
SPECIAL = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<tool>": USER_DEFINED}

SMOLLM2_IDS: list[tuple[str, list[int]]] = [
    ("", []),
    ("Hello, world!", [19556, 28, 905, 17]),
    ("  leading", [216, 2899]),
    ("trailing  ", [4861, 4966, 256]),
    ("   ", [333]),
    ("a  1", [81, 256, 33]),
    ("x 12 345.6", [104, 216, 33, 34, 216, 35, 36, 37, 30, 38]),
    ("\t\ttabs\n\n\nlines\r\n", [197, 197, 100, 7366, 1116, 198, 5110, 2738]),
    ("日本語 中文", [23274, 115, 40993, 179, 120, 248, 216, 28589, 29184]),
    ("👨\u200d👩 👍🏽", [10813, 235, 118, 321, 231, 10813, 235, 119, 15107, 235, 231, 10813, 233, 138]),
    ("e\u0301 क्षि", [85, 151, 219, 42034, 16525, 4300, 132, 27011]),
    ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198]),
    ("a<|endoftext|><|im_start|", [81, 0, 44, 108, 306, 79, 3738, 108]),
    ("\x00\x1b[0m\u00a0\u200b", [190, 212, 75, 32, 93, 15442, 321, 229]),
    ("don't DON'T we'll", [12420, 982, 422, 2154, 23, 68, 392, 3060]),
]  # fmt: skip

# text -> pieces by tokenizer.ggml.pre; "*" for those not named
PIECES: dict[str, dict[str, str]] = {
    "": {"*": ""},
    "a   b": {"*": "a ĠĠ Ġ b"},
    " a b ": {"*": "Ġa Ġ b Ġ"},
    "a  12": {"*": "a Ġ Ġ 12", "smollm": "a ĠĠ 1 2", "qwen2": "a Ġ Ġ 1 2"},
    "12345": {"*": "123 4 5", "smollm": "1 2 3 4 5", "qwen2": "1 2 3 4 5"},
    "a's A'S": {
        "*": "a 's Ġ A ' S",
        "llama-bpe": "a 's Ġ A 'S",
        "qwen2": "a 's Ġ A 'S",
        "default": "a ' s Ġ A ' S",
    },
    "\ta\t a": {"*": "ĉ a ĉ Ġa", "llama-bpe": "ĉa ĉ Ġa", "qwen2": "ĉa ĉ Ġa"},
    "a\n\n\nb  \n c": {"*": "a ĊĊ Ċ b ĠĠ Ċ Ġ c"},
    "(ab) $! !!": {"*": "( ab ) Ġ $ ! Ġ !!"},
    " 本": {"*": "Ġ æ ľ ¬"},
    "x<|im_end|>y <tool> z": {"*": "x <|im_end|> y Ġ <tool> Ġ z"},
    "  <|im_end|>  ": {"*": "ĠĠ <|im_end|> ĠĠ"},
    "a\u00a0\x00\x1b": {"*": "a Â ł Ā ě"},
    # Not llama.cpp's for qwen2: it skips the NFC normalization that Qwen's own tokenizer.json asks for.
    "e\u0301 é": {"*": "e Ì ģ Ġ Ã©", "qwen2": "Ã© Ġ Ã©"},
}


def bpe_metadata(pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, *SPECIAL],
        "token_type": [NORMAL] * len(tokens) + list(SPECIAL.values()),
        "merges": MERGES,
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def build(metadata: dict[str, Any]) -> Tokenizer:
    """Through the text of tokenizer.json, as readers get it."""
    return Tokenizer.from_str(build_tokenizer(Vocabulary.from_metadata(metadata)).to_str())


def test_the_real_tokenizer(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(str(smollm2_gguf))
    tokenizer = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    for text, ids in SMOLLM2_IDS:
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode([1, 2, 0]) == ""
    assert checkpoint.files["chat_template.jinja"].startswith(b"{% for message in messages %}")


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "default"])
def test_byte_level_pieces(pre: str) -> None:
    tokenizer = build(bpe_metadata(pre))
    for text, pieces in PIECES.items():
        assert " ".join(tokenizer.encode(text, add_special_tokens=False).tokens) == pieces.get(pre, pieces["*"]), text


def test_llama3_takes_a_word_that_is_a_token_whole() -> None:
    def pieces(pre: str) -> list[str]:
        metadata = bpe_metadata(pre)
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "xyz"]
        metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], NORMAL]
        return build(metadata).encode("xyz", add_special_tokens=False).tokens

    assert pieces("llama-bpe") == ["xyz"]
    assert pieces("gpt-2") == ["x", "y", "z"]


def test_special_flags() -> None:
    added = json.loads(build(bpe_metadata()).to_str())["added_tokens"]
    flags = {entry["content"]: (entry["special"], entry["normalized"]) for entry in added}
    assert flags == {"<|im_start|>": (True, False), "<|im_end|>": (True, False), "<tool>": (False, False)}


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("gpt-2", {}, "a"),
        ("gpt-2", {"add_bos_token": True}, "<|im_start|> a"),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, "<|im_start|> a <|im_end|>"),
        ("gpt-2", {"add_bos_token": True, "bos_token_id": None}, "a"),
        ("llama-bpe", {}, "<|im_start|> a"),
        ("llama-bpe", {"add_bos_token": False}, "a"),
    ],
)
def test_begin_and_end_tokens(pre: str, flags: dict[str, Any], expected: str) -> None:
    tokenizer = build(bpe_metadata(pre, **flags))
    assert " ".join(tokenizer.encode("a").tokens) == expected
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]


def test_the_other_files() -> None:
    metadata = bpe_metadata(eot_token_id=3, padding_token_id=0)
    metadata |= {
        "general.architecture": "llama",
        "llama.context_length": 77,
        "tokenizer.chat_template": "{{ 'é' }}",
    }
    files = tokenizer_files(Vocabulary.from_metadata(metadata), metadata)
    assert files["chat_template.jinja"].decode() == "{{ 'é' }}"
    bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    generation = {"bos_token_id": bos, "pad_token_id": 0, "eos_token_id": [eos, 3]}
    assert json.loads(files["generation_config.json"]) == generation
    config = json.loads(files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "!",
    )
    assert config["model_max_length"] == 77
    assert "chat_template" not in config


def test_the_end_of_a_turn_is_found_by_name() -> None:
    metadata = bpe_metadata(eos_token_id=0)
    generation = json.loads(tokenizer_files(Vocabulary.from_metadata(metadata), metadata)["generation_config.json"])
    assert generation["eos_token_id"] == [0, metadata["tokenizer.ggml.tokens"].index("<|im_end|>")]


@pytest.fixture(scope="module")
def pieces_model() -> sentencepiece.SentencePieceProcessor:
    """A tiny SentencePiece BPE with byte fallback, set as Llama's."""
    corpus = (Path(__file__).parents[2] / "LICENSE").read_text().splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*corpus, "naïve café 12 345", "日本語"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        control_symbols=["<|im_end|>"],
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def pieces_metadata(model: sentencepiece.SentencePieceProcessor, **more: Any) -> dict[str, Any]:
    def kind(index: int) -> int:
        if model.is_unknown(index):
            return UNKNOWN
        if model.is_control(index):
            return CONTROL
        if model.is_byte(index):
            return BYTE
        return USER_DEFINED if model.id_to_piece(index) == "<tool>" else NORMAL

    ids = range(model.vocab_size())
    metadata = {
        "model": "llama",
        "tokens": [model.id_to_piece(index) for index in ids],
        "scores": [model.get_score(index) for index in ids],
        "token_type": [kind(index) for index in ids],
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


HARD = [
    *(
        "",
        " ",
        "  ",
        " lead",
        "trail ",
        "a  b   c    d",
        "\t",
        "\n",
        "\n\n x\r\n",
        "12 345",
        "x12.5e-3",
        "café",
    ),
    *("日本語 中文", "👨\u200d👩 👍🏽", "e\u0301 ñ", "\u00a0\x01\x1b", "▁ <0x41>", "aaaaaaa", "THE WORK" * 9),
]


def test_sentencepiece_ids(pieces_model: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = build(pieces_metadata(pieces_model))
    for text in [*HARD, *(Path(__file__).parents[2] / "LICENSE").read_text().split("\n\n")]:
        ids = pieces_model.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.encode(text).ids == [pieces_model.bos_id(), *ids]
        assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_sentencepiece_special_tokens_in_text(pieces_model: sentencepiece.SentencePieceProcessor) -> None:
    """The word after a special token gets its "▁", as llama.cpp does it."""
    tokenizer = build(pieces_metadata(pieces_model, add_bos_token=False))
    end, tool = pieces_model.piece_to_id("<|im_end|>"), pieces_model.piece_to_id("<tool>")
    a, b = pieces_model.encode("a"), pieces_model.encode("b")
    assert tokenizer.encode("a<|im_end|>b<tool>a").ids == [*a, end, *b, tool, *a]


def test_sentencepiece_without_a_space_before(pieces_model: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = build(pieces_metadata(pieces_model, add_space_prefix=False, add_bos_token=False))
    assert tokenizer.encode(" the").ids == pieces_model.encode("the")
    assert tokenizer.encode("a").tokens == ["a"]
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre": "tekken"}, ["'tekken'", "default, gpt-2, llama-bpe, qwen2"]),
        ({"model": "bert"}, ["'bert'", "gpt2, llama"]),
        ({"tokens": None}, ["tokenizer.ggml.tokens"]),
        ({"tokens": "a"}, ["tokenizer.ggml.tokens"]),
        ({"tokens": []}, ["empty"]),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, ["twice"]),
        ({"tokens": ["a", 3], "token_type": [1, 1]}, ["tokens", "str"]),
        ({"token_type": [1, 1]}, ["types"]),
        ({"eos_token_id": 10**6}, ["1000000"]),
        ({"merges": ["a qq"]}, ["contradicts itself"]),
        ({"model": "llama"}, ["scores"]),
    ],
)
def test_what_is_refused(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DsoptError) as caught:
        build(bpe_metadata(**change))
    for word in words:
        assert word in str(caught.value)
