"""dsopt generate, in this process: what it makes of its options, against the library."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsopt.cli.main import app
from dsopt.runtime import load
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.model import Model
from dsopt.runtime.sampling import Sampler, Sampling


class Printed(NamedTuple):
    out: str
    err: str


Generate = Callable[..., Printed]


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact)


@pytest.fixture
def generate(
    tiny_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Generate:
    """`generate("hi", "-n", 5, stdin=b"...")`: what it prints; without stdin, /dev/null."""
    monkeypatch.setenv("DSOPT_MODEL", str(tiny_artifact))

    def run(*options: object, stdin: bytes | None = None) -> Printed:
        source = Path(os.devnull) if stdin is None else tmp_path / "stdin"
        if stdin is not None:
            source.write_bytes(stdin)
        with source.open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            app(["generate", *map(str, options)], standalone_mode=False)
        return Printed(*capfd.readouterr())

    return run


def answer(model: Model, content: str, *, system: str | None = None, **options: Any) -> str:
    """By the library; one newline at the end, as the command prints it."""
    first = [] if system is None else [{"role": "system", "content": system}]
    tokens = model.prompt([*first, {"role": "user", "content": content}])
    text = "".join(piece.text for piece in model.stream(tokens, **options))
    return text if text.endswith("\n") else text + "\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["hi"], None, "hi"),
        (["-"], b"piped\n", "piped"),
        ([], b"piped\n", "piped"),
        ([], b"two\nlines\n\n", "two\nlines\n"),
        ([], b"dos\r\n", "dos"),
        (["question"], b"document\n", "document\n\nquestion"),
        (["question"], b"", "question"),
        ([""], b"document", "document"),
        (["-f", "FILE"], None, "from a file"),
        (["-f", "FILE", "question"], b"document", "document\n\nfrom a file\n\nquestion"),
        (["-f", "-", "question"], b"document", "document\n\nquestion"),
        ([], "größer 猫 🙂".encode(), "größer 猫 🙂"),
    ],
)
def test_where_prompts_come_from(
    generate: Generate, model: Model, tmp_path: Path, arguments: list[str], stdin: bytes | None, prompt: str
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file\n")
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    assert generate(*arguments, "-n", 9, stdin=stdin) == (answer(model, prompt, limit=9), "")


@pytest.mark.parametrize("arguments", [[""], ["  \n"], ["-"], []])
@pytest.mark.parametrize("stdin", [None, b"", b"\n"])
def test_no_prompt_is_a_wrong_call(generate: Generate, arguments: list[str], stdin: bytes | None) -> None:
    with pytest.raises(UsageError, match="prompt"):
        generate(*arguments, stdin=stdin)


def test_system_messages(generate: Generate, model: Model, tmp_path: Path) -> None:
    expected = answer(model, "hi", system="Be brief.", limit=9)
    file = tmp_path / "system.txt"
    file.write_text("Be brief.\n")
    assert generate("hi", "--system", "Be brief.", "-n", 9).out == expected
    assert generate("hi", "--system", f"@{file}", "-n", 9).out == expected

    chat = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
    assert generate("--messages", "-", "-n", 9, stdin=chat.encode()).out == expected
    followed = generate("--messages", "-", "x", "-n", 9, stdin=chat.encode())
    assert followed.out == answer(model, "hi\n\nx", system="Be brief.", limit=9)


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "{}", "[]", '["hi"]', '[{"role": "user"}]', '[{"role": "user", "content": [1]}]']
)
def test_broken_messages(generate: Generate, text: str) -> None:
    with pytest.raises(DsoptError, match=r"^stdin: "):
        generate("--messages", "-", stdin=text.encode())


def test_raw_text_has_no_template(generate: Generate, model: Model) -> None:
    text = "".join(piece.text for piece in model.stream(model.encode("A"), limit=12))
    assert generate("A", "--raw", "-n", 12).out == text + "\n"


def test_sampling_options_arrive(generate: Generate, model: Model) -> None:
    sampling = Sampling(0.9, 40, 0.95, 0.01, 1.2, 16, seed=7)
    options = "--temp 0.9 --top-k 40 --top-p 0.95 --min-p 0.01 --repeat-penalty 1.2 --repeat-last-n 16 --seed 7"
    printed = generate("hi", "-n", 30, *options.split())
    assert printed.out == answer(model, "hi", limit=30, sampler=Sampler(sampling))


def test_limits(generate: Generate, model: Model) -> None:
    whole = "".join(piece.text for piece in model.stream(model.encode("A")))
    full = "dsopt: the context of 256 tokens is full; the answer ends here\n"
    assert generate("A", "--raw", "-n", -1) == (whole + "\n", full)
    assert generate("A", "--raw") == (whole + "\n", full)  # 512 by default, more than fit
    assert generate("A", "--raw", "-n", 255) == (whole + "\n", "")
    assert generate("A", "--raw", "-n", 0) == ("", "")
    assert generate("A", "--raw", "-n", -1, "--stop", "no such text", "--stop", whole[9:11]).out == (
        whole[: whole.index(whole[9:11])] + "\n"
    )


def test_jsonl_has_every_token_and_the_record(generate: Generate, model: Model) -> None:
    pieces = list(model.stream(model.prompt([{"role": "user", "content": "hi"}]), limit=20, top=2))
    *tokens, done = map(json.loads, generate("hi", "-n", 20, "--jsonl", "--logprobs", 2).out.splitlines())
    assert [token["id"] for token in tokens] == [piece.step.token for piece in pieces]
    assert [token["text"] for token in tokens] == [piece.text for piece in pieces]
    for token, piece in zip(tokens, pieces, strict=True):
        assert token["event"] == "token"
        assert bytes(token["bytes"]) == model.tokenizer.token_bytes(token["id"])
        assert token["logprob"] == pytest.approx(piece.step.logprob, abs=1e-5)
        assert [top["id"] for top in token["top_logprobs"]] == [id for id, _ in piece.step.top]
    assert (done["event"], done["finish_reason"], done["stop"]) == ("done", "length", None)
    assert isinstance(done["seed"], int)
    assert (done["stats"]["prompt_tokens"], done["stats"]["answer_tokens"]) == (21, 20)

    plain = json.loads(generate("hi", "-n", 1, "--jsonl").out.splitlines()[0])
    assert set(plain) == {"event", "id", "text", "bytes", "from_draft"}


def test_json_is_one_object(generate: Generate, model: Model) -> None:
    text = answer(model, "hi").removesuffix("\n")
    printed = json.loads(generate("hi", "--json", "--seed", 3).out)
    assert (printed["text"], printed["finish_reason"], printed["seed"]) == (text, "stop", 3)
    assert "tokens" not in printed
    tokens = json.loads(generate("hi", "--json", "--logprobs", 0).out)["tokens"]
    assert "".join(token["text"] for token in tokens) == text
    assert all(token["top_logprobs"] == [] and token["logprob"] < 0 for token in tokens)


def test_the_line_of_stats(generate: Generate) -> None:
    printed = generate("hi", "-n", 20, "--stats", "--seed", 5)
    assert re.fullmatch(
        r"prompt 21 tokens \d+\.\d\d s \([\d.e+]+ tok/s\), first token \d+\.\d\d s, "
        r"answer 20 tokens \d+\.\d\d s \([\d.e+]+ tok/s\), seed 5, threads \d+\n",
        printed.err,
    )


def test_a_conversation_goes_on_from_its_state(generate: Generate, model: Model, tmp_path: Path) -> None:
    state = tmp_path / "state"
    generate("What is this?", "--save-state", state)
    second = json.loads(generate("And that?", "-n", 12, "--load-state", state, "--save-state", state, "--json").out)
    tokens = model.prompt([{"role": "user", "content": "What is this?"}])
    tokens += [piece.step.token for piece in model.stream(tokens)]
    known = len(tokens) - 1
    tokens += model.tokenizer.encode("\n<|im_start|>user\nAnd that?<|im_end|>\n<|im_start|>assistant\n")
    in_one_go = list(model.stream(tokens, limit=30))
    assert second["text"] == "".join(piece.text for piece in model.stream(tokens, limit=12))
    assert second["stats"]["cached_tokens"] == known

    # Without a prompt the answer goes on where it was cut.
    rest = generate("-n", 18, "--load-state", state, "--jsonl").out.splitlines()[:-1]
    assert [json.loads(line)["id"] for line in rest] == [piece.step.token for piece in in_one_go[12:]]


def test_a_question_after_its_document(generate: Generate, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert generate("-n", 0, "--save-state", state, stdin=b"A long document.") == ("", "")
    resumed = json.loads(generate("Why?", "-n", 9, "--load-state", state, "--json").out)
    fresh = json.loads(generate("Why?", "-n", 9, "--json", stdin=b"A long document.").out)
    assert resumed["text"] == fresh["text"]
    assert resumed["stats"]["cached_tokens"] > 20


def test_raw_text_goes_on_from_its_state(generate: Generate, tmp_path: Path, model: Model) -> None:
    state = tmp_path / "state"
    generate("A", "--raw", "-n", 10, "--save-state", state)
    printed = generate(" B", "--raw", "-n", 10, "--load-state", state).out
    tokens = model.encode("A")
    tokens += [piece.step.token for piece in model.stream(tokens, limit=10)]
    tokens += model.tokenizer.encode(" B")
    assert printed.removesuffix("\n") == "".join(p.text for p in model.stream(tokens, limit=10))
    with pytest.raises(UsageError, match="holds raw text"):
        generate("hi", "--load-state", state)


def test_the_seed_of_a_state_unless_another_is_given(generate: Generate, tmp_path: Path) -> None:
    state = tmp_path / "state"
    generate("A", "--raw", "-n", 5, "--temp", 1, "--seed", 11, "--save-state", state)
    assert json.loads(generate("--raw", "-n", 1, "--load-state", state, "--json").out)["seed"] == 11
    given = generate("--raw", "-n", 1, "--load-state", state, "--json", "--seed", 4)
    assert json.loads(given.out)["seed"] == 4


def test_a_foreign_file_is_never_replaced(generate: Generate, tmp_path: Path) -> None:
    file = tmp_path / "thesis.txt"
    file.write_text("years of work")
    with pytest.raises(DsoptError, match="exists and is no saved state"):
        generate("hi", "--save-state", file)
    assert file.read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--json --jsonl", "give one of them"),
        ("--logprobs 2", "--logprobs needs"),
        ("--raw --system x", "--raw has no roles"),
        ("--raw --messages x", "--raw has no roles"),
        ("--load-state x --system y", "--system begins a conversation"),
        ("--stop=", "--stop is empty"),
        ("--temp -1", "--temp is -1"),
        ("--device tpu", "--device is tpu"),
    ],
)
def test_wrong_calls(generate: Generate, options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate("hi", *options.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device cuda", "compiled for the CPU; compile it with --target cuda"),
        ("--ctx 1000", "at most 256"),
        ("--ctx 10", "21 tokens and leaves no room"),
        ("-f /nowhere", "/nowhere: cannot be read"),
        ("--system @/nowhere", "/nowhere: cannot be read"),
        ("--load-state /nowhere", "/nowhere: the state cannot be read"),
        ("--save-state /nowhere/state", r"/nowhere/state: .*; choose another --save-state"),
        ("--threads 99999", "this machine has"),
        ("-m /nowhere", "not a compiled model"),
    ],
)
def test_what_cannot_be_done(generate: Generate, options: str, message: str) -> None:
    with pytest.raises(DsoptError, match=message):
        generate("hi", *options.split())
