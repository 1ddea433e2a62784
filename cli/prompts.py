"""Where a prompt comes from: the argument, a file, piped text, a list of messages, a saved conversation."""

import json
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsopt.runtime.errors import DsoptError, UsageError

if TYPE_CHECKING:
    from dsopt.runtime.model import Model
    from dsopt.runtime.state import State

STDIN = "-"
_WAYS = "give PROMPT, -f FILE or --messages FILE, or pipe text in"


@dataclass(frozen=True)
class PromptOptions:
    """What was said about the prompt. `resume`: a saved state is loaded, which needs no prompt to go on."""

    argument: str | None = None
    file: Path | None = None
    system: str | None = None
    messages: Path | None = None
    raw: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if self.raw and (self.system is not None or self.messages is not None):
            raise UsageError("--raw has no roles; it goes with neither --system nor --messages")
        if self.resume and self.system is not None and self.messages is None:
            raise UsageError("--system begins a conversation; it cannot change the one of --load-state")


@dataclass(frozen=True)
class Prompt:
    """The prompt as read. `text` None: go on with `messages` or with the saved answer, adding nothing."""

    text: str | None
    system: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    raw: bool = False

    def tokens(self, model: "Model", state: "State") -> list[int]:
        """The ids of the whole sequence, from `state` (empty at first) on. Brings its messages up to date."""
        if self.raw:
            state.messages = None
            return model.extend_text(state, self.text or "")
        if state.tokens and state.messages is None:
            raise UsageError("--load-state: the state holds raw text, no conversation; go on with --raw")
        if self.text is None and self.messages is None:
            return model.extend_text(state, "")
        state.messages = self._conversation(state.messages or [])
        return model.extend_chat(state, state.messages)

    def _conversation(self, saved: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        messages = list(saved if self.messages is None else self.messages)
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        if self.text is not None:
            add_text(messages, "user", self.text, separator="\n\n")
        return messages


def add_text(messages: list[Mapping[str, Any]], role: str, text: str, *, separator: str = "") -> None:
    """A new message, or more of the last one if it is of the same role: a question after its document, a
    continued answer."""
    if messages and messages[-1]["role"] == role:
        last = messages.pop()
        text = f"{last['content']}{separator}{text}"
    messages.append({"role": role, "content": text})


def read_prompt(options: PromptOptions) -> Prompt:
    """Read every source. Raises UsageError when there is no prompt, DsoptError when one cannot be read.

    Piped text, then the file, then the argument, with blank lines between. Stdin is read when asked for by
    `-`, else only where it is a pipe, a socket or a file: not a terminal, not /dev/null, not when closed.
    """
    messages = None if options.messages is None else read_messages(options.messages)
    system = None if options.system is None else _read_system(options.system)
    if system is not None and messages and messages[0]["role"] == "system":
        raise UsageError("--system: the messages begin with a system message already; leave one out")
    text = _read_text(options)
    if text is not None and not (text if options.raw else text.strip()):
        if messages is None and not options.resume:
            raise UsageError(f"the prompt is empty; {_WAYS}")
        text = None
    if text is None and messages is None and not options.resume:
        raise UsageError(f"no prompt; {_WAYS}")
    return Prompt(text, system, messages, options.raw)


def _read_text(options: PromptOptions) -> str | None:
    """None where no source was named or found, "" where there was nothing in them."""
    parts = []
    named = [str(path) for path in (options.file, options.messages) if path is not None]
    if options.argument == STDIN or (STDIN not in named and _is_piped()):
        parts.append(_read_file(STDIN))
    if options.file is not None:
        parts.append(_read_file(str(options.file)))
    if options.argument not in (None, STDIN):
        parts.append(_valid(str(options.argument), "PROMPT"))
    return "\n\n".join(part for part in parts if part) if parts else None


def _is_piped() -> bool:
    if sys.stdin is None:
        return False
    mode = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _read_file(name: str) -> str:
    """The text without its last line's end, which belongs to the file rather than to what it says."""
    text = _decode(_read_bytes(name), name)
    return text.removesuffix("\n").removesuffix("\r")


def _read_bytes(name: str) -> bytes:
    try:
        if name != STDIN:
            return Path(name).read_bytes()
        if sys.stdin is None:
            raise UsageError(f"stdin is closed; {_WAYS}")
        return sys.stdin.buffer.read()
    except OSError as error:
        raise DsoptError(f"{_label(name)}: cannot be read ({error.strerror})") from error


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start} (0x{data[error.start]:02x})"
        raise DsoptError(f"{_label(name)}: not UTF-8 at {where}; convert it, as with iconv") from error


def _label(name: str) -> str:
    return "stdin" if name == STDIN else name


def _valid(argument: str, name: str) -> str:
    """An argument as UTF-8: what the locale could not decode has come as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return _decode(os.fsencode(argument), name)
    return argument


def _read_system(text: str) -> str:
    return _read_file(text[1:]) if text.startswith("@") else _valid(text, "--system")


def read_messages(path: Path) -> tuple[Mapping[str, Any], ...]:
    """A JSON list of objects with `role` and `content`; other keys are passed on to the template."""
    name = str(path)
    try:
        raw = json.loads(_decode(_read_bytes(name), name))
    except (ValueError, RecursionError) as error:
        raise DsoptError(f"{_label(name)}: not JSON ({error})") from error
    if not isinstance(raw, list) or not raw:
        raise DsoptError(f'{_label(name)}: must be a list such as [{{"role": "user", "content": "Hi"}}]')
    for number, message in enumerate(raw, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DsoptError(f'{_label(name)}: message {number} must have "role" and "content", both text')
    return tuple(raw)
