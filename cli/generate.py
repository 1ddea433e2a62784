"""dsopt generate: a prompt in, a streamed answer out."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsopt.cli.models import find_artifact
from dsopt.cli.progress import note
from dsopt.cli.prompts import PromptOptions, add_text, read_prompt
from dsopt.cli.writers import JsonlWriter, JsonWriter, Stdout, TextWriter, Writer, record_of, stats_line
from dsopt.runtime.errors import UsageError

if TYPE_CHECKING:
    from dsopt.runtime.model import Model, Stream
    from dsopt.runtime.sampling import Sampler, Sampling
    from dsopt.runtime.state import State

_IMPORTED = time.perf_counter()
UNLIMITED = -1


@dataclass(frozen=True)
class Output:
    """How the answer is ended, shown and kept."""

    stop: tuple[str, ...]
    json: bool
    jsonl: bool
    logprobs: int | None
    stats: bool
    save_state: Path | None

    def __post_init__(self) -> None:
        if self.json and self.jsonl:
            raise UsageError("--json is one object, --jsonl one a token; give one of them")
        if self.logprobs is not None and not (self.json or self.jsonl):
            raise UsageError("--logprobs needs --json or --jsonl to stand in")
        if "" in self.stop:
            raise UsageError("--stop is empty; give the text at which the answer should end")

    def writer(self, out: Stdout, model: "Model") -> Writer:
        if self.jsonl:
            return JsonlWriter(out, model.tokenizer)
        return JsonWriter(out, model.tokenizer) if self.json else TextWriter(out)


def generate_command(
    prompt: Annotated[str | None, typer.Argument(help='The prompt; "-" is stdin. Piped text stands before it.')] = None,
    model: Annotated[
        Path | None,
        typer.Option("-m", "--model", help="Compiled model. [default: $DSOPT_MODEL, else the one compiled last]"),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Read the prompt from FILE; PROMPT follows it.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message: text, or @FILE.", metavar="TEXT|@FILE")] = None,
    messages: Annotated[
        Path | None, typer.Option(help='JSON list of {"role", "content"} to begin with; "-" is stdin.')
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    max_tokens: Annotated[
        int,
        typer.Option(
            "-n",
            "--max-tokens",
            min=UNLIMITED,
            help="Tokens to answer; -1: until the context is full, 0: read only.",
        ),
    ] = 512,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    temp: Annotated[float, typer.Option(help="Temperature; 0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the K most probable tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the fewest tokens of this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens under this share of the best one.")] = 0.0,
    repeat_penalty: Annotated[float, typer.Option(help="Make recent tokens less probable; 1 is off.")] = 1.0,
    repeat_last_n: Annotated[int, typer.Option(help="How many tokens are recent; -1 is all.")] = 64,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers. [default: random]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text and stats.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON object a token, then the stats.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(min=0, metavar="K", help="With JSON: log-probabilities, and the K best.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print counts and speed on stderr.")] = False,
    save_state: Annotated[
        Path | None, typer.Option(help="Write tokens, cache and random numbers, to go on later.")
    ] = None,
    load_state: Annotated[
        Path | None, typer.Option(help="Go on from a saved state, PROMPT being the next turn.")
    ] = None,
    draft: Annotated[
        str,
        typer.Option(
            metavar="none|ngram|auto|DIR",
            help="Guess tokens ahead and verify several at once: from the text (ngram), by a compiled model (DIR).",
        ),
    ] = "none",
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="The same text with any --draft, bit for bit. [default: with a drafter, where it costs under 5 %]",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads. [default: all physical cores]")
    ] = None,
    ctx: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Positions at most. [default: the model's]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Answer PROMPT on stdout.

    Piped text, FILE and PROMPT are joined in this order, with blank lines between.
    """
    from dsopt.runtime.devices import check_device
    from dsopt.runtime.sampling import Sampling

    check_device(device)
    sampling = Sampling(temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed)
    output = Output(tuple(stop or ()), json, jsonl, logprobs, stats, save_state)
    said = read_prompt(PromptOptions(prompt, file, system, messages, raw, resume=load_state is not None))
    if save_state is not None:
        from dsopt.runtime.state import check_replaceable

        check_replaceable(save_state)
    out = Stdout()
    opened = _open_model(model, threads, ctx, device)
    state, sampler = _begin(opened, load_state, sampling)
    from dsopt.runtime.drafters.choice import open_speculation

    speculation = open_speculation(opened, draft, exact=exact, sampling=sampling, measuring=note_measuring)
    stream = opened.stream(
        said.tokens(opened, state),
        sampler=sampler,
        limit=None if max_tokens == UNLIMITED else max_tokens,
        stop=output.stop,
        top=logprobs,
        state=state,
        speculation=speculation,
    )
    _answer(opened, stream, output, out)


def note_measuring() -> None:
    """Tell a person at a terminal why nothing happens for two seconds."""
    note("measuring what verification costs on this machine, once")


def _open_model(directory: Path | None, threads: int | None, context: int | None, device: str) -> "Model":
    artifact = find_artifact(directory)
    from dsopt.runtime.devices import choose_device
    from dsopt.runtime.model import Model

    chosen = choose_device(device, artifact.manifest, warn)
    return Model(artifact, threads=threads, context=context, device=chosen)


def _begin(model: "Model", saved: Path | None, sampling: "Sampling") -> tuple["State", "Sampler"]:
    """The saved sequence and its random numbers, which --seed overrides; else an empty one."""
    from dsopt.runtime.sampling import Sampler
    from dsopt.runtime.state import load_state

    state = model.new_state() if saved is None else load_state(saved, model.artifact, model.session.new_cache())
    sampler = Sampler(sampling)
    if state.sampling is not None and sampling.seed is None:
        sampler.restore(state.sampling)
    return state, sampler


def _answer(model: "Model", stream: "Stream", output: Output, out: Stdout) -> None:
    """Print, report and save. An interrupt ends the answer in good order, with exit code 130."""
    writer = output.writer(out, model)
    first_token: float | None = None
    texts = []
    with _cancelled_by_interrupt(stream):
        for piece in stream:
            first_token = first_token or process_seconds()
            writer.piece(piece)
            texts.append(piece.text)
    result = stream.result
    record = record_of(result, first_token=first_token, threads=model.session.threads)
    writer.done(record)
    if result.context_full:
        warn(f"dsopt: the context of {model.session.context} tokens is full; the answer ends here")
    if output.stats:
        warn(stats_line(record))
    if output.save_state is not None:
        _save(model, stream.state, "".join(texts), output.save_state)
    if result.finish_reason == "interrupt":
        raise typer.Exit(130)


def _save(model: "Model", state: "State", answer: str, path: Path) -> None:
    from dsopt.runtime.state import save_state

    if state.messages is not None and answer:
        add_text(state.messages, "assistant", answer)
    save_state(path, state, model.artifact)


@contextmanager
def _cancelled_by_interrupt(stream: "Stream") -> Iterator[None]:
    """The first Ctrl-C ends the answer with the next token, whole in output and state; a second one kills."""

    def cancel(number: int, frame: object) -> None:
        stream.cancel()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # a background job of a script: the shell wants it to live on
        yield
        return
    signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def warn(line: str) -> None:
    """A line on stderr, if there is one: `print` would take None for stdout."""
    if sys.stderr is not None:
        print(line, file=sys.stderr)


def process_seconds() -> float:
    """The age of this process: the interpreter's start included where the system tells it."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.perf_counter() - _IMPORTED
