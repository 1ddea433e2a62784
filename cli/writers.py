"""What generate prints: the answer as text, as one JSON object or as one a token; and the line of --stats."""

import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from dsopt.runtime.errors import DsoptError

if TYPE_CHECKING:
    from dsopt.runtime.model import Piece, Result
    from dsopt.runtime.speculate import Speculation
    from dsopt.runtime.tokenizer import Tokenizer


class Stdout:
    """Stdout in UTF-8 whatever the locale. A write that fails raises DsoptError; nothing is tried again."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise DsoptError("stdout is closed; redirect it to a file or to /dev/null")
        self._file: Any = sys.stdout
        if hasattr(self._file, "reconfigure"):
            self._file.reconfigure(encoding="utf-8", newline="\n")

    def write(self, text: str) -> None:
        """At once, in a pipe too: whoever reads sees tokens as they come, and a reader that is gone ends it."""
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            # What is still buffered would fail again when the interpreter ends; let it vanish.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            raise DsoptError(f"cannot write to stdout ({error.strerror})") from error


class Writer(Protocol):
    """Fed with the pieces of one answer, then with its record: finish_reason, stop, stats, seed."""

    def piece(self, piece: "Piece") -> None: ...

    def done(self, record: Mapping[str, Any]) -> None: ...


class TextWriter:
    """The answer, and a newline if it does not end in one. Every piece is seen at once."""

    def __init__(self, out: Stdout) -> None:
        self._out, self._last = out, "\n"

    def piece(self, piece: "Piece") -> None:
        if piece.text:
            self._last = piece.text[-1]
            self._out.write(piece.text)

    def done(self, record: Mapping[str, Any]) -> None:
        self._out.write("" if self._last == "\n" else "\n")


class JsonlWriter:
    """One object a token as it comes, and the record as the last one."""

    def __init__(self, out: Stdout, tokenizer: "Tokenizer") -> None:
        self._out, self._tokenizer = out, tokenizer

    def piece(self, piece: "Piece") -> None:
        self._line({"event": "token", **describe(piece, self._tokenizer)})

    def done(self, record: Mapping[str, Any]) -> None:
        self._line({"event": "done", **record})

    def _line(self, value: Mapping[str, Any]) -> None:
        self._out.write(_dump(value))


class JsonWriter:
    """One object at the end: the text and the record, with the tokens if log-probabilities were asked for."""

    def __init__(self, out: Stdout, tokenizer: "Tokenizer") -> None:
        self._out, self._tokenizer = out, tokenizer
        self._texts: list[str] = []
        self._tokens: list[dict[str, Any]] = []

    def piece(self, piece: "Piece") -> None:
        self._texts.append(piece.text)
        if piece.step.logprob is not None:
            self._tokens.append(describe(piece, self._tokenizer))

    def done(self, record: Mapping[str, Any]) -> None:
        tokens = {"tokens": self._tokens} if self._tokens else {}
        self._out.write(_dump({"text": "".join(self._texts), **record, **tokens}))


def describe(piece: "Piece", tokenizer: "Tokenizer") -> dict[str, Any]:
    """A token: `text` could be printed when it came, `bytes` is what it stands for, half a character too."""
    step = piece.step
    described: dict[str, Any] = {
        "id": step.token,
        "text": piece.text,
        "bytes": list(tokenizer.token_bytes(step.token)),
        "from_draft": step.from_draft,
    }
    if step.logprob is not None:
        described["logprob"] = step.logprob
        described["top_logprobs"] = [
            {"id": token, "bytes": list(tokenizer.token_bytes(token)), "logprob": value} for token, value in step.top
        ]
    return described


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def record_of(result: "Result", *, first_token: float | None, threads: int) -> dict[str, Any]:
    """The record of an answer. `first_token`: seconds from the start of the process, None without a token."""
    stats: dict[str, Any] = {
        "prompt_tokens": result.prompt_tokens,
        "cached_tokens": result.cached_tokens,
        "prompt_seconds": round(result.prompt_seconds, 6),
        "prompt_tokens_per_second": round(result.prompt_rate, 3),
        "first_token_seconds": None if first_token is None else round(first_token, 6),
        "answer_tokens": result.answer_tokens,
        "answer_seconds": round(result.answer_seconds, 6),
        "answer_tokens_per_second": round(result.answer_rate, 3),
        "threads": threads,
    }
    if result.speculation is not None:
        stats["speculation"] = speculation_record(result.speculation)
    return {"finish_reason": result.finish_reason, "stop": result.stop, "stats": stats, "seed": result.seed}


def speculation_record(speculation: "Speculation") -> dict[str, Any]:
    """What `--json` and `bench --spec` tell of speculation; seconds of wall time, shares of one."""
    tally = speculation.tally
    return {
        "draft": speculation.kind,
        "exact": bool(speculation.widths),
        "exact_cost": round(speculation.exact_cost, 4) if speculation.widths else None,
        "rounds": tally.rounds,
        "paused_rounds": tally.paused_rounds,
        "reads": speculation.scheduler.reader is not None,
        "read_tokens": tally.read_tokens,
        "reread_tokens": tally.reread_tokens,
        "started_after": tally.start_tokens if tally.starts else None,
        "proposed_tokens": tally.proposed,
        "accepted_tokens": tally.accepted,
        "accept_rate": _rounded(tally.accept_rate),
        "mean_accepted_length": _rounded(tally.mean_accepted_length),
        "accept_per_position": [round(share, 4) for share in tally.accept_per_position],
        "near_ties": tally.near_ties,
        "read_seconds": round(tally.read_seconds, 6),
        "draft_seconds": round(tally.draft_seconds, 6),
        "verify_seconds": round(tally.verify_seconds, 6),
        "overhead_seconds": round(tally.overhead_seconds, 6),
        "gain": _rounded(tally.gain),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def stats_line(record: Mapping[str, Any]) -> str:
    """Such as: prompt 12 tokens 0.08 s (150 tok/s), first token 0.35 s, answer 9 tokens 0.61 s (13 tok/s)."""
    stats = record["stats"]
    cached, first = stats["cached_tokens"], stats["first_token_seconds"]
    return ", ".join(
        [
            f"prompt {_measured('prompt', stats)}" + (f" after {cached} cached" if cached else ""),
            *([] if first is None else [f"first token {first:.2f} s"]),
            f"answer {_measured('answer', stats)}",
            *_speculated(stats.get("speculation")),
            f"seed {record['seed']}",
            f"threads {stats['threads']}",
        ]
    )


def _speculated(spec: Mapping[str, Any] | None) -> list[str]:
    """Such as: draft 824/1392 accepted (59 %), 5.1 tokens a round, at position .91 .78, ..., gain 1.63x"""
    if spec is None:
        return []
    parts = []
    if spec["proposed_tokens"]:
        positions = " ".join(f"{share:.2f}" for share in spec["accept_per_position"][:8])
        parts.append(
            f"draft {spec['accepted_tokens']}/{spec['proposed_tokens']} accepted ({100 * spec['accept_rate']:.0f} %), "
            f"{spec['mean_accepted_length']:.2f} tokens a round, at position {positions}"
        )
    elif spec["draft"] != "none":
        parts.append("draft 0/0 accepted")
    if spec["reads"]:
        parts.append(_reading(spec))
    if spec["reread_tokens"]:
        parts.append(f"{spec['reread_tokens']} cached tokens computed again for the drafter")
    if spec["paused_rounds"]:
        why = "" if spec["reads"] else ", where drafting loses"
        parts.append(f"left alone in {spec['paused_rounds']} of {spec['rounds']} rounds{why}")
    names = ("read", "draft", "verify", "overhead")[not spec["reads"] :]
    if seconds := sum(spec[f"{name}_seconds"] for name in names):
        shares = [f"{name} {100 * spec[f'{name}_seconds'] / seconds:.0f} %" for name in names]
        parts.append(" ".join(shares))
        parts.append(f"gain {spec['gain']:.2f}x")
    if spec["exact"]:
        parts.append(f"exact, which makes a step {100 * spec['exact_cost']:.0f} % slower")
    else:
        parts.append(f"near ties {spec['near_ties']}")
    return parts


def _reading(spec: Mapping[str, Any]) -> str:
    """Such as: drafter began after 31 tokens and read 64 in 0.05 s"""
    read = f"{spec['read_tokens']} in {spec['read_seconds']:.2f} s"
    if spec["started_after"] is None:
        return "drafter did not begin" + (f" but read {read}" if spec["read_tokens"] else "")
    return f"drafter began after {spec['started_after']} tokens and read {read}"


def _measured(what: str, stats: Mapping[str, Any]) -> str:
    count = stats[f"{what}_tokens"]
    rate = stats[f"{what}_tokens_per_second"]
    shown = f" ({rate:.3g} tok/s)" if rate else ""
    return f"{count} token{'s' * (count != 1)} {stats[f'{what}_seconds']:.2f} s{shown}"
