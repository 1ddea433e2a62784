"""Text above token ids: prompts, the stream of pieces and how it ends."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from dsopt.runtime import load
from dsopt.runtime import session as sessions
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.model import Model, Stream
from dsopt.runtime.sampling import Sampler, Sampling

USER = [{"role": "user", "content": "hi"}]
EOS = 257


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact)


def ids(stream: Stream) -> list[int]:
    return [piece.step.token for piece in stream]


def test_the_front_door_is_light() -> None:
    code = (
        "import sys; from dsopt.runtime import load; import dsopt.cli.main;"
        "heavy = {'onnxruntime', 'numpy', 'torch', 'tokenizers', 'jinja2', 'rich'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_generating_needs_no_compiler(tiny_artifact: Path) -> None:
    code = (
        "import sys; from dsopt.runtime import load;"
        "model = load(sys.argv[1]); prompt = model.prompt([{'role': 'user', 'content': 'x'}]);"
        "list(model.stream(prompt, limit=1));"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'transformers', 'rich', 'dsopt.compiler'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code, tiny_artifact], check=False).returncode == 0


def test_a_prompt_is_the_rendered_template(model: Model) -> None:
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    tokens = model.prompt(USER)
    assert model.tokenizer.decode(tokens, skip_special=False) == text
    assert tokens[0] == 256  # the mark as one token
    assert model.encode("hi") == tokens[6:8]


def test_pieces_join_to_the_decoded_answer(model: Model) -> None:
    stream = model.stream(model.prompt(USER))
    pieces = list(stream)
    tokens = [piece.step.token for piece in pieces]
    assert tokens[-1] == EOS
    assert "".join(piece.text for piece in pieces) == model.tokenizer.decode(tokens)
    result = stream.result
    assert (result.finish_reason, result.stop, result.context_full) == ("stop", None, False)
    assert (result.prompt_tokens, result.cached_tokens, result.answer_tokens) == (21, 0, len(tokens))
    assert result.prompt_seconds > 0
    assert result.answer_rate == pytest.approx((len(tokens) - 1) / result.answer_seconds)


def test_the_limit_cuts_and_nothing_is_held_back(model: Model) -> None:
    prompt = model.prompt(USER)
    for limit in range(1, 12):  # some of these end within a character
        stream = model.stream(prompt, limit=limit)
        pieces = list(stream)
        assert "".join(p.text for p in pieces) == model.tokenizer.decode([p.step.token for p in pieces])
        assert (stream.result.finish_reason, stream.result.answer_tokens) == ("length", limit)
        assert not stream.result.context_full


def test_a_stop_string_ends_the_answer_before_it(model: Model) -> None:
    prompt = model.prompt(USER)
    text = "".join(piece.text for piece in model.stream(prompt, limit=30))
    stop = text[5:8]
    stream = model.stream(prompt, limit=30, stop=[stop])
    assert "".join(piece.text for piece in stream) == text[: text.index(stop)]
    assert (stream.result.finish_reason, stream.result.stop) == ("stop", stop)


def test_half_a_stop_string_is_given_out_at_the_end(model: Model) -> None:
    prompt = model.prompt(USER)
    text = "".join(piece.text for piece in model.stream(prompt, limit=5))
    stream = model.stream(prompt, limit=5, stop=[text[-1] + "never"])
    assert "".join(piece.text for piece in stream) == text
    assert stream.result.finish_reason == "length"


def test_a_full_context_is_told_from_a_limit(tiny_artifact: Path, model: Model) -> None:
    prompt = model.prompt(USER)
    small = load(tiny_artifact, context=len(prompt) + 6)
    stream = small.stream(prompt)
    assert ids(stream) == ids(model.stream(prompt, limit=6))
    assert (stream.result.finish_reason, stream.result.context_full) == ("length", True)
    exact = small.stream(prompt, limit=6)
    assert len(ids(exact)) == 6
    assert not exact.result.context_full


def test_a_prompt_without_room_for_an_answer_is_refused(tiny_artifact: Path) -> None:
    small = load(tiny_artifact, context=20)
    message = "21 tokens and leaves no room for an answer in a context of 20; shorten it or raise --ctx"
    with pytest.raises(DsoptError, match=message):
        small.stream(small.prompt(USER))
    with pytest.raises(DsoptError, match="no room"):
        small.stream(list(range(20)))
    assert ids(small.stream(list(range(20)), limit=0)) == []  # reading needs no room
    with pytest.raises(DsoptError, match="no tokens"):
        small.stream([])


def test_cancelling_ends_with_the_next_token(model: Model) -> None:
    prompt = model.prompt(USER)
    stream = model.stream(prompt)
    pieces = list(islice(stream, 4))
    stream.cancel()
    pieces += stream
    tokens = [piece.step.token for piece in pieces]
    assert tokens == ids(model.stream(prompt, limit=5))
    assert "".join(piece.text for piece in pieces) == model.tokenizer.decode(tokens)
    assert stream.result.finish_reason == "interrupt"


def test_cancelling_need_not_wait_for_a_long_prompt(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "PREFILL_CHUNK", 8)
    prompt = np.random.default_rng(0).integers(0, 256, 50).tolist()
    expected = ids(model.stream(prompt, limit=5))
    stream = model.stream(prompt, limit=5)
    stream.cancel()
    assert ids(stream) == []
    assert (stream.result.finish_reason, stream.result.answer_tokens) == ("interrupt", 0)
    assert stream.result.prompt_rate == 0  # hardly any of the prompt was read
    again = model.stream(prompt, limit=5, state=stream.state)
    assert ids(again) == expected


def test_an_abandoned_stream_counts_as_interrupted(model: Model) -> None:
    stream = model.stream(model.prompt(USER))
    list(islice(stream, 3))
    assert (stream.result.finish_reason, stream.result.answer_tokens) == ("interrupt", 3)


def test_a_seed_gives_the_same_answer_again(model: Model) -> None:
    def answer(seed: int | None) -> tuple[list[int], int]:
        stream = model.stream(model.encode("A"), limit=20, sampler=Sampler(Sampling(1.0, seed=seed)))
        return ids(stream), stream.result.seed

    tokens, seed = answer(None)
    assert answer(seed) == (tokens, seed)
    assert answer(seed + 1)[0] != tokens


@pytest.mark.parametrize("token", [-1, 320])
def test_a_token_outside_the_vocabulary_is_refused(model: Model, token: int) -> None:
    message = f"the prompt has token {token}, the model's vocabulary has 320: tokenizer and model"
    with pytest.raises(DsoptError, match=message):
        model.stream([1, token])
    assert len(ids(model.stream([0, 319], limit=1))) == 1


def test_more_threads_than_processors_are_refused(tiny_artifact: Path) -> None:
    processors = os.cpu_count() or 1
    with pytest.raises(UsageError, match=f"--threads is {processors + 1}; this machine has {processors} processors"):
        load(tiny_artifact, threads=processors + 1)


@pytest.mark.parametrize("template", [None, ""])
def test_a_model_without_a_template_says_so(
    model: Model, template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.artifact), "text", lambda self, name: template)
    with pytest.raises(DsoptError, match="no chat template; use --raw"):
        model.prompt(USER)


def test_loading_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(DsoptError, match="not a compiled model"):
        load(tmp_path / "nowhere")
