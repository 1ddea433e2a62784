"""Token ids to text as they come: never half a character, never text that may become a stop string."""

import codecs
from collections.abc import Sequence

from dsopt.runtime.errors import UsageError
from dsopt.runtime.tokenizer import Tokenizer, count_leading


class Detokenizer:
    """All of `add(...)` and `finish()` joined is `tokenizer.decode(ids)`, up to the first stop string.

    Each token's bytes go through an incremental UTF-8 decoder, which holds back at most 3 bytes of an
    unfinished character; the cost of a token does not depend on how many came before.

    The text is read character by character and ends at the first stop string to be complete (of two that
    end at the same character, the longer), so the result does not depend on where tokens begin and end.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        """Raises UsageError on an empty stop string."""
        if "" in stop:
            raise UsageError("--stop is empty; give the text at which the answer should end")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._spaces = tokenizer.leading_spaces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped: str | None = None

    stopped: str | None
    """The stop string that ended the text: what stood before it was given out, nothing after it will be."""

    def add(self, token: int) -> str:
        """The text that is safe to print now, "" when all is held back."""
        if self._tokenizer.is_special(token):
            return ""
        return self._release(self._decoder.decode(self._strip(self._tokenizer.token_bytes(token))))

    def finish(self) -> str:
        """What was held back. An unfinished character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _strip(self, data: bytes) -> bytes:
        spaces = count_leading(data, self._spaces)
        # Once anything else has come, no later space is at the start.
        self._spaces = self._spaces - spaces if spaces == len(data) else 0
        return data[spaces:]

    def _release(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, safe, self.stopped = min(found)
            self._held = ""
            return text[:safe]
        safe = self._unsafe_from(text)
        self._held = text[safe:]
        return text[:safe]

    def _unsafe_from(self, text: str) -> int:
        """Where the longest ending of `text` begins that is the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return start
        return len(text)
