"""dsopt compare: what a compiled model lost, against the model it was made from or another version of it."""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsopt.cli import report
from dsopt.cli.progress import note, progress_bar
from dsopt.runtime.artifact import MANIFEST, open_artifact
from dsopt.runtime.errors import DsoptError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dsopt.compiler.checkpoint import Checkpoint
    from dsopt.runtime.quality import Scorer
    from dsopt.runtime.tokenizer import Tokenizer

_LONGEST_TOKEN = 16  # characters a token takes at most on average: so much of a long text is enough


def compare_command(
    base: Annotated[str, typer.Argument(help="What to compare with: a compiled model or a checkpoint.")],
    new: Annotated[str, typer.Argument(help="What to judge: the same kinds.")],
    text: Annotated[Path, typer.Option("-f", "--text", help="UTF-8 text to predict.")],
    chunks: Annotated[
        int | None, typer.Option(help="Windows of the text at most. [default: all]", show_default=False)
    ] = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx", help="Tokens in a window.")] = 512,
    threads: Annotated[
        int | None,
        typer.Option("-t", "--threads", help="Threads. [default: physical cores]", show_default=False),
    ] = None,
    by_bytes: Annotated[
        bool, typer.Option("--bytes", help="Compare text, not tokens: for models with different vocabularies.")
    ] = False,
    output: Annotated[Literal["md", "json"], typer.Option("-o", "--output", help="Form of the output.")] = "md",
) -> None:
    """Print llama-perplexity's quantities: perplexity, KL divergence, right token, same top token.

    The text, tokenized without special tokens, is cut into windows of --ctx tokens from its start. Both
    models predict the second half of each: tokens ctx/2 to ctx-1, from all those before them in the window.
    A checkpoint is run in float32 by PyTorch. With --bytes each model splits the text of BASE's windows in its own
    way; bits a byte and the perplexity ratio by token of BASE are printed.
    """
    _check(chunks, ctx, threads)
    models = _open(base), _open(new)
    windows = _windows(*models, text, ctx, chunks, by_bytes=by_bytes)
    summary = (_compare_texts if by_bytes else _compare)(models, windows, threads)
    setting = {"base": base, "new": new, "text": str(text), "ctx": ctx, "chunks": len(windows)}
    setting["scored"] = f"tokens {ctx // 2} to {ctx - 1} of each, counted from 0"
    if output == "json":
        print(report.json_text({**setting, **summary}))
    else:
        print("\n".join(_markdown(setting, summary)))


def _compare(
    models: tuple["_Model", "_Model"], windows: "list[NDArray[np.int64]]", threads: int | None
) -> dict[str, float]:
    from dsopt.runtime.quality import compare_models

    base, new = (model.load(threads) for model in models)
    done, total = itertools.count(1), len(windows)
    with progress_bar("comparing", count=True) as progress:
        progress(0, total)
        return compare_models(base, new, windows, lambda: progress(next(done), total)).summary()


def _compare_texts(
    models: tuple["_Model", "_Model"], windows: "list[NDArray[np.int64]]", threads: int | None
) -> dict[str, float]:
    from dsopt.runtime.quality import TextModel, compare_texts

    base = models[0].tokenizer
    halves = [[base.decode(part.tolist(), skip_special=False) for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :])]
              for ids in windows]  # fmt: skip
    # A window may begin or end inside a character; its text is then not that of its tokens.
    pieces = [(context, scored) for context, scored in halves if "\ufffd" not in context + scored]
    if not pieces:
        raise DsoptError("no window of the text is whole characters; choose another --ctx")
    texts = [TextModel(lambda text, m=m: m.tokenizer.encode(text, special=False), m.load(threads)) for m in models]  # type: ignore[misc]
    done, total = itertools.count(1), len(pieces)
    with progress_bar("comparing", count=True) as progress:
        progress(0, total)
        return compare_texts(texts[0], texts[1], pieces, lambda: progress(next(done), total))


