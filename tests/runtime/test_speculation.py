"""Speculation on real graphs: tiny random models as target and as drafter, the verify curve, exact mode."""

import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import pytest
from toy import Forced

from dsopt.runtime import curve as curves
from dsopt.runtime import load
from dsopt.runtime.curve import measure_curve, verify_curve
from dsopt.runtime.drafters.choice import open_drafter, open_speculation
from dsopt.runtime.drafters.model import ModelDrafter
from dsopt.runtime.drafters.ngram import NgramDrafter
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import cache_dir
from dsopt.runtime.model import Model
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.session import Session
from dsopt.runtime.speculate import Speculation
from dsopt.runtime.state import load_state, save_state

GREEDY = Sampling()
PROMPTS = ["A", "naïve", "a b c a b c a b", "the cat the cat the"]


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact)


@pytest.fixture(scope="module")
def other(compile_tiny: Callable[..., Path]) -> Model:
    """Another random model with the same tokens, and half the context."""
    return load(compile_tiny("none", seed=1, max_position_embeddings=128))


def tokens(model: Model, prompt: str, speculation: Speculation | None = None, limit: int = 60, **options: float):
    sampler = Sampler(Sampling(**{"seed": 7, **options}))  # type: ignore[arg-type]
    stream = model.stream(model.encode(prompt), limit=limit, sampler=sampler, speculation=speculation)
    return [piece.step.token for piece in stream], stream.result


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [{}, {"repeat_penalty": 1.2}, {"temperature": 0.8}])
def test_copied_drafts_change_no_token(model: Model, prompt: str, options: dict[str, float]) -> None:
    speculation = Speculation(NgramDrafter(), Forced())
    assert tokens(model, prompt, speculation, **options)[0] == tokens(model, prompt, **options)[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_drafter_like_the_target_is_always_right(model: Model, prompt: str) -> None:
    drafter = ModelDrafter(model, model.session.vocab_size, GREEDY)
    drafter._confidence.acceptance.share = lambda key, guess: 1.0  # type: ignore[method-assign]
    got, result = tokens(model, prompt, Speculation(drafter, Forced()))
    assert got == tokens(model, prompt)[0]
    tally = result.speculation.tally
    assert tally.accept_rate == 1
    assert tally.mean_accepted_length > 3


def test_another_model_drafts_and_keeps_nothing_of_what_was_rejected(model: Model, other: Model) -> None:
    drafter = ModelDrafter(other, model.session.vocab_size, GREEDY)
    drafter._confidence.acceptance.share = lambda key, guess: 1.0  # type: ignore[method-assign]
    text = tokens(model, "A", limit=100)[0]
    for drafted in (1, 4, 3, 7):
        drafter.begin()
        for start in range(0, 40, 5):
            drafter.accept(text[start : start + 5], None)
            got = drafter.draft(text[start + 5], drafted).tokens
            fresh = tokens_after(other, text[: start + 6], drafted)
            assert list(got) == fresh


def tokens_after(model: Model, text: list[int], count: int) -> list[int]:
    stream = model.stream(text, limit=count)
    return [piece.step.token for piece in stream]


def test_it_may_read_ahead_in_pieces_and_leave_out_what_is_far(model: Model, other: Model) -> None:
    drafter = ModelDrafter(other, model.session.vocab_size, GREEDY)
    drafter._confidence.acceptance.share = lambda key, guess: 1.0  # type: ignore[method-assign]
    text = tokens(model, "A", limit=100)[0]
    drafter.accept(text[:50], None)
    for piece, unread in ((20, 30), (7, 23), (40, 0)):
        drafter.read(piece)
        assert drafter.unread == unread
    runs: list[int] = []
    run = drafter._binding.run
    drafter._binding.run = lambda ids, *rest: runs.append(len(ids)) or run(ids, *rest)  # type: ignore[assignment,func-returns-value]
    assert list(drafter.draft(text[50], 4).tokens) == tokens_after(other, text[:51], 4)
    assert runs == [1, 1, 1, 1]

    drafter.accept(text[50:80], None)
    assert drafter.unread <= 30
    drafter.leave_out(drafter.unread - 12)
    assert drafter.unread == 12  # what attention leans on is there already
    drafter.read(10)
    assert list(drafter.draft(text[80], 4).tokens) == tokens_after(other, [*text[:4], *text[68:81]], 4)
    drafter.accept(text[80:85], None)
    assert list(drafter.draft(text[85], 4).tokens) == tokens_after(other, [*text[:4], *text[68:86]], 4)

    drafter.begin()
    drafter.accept([1, other.session.vocab_size, 2], None)
    assert (drafter.unread, drafter.silent) == (0, True)  # it never will draft here


def test_a_drafter_whose_context_is_full_has_no_idea(model: Model, other: Model) -> None:
    drafter = ModelDrafter(other, model.session.vocab_size, GREEDY)
    drafter._confidence.acceptance.share = lambda key, guess: 1.0  # type: ignore[method-assign]
    drafter.accept(list(range(125)), None)
    assert len(drafter.draft(1, 10).tokens) == 3  # positions 126, 127, 128
    drafter.accept([1, 2, 3], None)
    assert drafter.draft(4, 10).tokens == ()
    assert (drafter.unread, drafter.silent) == (0, True)
    got, _ = tokens(model, "A", Speculation(drafter, Forced()), limit=200)
    assert got == tokens(model, "A", limit=200)[0]


def test_drawn_drafts_come_with_what_they_were_drawn_from(model: Model, other: Model) -> None:
    drafter = ModelDrafter(other, model.session.vocab_size + 5, Sampling(temperature=1.0, top_k=4, seed=3))
    drafter._confidence.acceptance.share = lambda key, guess: 1.0  # type: ignore[method-assign]
    drafter.accept([65, 66], None)
    draft = drafter.draft(67, 5)
    assert draft.distributions is not None
    assert draft.distributions.shape == (5, model.session.vocab_size + 5)
    np.testing.assert_allclose(draft.distributions.sum(1), 1)
    assert ((draft.distributions > 0).sum(1) == 4).all()
    assert all(q[token] > 0 for q, token in zip(draft.distributions, draft.tokens, strict=True))


def test_a_sampled_answer_with_a_sampling_drafter_ends_well(model: Model, other: Model) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    speculation = Speculation(ModelDrafter(other, model.session.vocab_size, sampling), Forced())
    got, result = tokens(model, "A", speculation, temperature=1.0)
    assert len(got) == 60
    assert result.finish_reason == "length"


def test_a_stop_string_and_a_saved_state_within_a_block(model: Model, tmp_path: Path) -> None:
    prompt = model.encode("A")
    whole = [piece.step.token for piece in model.stream(prompt, limit=60)]
    for cut in range(1, 12):
        speculation = Speculation(ModelDrafter(model, model.session.vocab_size, GREEDY), Forced(cut))
        stream = model.stream(prompt, limit=60, speculation=speculation)
        head = [piece.step.token for piece in islice(stream, cut)]
        save_state(tmp_path / "s", stream.state, model.artifact)  # while the block is half given out
        state = load_state(tmp_path / "s", model.artifact, model.session.new_cache())
        again = Speculation(NgramDrafter(), Forced(cut))
        rest = model.stream(model.extend_text(state, ""), limit=60 - cut, state=state, speculation=again)
        assert head + [piece.step.token for piece in rest] == whole
        assert rest.result.cached_tokens == len(prompt) + cut - 1

    text = "".join(piece.text for piece in model.stream(prompt, limit=60))
    speculation = Speculation(ModelDrafter(model, model.session.vocab_size, GREEDY), Forced(2))
    stream = model.stream(prompt, limit=60, stop=[text[9:12]], speculation=speculation)
    assert "".join(piece.text for piece in stream) == text[: text.index(text[9:12])]
    assert stream.result.finish_reason == "stop"


def test_cancelling_ends_with_the_next_token_of_the_block(model: Model) -> None:
    prompt = model.encode("A")
    speculation = Speculation(ModelDrafter(model, model.session.vocab_size, GREEDY), Forced(1))
    stream = model.stream(prompt, speculation=speculation)
    head = list(islice(stream, 6))
    stream.cancel()
    assert len(head + list(stream)) == 7
    assert stream.result.finish_reason == "interrupt"
    assert stream.state.cache.length <= len(stream.state.tokens)


def test_the_curve_is_measured_once_for_a_model_a_machine_and_its_threads(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    first = verify_curve(model.session, lambda: measured.append(1))
    assert verify_curve(model.session, lambda: measured.append(2)) == first
    assert measured == [1]
    (path,) = (cache_dir() / "curves").iterdir()
    for damage in (b"{", b"[]", json.dumps({"widths": [1]}).encode(), path.read_bytes().replace(b"[1,", b"[2,")):
        path.write_bytes(damage)
        verify_curve(model.session, lambda: measured.append(3))
    assert measured == [1, 3, 3, 3, 3]
    for name, value, call in (("threads", 99, 4), ("device", "elsewhere", 5)):
        with monkeypatch.context() as patch:
            patch.setattr(model.session, name, value)
            patch.setattr("dsopt.runtime.curve.measure_curve", lambda session: first)
            verify_curve(model.session, lambda call=call: measured.append(call))
        assert measured[-1] == call


def test_costs_and_experience_of_a_drafter_are_kept(model: Model, other: Model) -> None:
    measured = []

    def opened() -> Speculation:
        speculation = open_speculation(model, str(other.artifact.directory), measuring=lambda: measured.append(1))
        assert speculation is not None
        return speculation

    got, result = tokens(model, "a b c a b c a b", opened(), limit=200)
    assert got == tokens(model, "a b c a b c a b", limit=200)[0]
    assert result.speculation.scheduler.reader is not None
    assert len(measured) == 2
    opened()
    assert len(measured) == 2
    (curve,), (experience,) = ((cache_dir() / name).iterdir() for name in ("draft-curves", "experience"))
    assert json.loads(curve.read_bytes())["pieces"] == [16, 64]
    assert json.loads(experience.read_bytes())["answered"] == len(got)
    curve.write_bytes(b'{"counts": [1]}')
    experience.write_bytes(b"[NaN]")
    again = opened().scheduler.reader
    assert again is not None
    assert len(measured) == 3
    assert (again.experience.answered, again.experience.path) == (0, experience)
    tokens(model, "A", opened(), limit=5)
    assert len(list(experience.parent.iterdir())) == 1
    sampled = open_speculation(model, str(other.artifact.directory), sampling=Sampling(temperature=1.0))
    assert sampled is not None
    tokens(model, "A", sampled, limit=5, temperature=1.0)
    assert len(list(experience.parent.iterdir())) == 2


def test_a_tight_context_changes_neither_curve_nor_tokens(model: Model) -> None:
    verify_curve(model.session)
    (path,) = (cache_dir() / "curves").iterdir()
    before = path.read_bytes()
    path.unlink()
    tight = load(model.artifact.directory, context=3)
    got, result = tokens(tight, "A", open_speculation(tight, "ngram", exact=True))
    assert got == tokens(model, "A", limit=2)[0]
    assert result.context_full
    assert json.loads(path.read_bytes())["widths"] == json.loads(before)["widths"]


def test_the_curve_is_of_what_runs_take(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of n rows behind d tokens take 10 + n + n d / 1000 by this clock, and sometimes a lot more."""
    now, runs = 0.0, 0
    run = curves.Binding.run

    def timed(self: curves.Binding, ids: np.ndarray, rows: int = 1, keep: int | None = None) -> np.ndarray:
        nonlocal now, runs
        runs += 1
        now += 10 + len(ids) + len(ids) * self.cache.length / 1000 + 50 * (runs % 5 == 0)
        return run(self, ids, rows, keep)

    monkeypatch.setattr(curves.Binding, "run", timed)
    monkeypatch.setattr(curves.time, "perf_counter", lambda: now)
    measured = measure_curve(model.session, budget=1e9)
    assert measured.widths[0] == 1
    for width in (1, 2, 7, 16, 40):
        for depth in (64, 100, 1000):
            assert measured.seconds(width, depth) == pytest.approx(10 + width + width * depth / 1000, rel=1e-6)


def test_drafters_are_named_or_refused(model: Model, compile_tiny: Callable[..., Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    assert open_drafter("none", model, GREEDY) is None
    assert isinstance(open_drafter("ngram", model, GREEDY), NgramDrafter)
    assert isinstance(open_drafter("auto", model, GREEDY), NgramDrafter)
    assert isinstance(open_drafter(str(model.artifact.directory), model, GREEDY), ModelDrafter)
    with pytest.raises(DsoptError, match="--draft is what; it must be none, ngram, auto or the directory"):
        open_drafter("what", model, GREEDY)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    strange = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    from tokenizers import decoders

    strange.decoder = decoders.ByteLevel()
    foreign = compile_tiny("none", tokenizer=strange)
    with pytest.raises(DsoptError, match="its tokens are not those of") as caught:
        open_drafter(str(foreign), model, GREEDY)
    assert "\n" not in str(caught.value)


def test_auto_takes_what_was_compiled_with_the_model(compile_tiny: Callable[..., Path]) -> None:
    target, draft = compile_tiny("none"), compile_tiny("int8")
    shutil.copytree(draft, target / "draft-self")
    manifest = json.loads((target / "dsopt.json").read_text())
    (target / "dsopt.json").write_text(json.dumps({**manifest, "drafters": ["draft-self"]}))
    model = load(target)
    drafter = open_drafter("auto", model, GREEDY)
    assert [type(part) for part in drafter._drafters] == [NgramDrafter, ModelDrafter]
    got, result = tokens(model, "A", Speculation(drafter, Forced()))
    assert got == tokens(model, "A")[0]
    assert result.speculation.tally.accepted > 0


@pytest.fixture(scope="module")
def tapped(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny model with the input of its second attention norm's sum as `tap.0`: the output of layer 0."""
    folder = tmp_path_factory.mktemp("tapped") / "artifact"
    shutil.copytree(tiny_artifact, folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    sums = [node for node in graph.graph.node if node.op_type == "SkipSimplifiedLayerNormalization"]
    graph.graph.node.append(onnx.helper.make_node("Identity", [sums[1].output[3]], ["tap.0"]))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("tap.0", 1, ["batch", "sequence", 32]))
    data = graph.SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    manifest = json.loads((folder / "dsopt.json").read_text())
    manifest["files"]["model.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "dsopt.json").write_text(json.dumps(manifest))
    return load(folder)


@pytest.mark.parametrize("widths", [(), (2, 4, 8)])
def test_a_drafter_with_taps_sees_the_hidden_states_of_every_token(
    tapped: Model, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsopt.runtime.session.PREFILL_CHUNK", 16)

    class Seeing(NgramDrafter):
        taps = (0,)

        def begin(self) -> None:
            super().begin()
            self.seen: list[tuple[list[int], np.ndarray]] = []

        def accept(self, tokens: list[int], hidden: np.ndarray) -> None:
            super().accept(tokens, hidden)
            assert hidden.shape == (len(tokens), 1, 32)
            self.seen.append((list(tokens), hidden))

    drafter, state, prompt = Seeing(), tapped.new_state(), tapped.encode("a b c a b c a b c " * 3)
    list(tapped.stream(prompt[:20], limit=0, state=state))  # a cached prefix, which the drafter has not seen
    stream = tapped.stream(prompt, limit=60, state=state, speculation=Speculation(drafter, Forced(2), widths))
    answer = [piece.step.token for piece in stream]
    assert stream.result.cached_tokens == 0
    assert stream.result.speculation.tally.accepted > 0
    assert answer == [piece.step.token for piece in tapped.stream(prompt, limit=60)]
    text = [token for tokens, _ in drafter.seen for token in tokens]
    assert text == [*prompt, *answer][: len(text)]
    assert len(text) > len(prompt) + 45  # all but the last round
    whole = tapped.session.bind(tapped.session.new_cache(), (0,))
    whole.run(np.array(text))
    np.testing.assert_allclose(np.concatenate([h for _, h in drafter.seen]), whole.hidden, atol=1e-4)


def test_taps_that_the_graph_lacks_are_told(model: Model) -> None:
    session: Session = model.session
    with pytest.raises(DsoptError, match="has no output for layer 1, which the drafter reads; compile"):
        session.bind(session.new_cache(), (1,))
