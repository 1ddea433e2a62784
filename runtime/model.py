"""A compiled model with all that text needs: session, tokenizer, chat template; the stream of an answer."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from dsopt.runtime import session as sessions
from dsopt.runtime.artifact import Artifact
from dsopt.runtime.decoder import Step, decode, ingest
from dsopt.runtime.detokenizer import Detokenizer
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.session import Session
from dsopt.runtime.speculate import Speculation, speculate
from dsopt.runtime.state import State
from dsopt.runtime.tally import Tally
from dsopt.runtime.tokenizer import Tokenizer

Message = Mapping[str, Any]
FinishReason = Literal["stop", "length", "interrupt"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of an answer. `text` can be printed now: "" while a character or stop string is half there."""

    step: Step
    text: str


@dataclass(frozen=True, slots=True)
class Result:
    """How an answer ended and what it took, in tokens and in seconds of wall time (the reader's left out)."""

    finish_reason: FinishReason  # an end token or a stop string | no room or tokens left | cancelled or abandoned
    stop: str | None  # the stop string that ended it
    context_full: bool  # "length" because the context is full, not because of the limit asked for
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the cache and not computed
    answer_tokens: int
    prompt_seconds: float  # until the first token was chosen
    answer_seconds: float  # from the first token to the last
    seed: int
    speculation: Speculation | None = None  # with what it counted; None for plain decoding

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens computed per second; 0 where an interrupt came before the end of the prompt."""
        unread = self.finish_reason == "interrupt" and self.answer_tokens == 0
        return 0.0 if unread else (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds

    @property
    def answer_rate(self) -> float:
        """Steps per second after the first token, which belongs to the prompt's time."""
        return (self.answer_tokens - 1) / self.answer_seconds if self.answer_tokens > 1 else 0.0


