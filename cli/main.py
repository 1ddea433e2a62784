"""The entry point: the commands, and the one place where errors become exit codes.

0 done | 1 could not | 2 called wrongly | 130 interrupted | 141 reader gone
"""

import os
import signal
import sys

# An interrupt while modules are still being imported ends the process quietly; main() restores Python's handler.
signal.signal(signal.SIGINT, signal.SIG_DFL)

import typer  # noqa: E402

from dsopt.cli import bench, compare, compile, generate, show  # noqa: E402
from dsopt.runtime.errors import DsoptError  # noqa: E402

app = typer.Typer(
    help="Compile language models to optimized ONNX and stream text from them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile")(compile.compile_command)
app.command("generate")(generate.generate_command)
app.command("bench")(bench.bench_command)
app.command("compare")(compare.compare_command)
app.command("inspect")(show.inspect_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"dsopt {version('dsopt')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Options of dsopt itself."""


def main() -> None:
    """Run the command line. A traceback instead of the one-line message: DSOPT_TRACE=1."""
    _open_missing_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `dsopt ... | head -1` ends quietly, as any filter
    try:
        code = app(standalone_mode=False, prog_name="dsopt")
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except (DsoptError, typer.TyperException, OSError) as error:
        if os.environ.get("DSOPT_TRACE"):
            raise
        code = getattr(error, "exit_code", 1)
        print(f"dsopt: {_one_line(error)}", file=sys.stderr)
    sys.exit(code or 0)


def _open_missing_streams() -> None:
    """Closed by the shell (`>&-`), a stream is None, and what is printed to it would land on stdout."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123


def _one_line(error: Exception) -> str:
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    return " ".join(text.split())
