"""Going on from where a generation stopped, now or through a file, gives what one go would have given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dsopt.runtime import load, state
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.model import Model, Stream
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.state import State, check_replaceable, load_state, save_state


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact)


def ids(stream: Stream) -> list[int]:
    return [piece.step.token for piece in stream]


def through_file(model: Model, saved: State, path: Path) -> State:
    save_state(path, saved, model.artifact)
    return load_state(path, model.artifact, model.session.new_cache())


def test_cut_in_two_is_the_same_answer(model: Model, tmp_path: Path) -> None:
    prompt = model.encode("A")
    whole = ids(model.stream(prompt, limit=40))
    first = model.stream(prompt, limit=15)
    head = ids(first)
    loaded = through_file(model, first.state, tmp_path / "s")
    assert loaded.tokens == prompt + head
    assert loaded.cache.length == len(loaded.tokens) - 1
    second = model.stream(model.extend_text(loaded, ""), limit=25, state=loaded)
    assert head + ids(second) == whole
    assert second.result.cached_tokens == len(prompt) + 14


def test_sampling_goes_on_with_the_same_random_numbers(model: Model, tmp_path: Path) -> None:
    options, prompt = Sampling(temperature=1.0, seed=5), model.encode("A")
    whole = ids(model.stream(prompt, limit=30, sampler=Sampler(options)))
    first = model.stream(prompt, limit=10, sampler=Sampler(options))
    head = ids(first)
    loaded = through_file(model, first.state, tmp_path / "s")
    sampler = Sampler(Sampling(temperature=1.0, seed=99))
    assert loaded.sampling is not None
    sampler.restore(loaded.sampling)
    tail = model.stream(model.extend_text(loaded, ""), limit=20, sampler=sampler, state=loaded)
    assert head + ids(tail) == whole
    assert tail.result.seed == 5


def test_appended_text_is_one_prompt_in_two_parts(model: Model, tmp_path: Path) -> None:
    first = model.stream(model.encode("A"), limit=10)
    answer = ids(first)
    loaded = through_file(model, first.state, tmp_path / "s")
    tokens = model.extend_text(loaded, "more")
    assert tokens == [*model.encode("A"), *answer, *model.tokenizer.encode("more")]
    assert ids(model.stream(tokens, limit=20, state=loaded)) == ids(model.stream(tokens, limit=20))


def test_a_next_turn_keeps_every_saved_token(model: Model, tmp_path: Path) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is this?"}]
    first = model.stream(model.prompt(messages))
    text = "".join(piece.text for piece in first)
    assert first.result.finish_reason == "stop"
    assert "\ufffd" in text  # tokens that the text cannot give back: only the saved ones are right
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "and?"}]

    loaded = through_file(model, first.state, tmp_path / "s")
    tokens = model.extend_chat(loaded, messages)
    assert tokens[: len(first.state.tokens)] == first.state.tokens
    assert model.tokenizer.decode(tokens, skip_special=False).endswith(
        "<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    )
    second = model.stream(tokens, limit=20, state=loaded)
    assert ids(second) == ids(model.stream(tokens, limit=20))
    assert second.result.cached_tokens == len(first.state.tokens) - 1


def test_another_history_is_computed_from_where_it_differs(model: Model, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "ab"}]
    first = model.stream(model.prompt(messages), limit=8)
    list(first)
    loaded = through_file(model, first.state, tmp_path / "s")
    other = [*messages, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "and?"}]
    tokens = model.extend_chat(loaded, other)
    assert tokens == model.prompt(other)
    second = model.stream(tokens, limit=20, state=loaded)
    assert ids(second) == ids(model.stream(tokens, limit=20))
    assert second.result.cached_tokens == len(model.prompt(messages))


def test_a_state_in_memory_serves_turn_after_turn(model: Model) -> None:
    one = model.new_state()
    for prompt in ([1, 2, 3, 4], [1, 2, 3, 4, 9, 9], [1, 2], [7]):
        assert ids(model.stream(prompt, limit=9, state=one)) == ids(model.stream(prompt, limit=9))


def test_an_end_token_is_not_continued(model: Model) -> None:
    stream = model.stream(model.prompt([{"role": "user", "content": "ab"}]))
    answer = ids(stream)
    assert model.extend_text(stream.state, "")[-1] == answer[-2]
    again = model.stream(model.extend_text(stream.state, ""), state=stream.state)
    assert ids(again) == answer[-1:]


def test_messages_survive(model: Model, tmp_path: Path) -> None:
    stream = model.stream([1, 2], limit=1)
    list(stream)
    stream.state.messages = [{"role": "user", "content": "naïve 🙂"}]
    assert through_file(model, stream.state, tmp_path / "s").messages == stream.state.messages


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    stream = model.stream(model.encode("Hello"), limit=3)
    list(stream)
    save_state(tmp_path / "saved", stream.state, model.artifact)
    return tmp_path / "saved"


def test_another_model_is_refused(saved: Path, compile_tiny: Callable[..., Path]) -> None:
    other = load(compile_tiny("none", seed=1))
    with pytest.raises(DsoptError, match=r"saved with another model \(checkpoint none\)"):
        load_state(saved, other.artifact, other.session.new_cache())


def test_a_longer_state_than_the_context_is_refused(saved: Path, tiny_artifact: Path) -> None:
    small = load(tiny_artifact, context=4)
    with pytest.raises(DsoptError, match="7 positions are needed, 4 fit"):
        load_state(saved, small.artifact, small.session.new_cache())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "no saved state, or cut short"),
        (lambda data: data[:100], "no saved state, or cut short"),
        (lambda data: b"", "no saved state, or cut short"),
        (lambda data: b"some other file, quite long", "no saved state, or cut short"),
        (lambda data: data.replace(b"dsopt-state", b"other-state"), "no saved state of this dsopt"),
    ],
)
def test_files_that_are_no_state(model: Model, saved: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(DsoptError, match=message):
        load_state(saved, model.artifact, model.session.new_cache())
    with pytest.raises(DsoptError, match="exists and is no saved state"):
        check_replaceable(saved)


def test_paths_that_cannot_be(model: Model, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DsoptError, match="nowhere: the state cannot be read"):
        load_state(tmp_path / "nowhere", model.artifact, model.session.new_cache())
    with pytest.raises(DsoptError, match="exists and is no saved state"):
        check_replaceable(tmp_path)
    for place in (tmp_path / "no" / "such", saved):
        with pytest.raises(DsoptError, match=r"new: the state cannot be written \(.*\); choose another"):
            check_replaceable(place / "new")
    before = sorted(tmp_path.rglob("*"))
    check_replaceable(saved)
    check_replaceable(tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(DsoptError, match="cannot be written"):
        save_state(tmp_path / "no" / "new", model.new_state(), model.artifact)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": np.array([[1, 2]])},
        {"tokens": np.array([1.0, 2.0])},
        {"tokens": np.array([1, 2, 3, 4, 5, 6, 7, 320])},
        {"tokens": np.array([1, -2, 3, 4, 5, 6, 7, 8])},
        {"tokens": np.array([1, 2])},
        {"kv.0.key": np.zeros((1, 7, 16), np.int64)},
        {"messages": "{}"},
        {"messages": '["hi"]'},
        {"messages": '[{"role": "user"}]'},
        {"messages": "[" * 100_000},
        {"sampling": "[]"},
        {"sampling": '{"seed": 1, "generator": {}}'},
        {"sampling": '{"seed": 1, "generator": {"bit_generator": "PCG64", "state": {"state": -1, "inc": 1}}}'},
    ],
)
def test_a_damaged_state_is_one_line(model: Model, saved: Path, damage: dict[str, Any]) -> None:
    with safe_open(saved, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name, value in damage.items():
        (metadata if name in metadata else tensors)[name] = value
    save_file(tensors, saved, metadata)
    with pytest.raises(DsoptError, match="saved: damaged state") as caught:
        load_state(saved, model.artifact, model.session.new_cache())
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file(model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(path: Path, data: bytes, *, parents: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "write_atomically", full)
    with pytest.raises(DsoptError, match=r"cannot be written \(No space left on device\)"):
        save_state(saved, model.new_state(), model.artifact)
    assert saved.read_bytes() == before