class Model:
    """Token ids below, text above. One model serves any number of sequences, one after the other."""

    def __init__(
        self, artifact: Artifact, *, threads: int | None = None, context: int | None = None, device: str = "cpu"
    ) -> None:
        self.artifact = artifact
        with ThreadPoolExecutor(1) as aside:  # the two halves of the start-up take about as long
            session = aside.submit(Session, artifact, threads=threads, context=context, device=device)
            self.tokenizer = Tokenizer.load(artifact.directory)
            from dsopt.runtime.template import render_chat  # jinja2, read while the session loads

            self._render_chat = render_chat
            self.session = session.result()
        self.end = frozenset(artifact.manifest.eos)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, ready for the assistant's turn. A message has `role` and `content`."""
        return self.tokenizer.encode(self._render(messages))

    def encode(self, text: str) -> list[int]:
        """The ids of raw text, behind the tokenizer's own start. It may spell out special tokens."""
        return self.tokenizer.add_bos(self.tokenizer.encode(text))

    def extend_chat(self, state: State, messages: Sequence[Message]) -> list[int]:
        """As `prompt`, for a conversation whose beginning `state` holds.

        The saved tokens stay as they are where the template, rendering all messages anew, begins with their
        text; else the whole is tokenized anew and the cache serves as far as both agree.
        """
        text, saved = self._render(messages), self.tokenizer.decode(state.tokens, skip_special=False)
        if text.startswith(saved):
            return [*state.tokens, *self.tokenizer.encode(text[len(saved) :])]
        return self.tokenizer.encode(text)

    def extend_text(self, state: State, text: str) -> list[int]:
        """The saved tokens, without a final end token, and those of `text` behind them."""
        tokens = list(state.tokens)
        if tokens and tokens[-1] in self.end:
            tokens.pop()
        return [*tokens, *self.tokenizer.encode(text)] if tokens else self.encode(text)

    def new_state(self) -> State:
        """An empty sequence."""
        return State(self.session.new_cache())

    def stream(
        self,
        tokens: Sequence[int],
        *,
        sampler: Sampler | None = None,
        limit: int | None = None,
        stop: Sequence[str] = (),
        top: int | None = None,
        state: State | None = None,
        speculation: Speculation | None = None,
    ) -> "Stream":
        """Answer the prompt `tokens`, greedily unless a sampler is given.

        At most `limit` tokens, or as many as the context holds; ends at an end token or a string of `stop`.
        With `top` = k each step has its log-probability and the k best. `state` is the sequence to go on
        from: what it shares with `tokens` is not computed again, and it takes up the answer. With `speculation`
        (`drafters.choice.open_speculation`) tokens are drafted and verified, several at once.
        Raises DsoptError when the prompt has a token the model does not know or leaves no room for an answer,
        before anything is computed.
        """
        room = self.session.context - len(tokens)
        if not tokens:
            raise DsoptError("the prompt has no tokens; give it some text")
        self._check_ids(tokens)
        if room < 0 or (room == 0 and limit != 0):
            raise DsoptError(
                f"the prompt has {len(tokens)} tokens and leaves no room for an answer in a context of "
                f"{self.session.context}; shorten it{self._larger_context()}"
            )
        state = self.new_state() if state is None else state
        detokenizer = Detokenizer(self.tokenizer, stop=stop)
        return Stream(self, state, tokens, sampler or Sampler(Sampling()), detokenizer, limit, top, speculation)

    def _check_ids(self, tokens: Sequence[int]) -> None:
        size = self.session.vocab_size
        unknown = next((token for token in tokens if not 0 <= token < size), None)
        if unknown is not None:
            raise DsoptError(
                f"the prompt has token {unknown}, the model's vocabulary has {size}: "
                "tokenizer and model do not belong together"
            )

    def _larger_context(self) -> str:
        most = self.artifact.manifest.model["context_length"]
        return f" or raise --ctx (at most {most})" if self.session.context < most else ""

    def _render(self, messages: Sequence[Message]) -> str:
        template = self.artifact.text("chat_template.jinja")
        if not template:  # an empty one would swallow the messages
            raise DsoptError(f"{self.artifact.directory}: this model has no chat template; use --raw")
        return self._render_chat(template, messages, variables=self._special_tokens())

    def _special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and the like, which templates write out."""
        config = json.loads(self.artifact.text("tokenizer_config.json") or "{}")
        named = {name: value for name, value in config.items() if name.endswith("_token")}
        texts = {name: v.get("content") if isinstance(v, dict) else v for name, v in named.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}


class Stream:
    """The pieces of an answer as they come, once. Stopping early, or an interrupt, leaves a valid state."""

    def __init__(
        self,
        model: Model,
        state: State,
        prompt: Sequence[int],
        sampler: Sampler,
        detokenizer: Detokenizer,
        limit: int | None,
        top: int | None,
        speculation: Speculation | None,
    ) -> None:
        room = model.session.context - len(prompt)
        self.state = state
        self._model, self._sampler, self._detokenizer, self._top = model, sampler, detokenizer, top
        self._limit = room if limit is None else min(limit, room)
        self._bounded_by_context = limit is None or room < limit
        self._prompt_tokens, self._cached = len(prompt), state.become(prompt)
        self._speculation = speculation and replace(speculation, tally=Tally())
        state.sampling = sampler.state()
        self._answered = 0
        self._prompt_seconds = self._answer_seconds = 0.0
        self._reason: FinishReason | None = None
        self._cancelled = False
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def cancel(self) -> None:
        """End the answer: after the token in the making, or between two chunks of a long prompt."""
        self._cancelled = True

    @property
    def result(self) -> Result:
        """How it went, so far."""
        reason = self._reason or "interrupt"
        return Result(
            finish_reason=reason,
            stop=self._detokenizer.stopped,
            context_full=reason == "length" and self._bounded_by_context,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached - (self._speculation.tally.reread_tokens if self._speculation else 0),
            answer_tokens=self._answered,
            prompt_seconds=self._prompt_seconds,
            answer_seconds=self._answer_seconds,
            seed=self._sampler.seed,
            speculation=self._speculation,
        )

    def _run(self) -> Iterator[Piece]:
        resumed = time.perf_counter()
        for step in self._steps():
            self._take(step)
            text = self._detokenizer.add(step.token)
            self._reason = self._why_end(step.token)
            if self._reason:
                text += self._detokenizer.finish()
            self._count_time(time.perf_counter() - resumed)
            yield Piece(step, text)
            if self._reason:
                return
            resumed = time.perf_counter()
        self._prompt_seconds = time.perf_counter() - resumed  # no token was wanted, or the prompt was interrupted
        self._reason = "interrupt" if self._cancelled else "length"

    def _steps(self) -> Iterator[Step]:
        state, session = self.state, self._model.session
        prompt = tuple(state.tokens)
        if self._speculation is not None:
            yield from self._speculated(prompt, self._speculation)
            return
        binding = session.bind(state.cache)
        # All chunks but the last here rather than in `decode`, so that cancelling need not wait for them.
        state.cache.reserve(len(prompt))
        chunk = binding.chunk or sessions.PREFILL_CHUNK
        while len(prompt) - state.cache.length > chunk and not self._cancelled:
            ingest(binding, prompt[state.cache.length :][:chunk])
        if not self._cancelled:
            yield from decode(
                binding, prompt, choose=self._sampler, limit=self._limit, end=self._model.end, top=self._top
            )

    def _speculated(self, prompt: Sequence[int], speculation: Speculation) -> Iterator[Step]:
        drafter = speculation.drafter
        return speculate(
            self._model.session.bind(self.state.cache, drafter.taps if drafter else ()),
            prompt,
            speculation,
            sampler=self._sampler,
            limit=self._limit,
            end=self._model.end,
            top=self._top,
            cancelled=lambda: self._cancelled,
        )

    def _take(self, step: Step) -> None:
        self.state.tokens.append(step.token)
        self.state.sampling = self._sampler.state()
        self._answered += 1

    def _why_end(self, token: int) -> FinishReason | None:
        if token in self._model.end or self._detokenizer.stopped is not None:
            return "stop"
        if self._cancelled:
            return "interrupt"
        return "length" if self._answered == self._limit else None

    def _count_time(self, seconds: float) -> None:
        if self._answered == 1:
            self._prompt_seconds = seconds
        else:
            self._answer_seconds += seconds
