"""The vocabulary of a GGUF file and the two kinds of tokenizer it can be meant for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from dsopt.runtime.errors import DsoptError

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre -> the patterns that cut the text, one after the other; None: digits, then GPT-2's words.
_PATTERNS: dict[str, tuple[str, ...] | None] = {
    # llama.cpp's own, for files that do not say; no model was trained with it.
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_WORDS % r"\p{N}{1,3}",),
    "qwen2": (_WORDS % r"\p{N}",),
    "refact": None,
    "smollm": None,
    "starcoder": None,
}


@dataclass(frozen=True)
class Vocabulary:
    """What `tokenizer.ggml.*` says. `roles`: ids by "bos", "eos", "unk", "pad"; `turn_ends`: more stops."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str]
    roles: Mapping[str, int]
    turn_ends: list[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    def token(self, role: str) -> str | None:
        """The text of a role's token."""
        return self.tokens[self.roles[role]] if role in self.roles else None

    def __post_init__(self) -> None:
        for name, entries, kind in (
            ("tokens", self.tokens, str),
            ("token_type", self.kinds, int),
            ("scores", self.scores, float),
            ("merges", self.merges, str),
        ):
            if not all(type(entry) is kind for entry in entries):
                raise DsoptError(f"the GGUF file's tokenizer.ggml.{name} is not a list of {kind.__name__} alone")
        count = len(self.tokens)
        if not count or len(set(self.tokens)) != count:
            raise DsoptError(f"the GGUF file's vocabulary is empty or has a token twice ({count} tokens)")
        if len(self.kinds) != count or (self.model == "llama" and len(self.scores) != count):
            raise DsoptError(f"the GGUF file's vocabulary has {count} tokens but not as many types or scores")
        for index in (*self.roles.values(), *self.turn_ends):
            if not 0 <= index < count:
                raise DsoptError(f"the GGUF file names the special token {index} of a vocabulary of {count}")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Vocabulary":
        """Read the metadata of a file. Raises DsoptError when a part is absent or of another type."""

        def get(key: str, kind: type, default: Any = None) -> Any:
            value = metadata.get(f"tokenizer.ggml.{key}", default)
            if type(value) is not kind:
                raise DsoptError(f"the GGUF file's tokenizer.ggml.{key} is absent or not a {kind.__name__}")
            return value

        model = get("model", str)
        pieces = model == "llama"
        defaults = {"bos": 1, "eos": 2, "unk": 0} if pieces else {}
        tokens = get("tokens", list)
        roles = {role: get(f"{key}_token_id", int, defaults.get(role, -1)) for role, key in _ROLES.items()}
        ends = [get(f"{key}_token_id", int, -1) for key in ("eot", "eom")]
        pre = get("pre", str, "default")
        return cls(
            model=model,
            pre=pre,
            tokens=tokens,
            kinds=get("token_type", list, [NORMAL] * len(tokens)),
            scores=get("scores", list, []),
            merges=get("merges", list, []),
            roles={role: index for role, index in roles.items() if index != -1},
            turn_ends=[index for index in ends if index != -1],
            add_bos=get("add_bos_token", bool, pieces or pre == "llama-bpe"),
            add_eos=get("add_eos_token", bool, False),
            add_space_prefix=get("add_space_prefix", bool, pieces),
        )


def byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """Byte-level BPE (GPT-2): every byte is a character of the vocabulary, merges come in their order."""
    tokenizer = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(vocabulary.tokens)},
            merges=[_split_merge(merge) for merge in vocabulary.merges],
            # Llama 3 takes a word that is a token whole, even where its merges lead elsewhere.
            ignore_merges=vocabulary.pre == "llama-bpe",
        )
    )
    if vocabulary.pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(vocabulary.pre, vocabulary.add_space_prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")  # a token is at least one character, which may be a space
    return merge[:1] + left, right


def _pre_tokenizer(pre: str, add_space_prefix: bool) -> PreTokenizer:
    if pre not in _PATTERNS:
        raise DsoptError(f"tokenizer.ggml.pre {pre!r} is not supported; supported: {', '.join(_PATTERNS)}")
    patterns = _PATTERNS[pre]
    if patterns is None:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=add_space_prefix)])
    cuts: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*cuts, ByteLevel(add_prefix_space=add_space_prefix, use_regex=False)])


def sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: the adjacent pair that makes the piece with the best score is merged first.

    Where nothing fits, a character falls back to its bytes, "<0x00>" to "<0xFF>".
    """
    pieces = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(
        BPE(
            vocab=pieces,
            merges=_merges_by_score(vocabulary),
            unk_token=vocabulary.token("unk"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend("▁")] if vocabulary.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first."""
    score = {
        token: value
        for token, value, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True)
        if kind == NORMAL
    }
    best_first = sorted(score, key=lambda token: -score[token])
    return [
        (piece[:cut], piece[cut:])
        for piece in best_first
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