def _check(chunks: int | None, ctx: int, threads: int | None) -> None:
    if chunks is not None and chunks < 1:
        raise UsageError(f"--chunks is {chunks}; 1 or more")
    if ctx < 4:
        raise UsageError(f"--ctx is {ctx}; 4 or more")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}; 1 or more")
    if threads is not None:
        from dsopt.runtime.session import check_threads  # ONNX Runtime: a wrong call need not wait for it

        check_threads(threads)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DsoptError(f"{path} could not be read ({error.strerror}); --text names a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise DsoptError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error


@dataclass(frozen=True)
class _Model:
    """One of the two; its weights are read by `load`, when all else is known to fit."""

    name: str
    vocab_size: int
    context: int
    tokenizer: "Tokenizer"
    load: "Callable[[int | None], Scorer]"


def _open(name: str) -> _Model:
    path = Path(name).expanduser()
    return _open_compiled(name, path) if (path / MANIFEST).is_file() else _open_checkpoint(name)


def _open_compiled(name: str, path: Path) -> _Model:
    from dsopt.runtime.devices import choose_device
    from dsopt.runtime.quality import session_scorer
    from dsopt.runtime.session import Session
    from dsopt.runtime.tokenizer import Tokenizer

    artifact = open_artifact(path)
    sizes = artifact.manifest.model
    device = choose_device("auto", artifact.manifest, lambda line: print(line, file=sys.stderr))
    return _Model(
        name,
        sizes["vocab_size"],
        sizes["context_length"],
        Tokenizer.load(path),
        lambda threads: session_scorer(Session(artifact, threads=threads, device=device)),
    )


def _open_checkpoint(name: str) -> _Model:
    from dsopt.compiler.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(name, progress=note)
    from dsopt.compiler.reference import Reference, read_config  # torch: slow to import

    config = read_config(checkpoint)

    def load(threads: int | None) -> "Scorer":
        with progress_bar(f"reading {checkpoint.source.name}") as progress:
            return Reference(checkpoint, progress, threads)

    return _Model(name, config.vocab_size, config.max_position_embeddings, _tokenizer(name, checkpoint), load)


def _tokenizer(name: str, checkpoint: "Checkpoint") -> "Tokenizer":
    import tokenizers

    from dsopt.runtime.tokenizer import Tokenizer

    try:
        return Tokenizer(tokenizers.Tokenizer.from_buffer(checkpoint.files["tokenizer.json"]))
    except DsoptError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DsoptError(f"{name}: tokenizer.json is not a readable tokenizer ({error})") from error


def _windows(
    base: _Model, new: _Model, text: Path, ctx: int, chunks: int | None, *, by_bytes: bool
) -> "list[NDArray[np.int64]]":
    """The text in windows of `ctx` ids. Raises DsoptError where the models cannot both be asked."""
    from dsopt.runtime.quality import cut_windows

    if base.vocab_size != new.vocab_size and not by_bytes:
        raise DsoptError(
            f"the vocabularies differ: {base.name} has {base.vocab_size} tokens, {new.name} has "
            f"{new.vocab_size}; compare versions of one model, or text with --bytes"
        )
    for model in (base, new):
        if ctx > model.context:
            raise DsoptError(f"--ctx is {ctx}; {model.name} has at most {model.context} positions")
    content = _read(text)
    if chunks is not None:
        content = content[: _LONGEST_TOKEN * ctx * chunks]
    ids = base.tokenizer.encode(content, special=False)
    if not by_bytes and ids != new.tokenizer.encode(content, special=False):
        raise DsoptError(
            f"{base.name} and {new.name} split the text into different tokens; compare versions of one model"
        )
    windows = cut_windows(ids, ctx, chunks)
    if not windows:
        raise DsoptError(
            f"{text} has {len(ids)} tokens, less than one window of {ctx}; a longer text or a smaller --ctx"
        )
    return windows


def _markdown(setting: "dict[str, Any]", summary: dict[str, float]) -> Iterator[str]:
    yield f"base: {setting['base']}"
    yield f"new: {setting['new']}"
    yield f"text: {setting['text']}, {setting['chunks']} windows of {setting['ctx']} tokens"
    yield f"scored: {setting['scored']}"
    yield ""
    columns = [report.Column("quantity", 17, right=False), report.Column("value", 13), report.Column("±", 12)]
    rows = (
        [
            name,
            _number(value, name),
            _number(summary[f"{name}_err"], name) if f"{name}_err" in summary else "",
        ]
        for name, value in summary.items()
        if not name.endswith("_err")
    )
    yield from report.markdown(columns, rows)


def _number(value: float, name: str) -> str:
    if isinstance(value, int):
        return str(value)
    percent = " %" if name.startswith(("dp_", "same_top", "ppl_correlation")) else ""
    return (f"{value:.6f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.3e}") + percent
