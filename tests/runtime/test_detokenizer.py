"""Streaming text: whole characters only, the text of decoding at once, stop strings wherever they fall."""

import random

import pytest
import tokenizers
from tokenizers import decoders, models

from dsopt.runtime.detokenizer import Detokenizer
from dsopt.runtime.errors import UsageError
from dsopt.runtime.tokenizer import Tokenizer


def byte_tokenizer(*pieces: str) -> Tokenizer:
    """Ids 0-255 are bytes, 256 is special, then come `pieces`; byte-fallback, with SentencePiece's spaces."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "<end>", *pieces]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<0x00>", byte_fallback=True))
    backend.add_special_tokens(["<end>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend)


def alphabet_tokenizer() -> Tokenizer:
    """The same by GPT-2's alphabet; 257 (E6 97) and 258 (A5 20) hold parts of a character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    tokens = [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]
    tokens += ["<end>", tokens[0xE6] + tokens[0x97], tokens[0xA5] + tokens[0x20]]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.add_special_tokens(["<end>"])
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def stream(tokenizer: Tokenizer, ids: list[int], *stop: str) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(tokenizer, stop=stop)
    pieces = [detokenizer.add(token) for token in ids]
    return [*pieces, detokenizer.finish()], detokenizer.stopped


@pytest.mark.parametrize("make", [lambda: byte_tokenizer("▁", "▁▁", "▁fox", "é"), alphabet_tokenizer])
def test_the_stream_is_the_decoded_text(make) -> None:
    tokenizer, rng = make(), random.Random(5)
    scraps = [*"日本é😀 \ufffd", " ", "  ", "a"]
    for _ in range(400):
        ids: list[int] = []
        for _ in range(rng.randrange(10)):
            whole = list(rng.choice(scraps).encode())
            ids += rng.choice([whole, whole[:-1], [rng.randrange(tokenizer.vocab_size)], [256]])
        pieces, stopped = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert stopped is None


def test_never_half_a_character() -> None:
    assert stream(alphabet_tokenizer(), [97, 257, 256, 258, 98])[0] == ["a", "", "", "日 ", "b", ""]
    assert stream(byte_tokenizer(), list("😀".encode()))[0] == ["", "", "", "😀", ""]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    assert stream(byte_tokenizer(), [97, 0xF0, 0x9F])[0] == ["a", "", "", "\ufffd"]


def test_a_real_replacement_character_comes_at_once() -> None:
    assert stream(byte_tokenizer("\ufffd"), [97, 257, 98])[0] == ["a", "\ufffd", "b", ""]


def test_invalid_bytes_are_not_held_forever() -> None:
    detokenizer = Detokenizer(byte_tokenizer())
    given = 0
    for count in range(1, 200):
        given += len(detokenizer.add(0x9F if count % 3 else 0xF0))
        assert given >= (count - 4) / 3  # each U+FFFD stands for at most 3 bytes, 3 more may wait


def test_the_dummy_prefix_goes_and_later_spaces_stay() -> None:
    tokenizer = byte_tokenizer("▁fox", "▁", "▁▁")
    assert stream(tokenizer, [257, 257])[0] == ["fox", " fox", ""]
    assert stream(tokenizer, [256, 258, 258, 257])[0] == ["", "", " ", " fox", ""]
    assert stream(tokenizer, [259, 257])[0] == [" ", " fox", ""]
    assert stream(tokenizer, [9999, 257])[0] == ["", "fox", ""]  # an id that pads the vocabulary


@pytest.mark.parametrize(
    ("pieces", "stop", "given", "stopped"),
    [
        (["one S", "TO", "P two"], ["STOP"], ["one ", "", "", ""], "STOP"),
        (["one S", "TO", "ne"], ["STOP"], ["one ", "", "STOne", ""], None),
        (["before STOP after"], ["STOP"], ["before ", ""], "STOP"),
        (["a", "a", "a", "b"], ["aab"], ["", "", "a", "", ""], "aab"),
        (["aaab"], ["aab"], ["a", ""], "aab"),
        (["abab", "abac"], ["ababac"], ["", "ab", ""], "ababac"),
        (["x world lo"], ["lo", "world"], ["x ", ""], "world"),
        (["x wor", "lo world"], ["world", "lo"], ["x ", "wor", ""], "lo"),
        (["abc"], ["abcd", "c", "bc"], ["a", ""], "bc"),  # they end together: the longer
        (["a", "b", "c", "d"], ["abcd", "bc"], ["", "", "a", "", ""], "bc"),  # bc is complete first
        (["x終", "わ", "り。"], ["終わり"], ["x", "", "", ""], "終わり"),
        (["tail S", "T"], ["STOP"], ["tail ", "", "ST"], None),
        (["a\n", "\n", "b"], ["\n\n"], ["a", "", "", ""], "\n\n"),
    ],
)
def test_stop_strings(pieces: list[str], stop: list[str], given: list[str], stopped: str | None) -> None:
    tokenizer = byte_tokenizer(*dict.fromkeys(piece.replace(" ", "▁") for piece in pieces))
    ids = [257 + list(dict.fromkeys(pieces)).index(piece) for piece in pieces]
    assert stream(tokenizer, ids, *stop) == (given, stopped)


def test_a_stop_string_of_split_characters_is_found() -> None:
    pieces, stopped = stream(byte_tokenizer(), list("ab終わりc".encode()), "終わり")
    assert ("".join(pieces), stopped) == ("ab", "終わり")


def test_the_stop_does_not_depend_on_where_tokens_begin() -> None:
    rng = random.Random(9)
    for _ in range(200):
        text = "".join(rng.choices("ab", k=14))
        stop = ["".join(rng.choices("ab", k=rng.randrange(2, 6))) for _ in range(3)]
        tokenizer = byte_tokenizer(text)
        one_by_one, first = stream(tokenizer, list(text.encode()), *stop)
        at_once, second = stream(tokenizer, [257], *stop)
        assert ("".join(one_by_one), first) == ("".join(at_once), second)
        assert not any(s in "".join(at_once) for s in stop)


def test_nothing_comes_after_the_stop() -> None:
    detokenizer = Detokenizer(byte_tokenizer("stop", "more"), stop=["stop"])
    assert [detokenizer.add(257), detokenizer.add(258), detokenizer.finish()] == ["", "", ""]


def test_an_empty_stop_string_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--stop is empty"):
        Detokenizer(byte_tokenizer(), stop=["a", ""])
