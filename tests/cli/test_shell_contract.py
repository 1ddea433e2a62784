"""The contract with the shell, byte for byte, by real processes.

stdout   the answer, or JSON
stderr   progress (on a terminal), warnings, --stats
exit     0 done | 1 could not | 2 called wrongly | 130 interrupted | 141 reader gone
"""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from dsopt.cli.models import remember_last
from dsopt.runtime import load
from dsopt.runtime.model import Model

DSOPT = str(Path(sys.executable).with_name("dsopt"))
SECONDS = 60  # no test may hang


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact)


@pytest.fixture(autouse=True)
def named_model(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSOPT_MODEL", str(tiny_artifact))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture(scope="module")
def endless(compile_tiny: Callable[..., Path]) -> Path:
    """Room for 100000 tokens, and a prompt, ENDLESS, to which it has as much to say."""
    return compile_tiny("none", max_position_embeddings=100_000)


ENDLESS = ["naïve", "--raw", "-n", "-1"]


def dsopt(*arguments: str, **options: Any) -> tuple[int, bytes, bytes]:
    """Exit code, stdout, stderr of `dsopt generate ARGUMENTS`, without a terminal."""
    options = {"stdin": subprocess.DEVNULL} | options
    if "input" in options:
        del options["stdin"]
    done = subprocess.run([DSOPT, "generate", *arguments], capture_output=True, timeout=SECONDS, check=False, **options)
    return done.returncode, done.stdout, done.stderr


def shell(script: str, **options: Any) -> tuple[int, bytes, bytes]:
    done = subprocess.run(["sh", "-c", script, DSOPT], capture_output=True, timeout=SECONDS, check=False, **options)
    return done.returncode, done.stdout, done.stderr


def answer(model: Model, content: str, limit: int) -> bytes:
    tokens = model.prompt([{"role": "user", "content": content}])
    text = "".join(piece.text for piece in model.stream(tokens, limit=limit))
    return (text.removesuffix("\n") + "\n").encode()


def test_stdout_is_the_answer_and_nothing_else(model: Model) -> None:
    assert dsopt("hi", "-n", "30") == (0, answer(model, "hi", 30), b"")
    assert dsopt("-n", "30", input=b"hi\n") == (0, answer(model, "hi", 30), b"")


@pytest.mark.parametrize("environment", [{}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_text_is_utf8_in_any_locale(model: Model, environment: dict[str, str]) -> None:
    environment = {**os.environ, "LC_ALL": "C", "NO_COLOR": "1", **environment}
    expected = answer(model, "größer 猫", 30)
    assert not expected.isascii()
    assert dsopt("größer 猫".encode(), "-n", "30", env=environment) == (0, expected, b"")  # type: ignore[arg-type]
    assert dsopt("-n", "30", input="größer 猫".encode(), env=environment) == (0, expected, b"")


def test_closed_stdin_and_stderr(model: Model) -> None:
    assert shell('"$0" generate hi -n 9 <&-') == (0, answer(model, "hi", 9), b"")
    assert shell('"$0" generate hi -n 9 --stats 2>&-') == (0, answer(model, "hi", 9), b"")
    assert shell('"$0" generate - <&-')[0] == 2


NO_PROMPT = b"dsopt: no prompt; give PROMPT, -f FILE or --messages FILE, or pipe text in\n"
EMPTY = NO_PROMPT.replace(b"no prompt;", b"the prompt is empty;")


def test_no_prompt_never_waits() -> None:
    assert dsopt() == (2, b"", NO_PROMPT)
    assert dsopt(input=b"") == (2, b"", EMPTY)
    assert dsopt("") == (2, b"", EMPTY)


def test_bytes_that_are_no_text() -> None:
    told = b"not UTF-8 at byte 3 (0xff); convert it, as with iconv\n"
    assert dsopt(input=b"abc\xff") == (1, b"", b"dsopt: stdin: " + told)
    assert shell('"$0" generate "$(printf \'abc\\377\')"') == (1, b"", b"dsopt: PROMPT: " + told)


def test_100_kb_on_stdin(compile_tiny: Callable[..., Path], tokenizer_of_long_tokens: Tokenizer) -> None:
    code, out, err = dsopt(input=b"x" * 100_000)
    assert (code, out) == (1, b"")
    told = b"dsopt: the prompt has 100019 tokens and leaves no room for an answer in a context of 256; "
    assert err == told + b"shorten it\n"
    roomy = compile_tiny("none", tokenizer=tokenizer_of_long_tokens, max_position_embeddings=100_000)
    code, out, err = dsopt("-m", str(roomy), "-n", "1", "--json", input=b"x" * 100_000)
    assert (code, err) == (0, b"")
    assert json.loads(out)["stats"]["prompt_tokens"] == 100 + 19


@pytest.fixture
def tokenizer_of_long_tokens(tiny_artifact: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(tiny_artifact / "tokenizer.json"))
    tokenizer.add_tokens(["x" * 1000])
    return tokenizer


@pytest.mark.parametrize("form", [(), ("--jsonl",)])
def test_a_reader_who_leaves_ends_it_quietly(form: tuple[str, ...], endless: Path) -> None:
    command = [DSOPT, "generate", "-m", str(endless), *ENDLESS, *form]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert len(run.stdout.read(1)) == 1
        run.stdout.close()
        assert run.wait(SECONDS) == -signal.SIGPIPE
        assert run.stderr.read() == b""
    script = '{ "$0" generate hi --jsonl; echo $? >&2; } </dev/null | head -c 1'
    assert shell(script) == (0, b"{", b"141\n")


def test_a_full_disk_is_one_line() -> None:
    script = '"$0" generate hi -n 5 </dev/null >/dev/full'
    assert shell(script) == (1, b"", b"dsopt: cannot write to stdout (No space left on device)\n")


def interrupt(command: list[str]) -> tuple[int, bytes, bytes]:
    """Run until something has come, then as Ctrl-C does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(command, bufsize=0, **pipes) as run:
        assert run.stdout is not None
        head = run.stdout.read(1)
        run.send_signal(signal.SIGINT)
        tail, err = run.communicate(timeout=SECONDS)
    return run.returncode, head + tail, err


def test_an_interrupt_keeps_the_text_so_far(endless: Path) -> None:
    code, out, err = interrupt([DSOPT, "generate", "-m", str(endless), *ENDLESS, "--stats"])
    assert code == 130
    model = load(endless)
    text = "".join(piece.text for piece in model.stream(model.encode("naïve"), limit=500))
    assert out.endswith(b"\n")
    said = out.decode().removesuffix("\n").rstrip("\ufffd")  # a character may be cut off
    size = min(len(said), len(text.rstrip("\ufffd")))
    assert size > 0
    assert said[:size] == text[:size]
    assert err.startswith(b"prompt 6 tokens ")
    assert err.count(b"\n") == 1


def test_an_interrupt_is_told_in_json(endless: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = [DSOPT, "generate", "-m", str(endless), *ENDLESS, "--jsonl", "--save-state", str(state)]
    code, out, err = interrupt(command)
    assert (code, err) == (130, b"")
    *tokens, done = map(json.loads, out.splitlines())
    assert (done["event"], done["finish_reason"]) == ("done", "interrupt")
    assert done["stats"]["answer_tokens"] == len(tokens)

    resumed = dsopt("-m", str(endless), "--raw", "--load-state", str(state), "-n", "5", "--jsonl")
    model = load(endless)
    whole = [p.step.token for p in model.stream(model.encode("naïve"), limit=len(tokens) + 5)]
    ids = [token["id"] for token in [*tokens, *map(json.loads, resumed[1].splitlines()[:-1])]]
    assert ids == whole


def test_on_a_terminal_text_comes_at_once(endless: Path) -> None:
    screen, terminal = pty.openpty()
    command = [DSOPT, "generate", "-m", str(endless), *ENDLESS]
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE) as run:
        os.close(terminal)
        head = os.read(screen, 1)  # long before 8 kB have been made
        run.send_signal(signal.SIGINT)
        shown = head + read_all(screen)
        assert run.wait(SECONDS) == 130
    assert shown.endswith(b"\r\n")
    assert len(shown) < 8192


def test_on_a_terminal_no_prompt_is_no_dialogue() -> None:
    screen, terminal = pty.openpty()
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "1"}
    with subprocess.Popen(
        [DSOPT, "generate"], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    ) as run:
        os.close(terminal)
        assert read_all(screen) == NO_PROMPT.replace(b"\n", b"\r\n")
        assert run.wait(SECONDS) == 2


def read_all(screen: int) -> bytes:
    """Until the last process has closed the terminal, which Linux tells by an error."""
    data = b""
    try:
        while chunk := os.read(screen, 65536):
            data += chunk
    except OSError:
        pass
    os.close(screen)
    return data


def test_the_model_compiled_last(model: Model, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSOPT_MODEL")
    remember_last(tiny_artifact)
    assert dsopt("hi", "-n", "9") == (0, answer(model, "hi", 9), f"dsopt: using {tiny_artifact}\n".encode())


def test_wrong_models_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = "make one with: dsopt compile MODEL -o DIR\n"
    missing = f"dsopt: {tmp_path}/x: not a compiled model (no such directory); {advice}".encode()
    assert dsopt("hi", "-m", f"{tmp_path}/x") == (1, b"", missing)
    monkeypatch.setenv("DSOPT_MODEL", str(tmp_path))
    other = f"dsopt: {tmp_path}: not a compiled model (no dsopt.json in it); {advice}".encode()
    assert dsopt("hi") == (1, b"", other)


def test_wrong_calls_are_one_line() -> None:
    assert dsopt("hi", "--top-p", "3") == (
        2,
        b"",
        b"dsopt: --top-p is 3.0; it must be above 0 and at most 1 (off), such as 0.95\n",
    )
    code, out, err = dsopt("hi", "--nonsense")
    assert (code, out) == (2, b"")
    assert err.startswith(b"dsopt: ")
    assert err.count(b"\n") == 1
