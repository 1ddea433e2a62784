"""The tokenizer: exact bytes, special tokens, and errors that say what is wrong."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dsopt.runtime.errors import DsoptError
from dsopt.runtime.tokenizer import Tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog", "naïve café, 日本語, 😀!", "  two  spaces 123\n\ttab"]


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE of 300 tokens, with a special token, an added one and a bos."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "<|end|>"], show_progress=False
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    backend.add_tokens(["<think café>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def sentence_piece() -> tokenizers.Tokenizer:
    """A Llama-2-like BPE: ▁ for spaces, a dummy prefix, bytes for what the vocabulary lacks."""
    words = ["▁", "▁the", "▁fox", "fox", "▁▁", "▁▁▁", "é", "caf", *"thefoxcan"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": content, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, content in enumerate(tokens[:3])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [["▁", "▁"]],
        },
    }
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


HARD = [
    "",
    " ",
    "   fox",
    "the fox café 日本語 😀",
    "a\nb\t c",
    "👩‍👩‍👧 \x00 \u0301e",
    "\ufffd real",
    "<0x41>",
]


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("text", HARD)
def test_text_survives(make, text: str) -> None:
    tokenizer = Tokenizer(make())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_byte_level_ids_is_what_the_library_gives() -> None:
    backend = byte_level()
    tokenizer, rng = Tokenizer(backend), random.Random(1)
    ordinary = range(backend.get_vocab_size() - 1)  # the library reads an added token's é as a byte
    for _ in range(500):
        ids = rng.choices(ordinary, k=rng.randrange(12))
        assert tokenizer.decode(ids) == backend.decode(ids)


def test_decoding_sentence_piece_ids_is_what_the_library_gives() -> None:
    backend = sentence_piece()
    tokenizer, rng = Tokenizer(backend), random.Random(1)
    valid = [i for i in range(backend.get_vocab_size()) if not 3 + 0x80 <= i < 3 + 0x100]
    for _ in range(500):
        ids = rng.choices(valid, k=rng.randrange(12))
        assert tokenizer.decode(ids) == backend.decode(ids)


def test_token_bytes_are_exact() -> None:
    backend = byte_level()
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("日 😀")
    assert b"".join(map(tokenizer.token_bytes, ids)) == "日 😀".encode()
    assert {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)} >= {bytes([b]) for b in range(256)}
    assert tokenizer.token_bytes(backend.token_to_id("<think café>")) == "<think café>".encode()

    backend = sentence_piece()
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_bytes(backend.token_to_id("<0xE6>")) == b"\xe6"
    assert tokenizer.token_bytes(backend.token_to_id("▁fox")) == b" fox"


def test_special_tokens_in_text() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("fox<|end|>")
    assert ids[-1] == 1
    assert tokenizer.is_special(1)
    assert not any(map(tokenizer.is_special, ids[:-1]))
    assert tokenizer.decode(ids) == "fox"
    assert tokenizer.decode(ids, skip_special=False) == "fox<|end|>"
    plain = tokenizer.encode("fox<|end|>", special=False)
    assert not any(map(tokenizer.is_special, plain))
    assert tokenizer.decode(plain) == "fox<|end|>"
    assert tokenizer.encode("fox<|end|>") == ids  # the choice does not stick


def test_bos_is_added_only_when_asked_and_once() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("fox")
    assert 0 not in ids
    assert tokenizer.add_bos(ids) == [0, *ids]
    assert tokenizer.add_bos([0, *ids]) == [0, *ids]
    assert Tokenizer(sentence_piece()).add_bos([5]) == [5]


def test_ids_that_pad_the_vocabulary_stand_for_no_text() -> None:
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""
    assert not tokenizer.is_special(tokenizer.vocab_size + 7)


def test_a_prompt_is_never_truncated_or_padded(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode(TEXT[0]) == Tokenizer(byte_level()).encode(TEXT[0])


def test_lone_surrogates_are_one_clear_line() -> None:
    with pytest.raises(DsoptError, match=r"not valid Unicode \(U\+D83D at character 3\)"):
        Tokenizer(byte_level()).encode("fox\ud83d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no tokenizer.json"),
        ("{", "not a readable tokenizer"),
        ("wordpiece", "WordPiece is not supp"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content == "wordpiece":
        backend = byte_level()
        backend.decoder = decoders.WordPiece()
        content = backend.to_str()
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DsoptError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
