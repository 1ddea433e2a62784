"""Progress on stderr: a bar on a terminal, nothing elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str, *, count: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar fed with (done, total), bytes unless `count` is set; silent unless stderr is a terminal.

    A counting bar is drawn by the call that feeds it, never by a thread: what it counts may be on the clock.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    amount = MofNCompleteColumn() if count else DownloadColumn()
    columns = [TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn()]
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        auto_refresh=not count,
        redirect_stdout=False,  # else rich would take what is printed meanwhile to stderr, out of a pipe
        redirect_stderr=False,
    ) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total, refresh=count)


def note(text: str) -> None:
    """One line for a person at a terminal; pipelines stay silent."""
    if sys.stderr.isatty():
        print(f"dsopt: {text}", file=sys.stderr)
