"""Text to token ids and back, through the `tokenizers` library and an artifact's `tokenizer.json`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dsopt.runtime.errors import DsoptError

_SUPPORTED = "ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse, Strip"


class Tokenizer:
    """A byte-level BPE or a SentencePiece-like tokenizer, whose tokens each stand for exact bytes.

    `decode` is defined by those bytes: the tokens' bytes joined, read as UTF-8 with U+FFFD for what is not.
    For valid UTF-8 that is what `tokenizers` gives. An invalid run of byte-fallback tokens differs: the
    library turns the whole run into U+FFFD, valid characters included, which no stream can know in time.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises DsoptError when the decoder is none of those that give each token its own bytes."""
        backend.no_truncation()  # some checkpoints carry training settings that would cut a prompt silently
        backend.no_padding()
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else None
        self._to_bytes, self.leading_spaces = _read_decoder(decoder)
        marked = backend.encode("a", add_special_tokens=True)
        self._bos = marked.ids[: _leading_ones(marked.special_tokens_mask)]

    leading_spaces: int
    """Spaces that decoding drops at the start of a text (SentencePiece's dummy prefix): 0 or 1."""

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read `directory/tokenizer.json`. Raises DsoptError when it is missing, broken or unsupported."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise DsoptError(f"{directory} has no tokenizer.json; name a directory that `dsopt compile` wrote")
        return cls.from_bytes(path.read_bytes(), path)

    @classmethod
    def from_bytes(cls, data: bytes, where: Path) -> "Tokenizer":
        """Read the content of a tokenizer.json; `where` names it in errors, which are as those of `load`."""
        try:
            backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise DsoptError(f"{where} is not a readable tokenizer ({error})") from error
        try:
            return cls(backend)
        except DsoptError as error:
            raise DsoptError(f"{where}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model's logits may have more (padded) rows."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def tokens(self) -> dict[str, int]:
        """The id of every token, added ones included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`; nothing is put around it (see `add_bos`).

        With `special`, special tokens written out in the text become their ids, as a chat template's output
        needs; without, they are ordinary text. Raises DsoptError on lone surrogates.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise DsoptError(f"the text is not valid Unicode ({what}); give it as UTF-8") from error
        self._backend.encode_special_tokens = not special
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def add_bos(self, ids: Sequence[int]) -> list[int]:
        """`ids` behind what the tokenizer starts a plain text with (often nothing), if not there already."""
        present = list(ids[: len(self._bos)]) == self._bos
        return list(ids) if present else [*self._bos, *ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`, without special tokens unless asked; invalid UTF-8 becomes U+FFFD."""
        shown = (id for id in ids if not (skip_special and self.is_special(id)))
        data = b"".join(map(self.token_bytes, shown))
        return data[count_leading(data, self.leading_spaces) :].decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The exact bytes of one token; none for an id that only pads the vocabulary."""
        if added := self._added.get(id):
            return added.content.encode()
        token = self._backend.id_to_token(id)
        return b"" if token is None else self._to_bytes(token)

    def is_special(self, id: int) -> bool:
        """Whether the token is control, not text (an end of turn, a padding)."""
        added = self._added.get(id)
        return added is not None and added.special


def count_leading(data: bytes, limit: int) -> int:
    """How many spaces, `limit` at most, stand at the start of `data`."""
    return _leading_ones([byte == 0x20 for byte in data[:limit]])


def _leading_ones(mask: Sequence[int]) -> int:
    return next((i for i, one in enumerate(mask) if not one), len(mask))


def _read_decoder(decoder: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes], int]:
    """From a tokenizer.json `decoder`: token text -> bytes, and the spaces dropped at the start."""
    if decoder is None:
        raise DsoptError(f"the tokenizer has no decoder; supported: {_SUPPORTED}")
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse", "ByteFallback"}:
        return _byte_level, 0
    replaced: list[tuple[str, str]] = []
    spaces = 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replaced.append((old, new))
            case {"type": "Metaspace", "replacement": old}:
                replaced.append((old, " "))
                spaces += step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": start, "stop": 0} if "Fuse" in kinds:
                spaces += start
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                raise DsoptError(f"the tokenizer's decoder {step['type']} is not supported; supported: {_SUPPORTED}")
    fallback = "ByteFallback" in kinds
    return lambda token: _sentence_piece(token, replaced, fallback), spaces


def _sentence_piece(token: str, replaced: Sequence[tuple[str, str]], fallback: bool) -> bytes:
    for old, new in replaced:
        token = token.replace(old, new)
    if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return token.encode()
    return token.encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's reversible alphabet: printable bytes stand for themselves, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()  # a token that was never written in the alphabet
