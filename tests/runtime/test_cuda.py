"""Devices: which one runs, buffers that stay there, and steps of fixed addresses. What needs a GPU is marked `cuda`;
the rest runs the same code with the CPU as the device."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from toy import Forced, Oracle

from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.cuda import DeviceBinding, DeviceCache, _narrow, _widen
from dsopt.runtime.decoder import decode
from dsopt.runtime.devices import missing_provider
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.kv import CACHE_TYPES, LayerShape
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.session import Binding, Session
from dsopt.runtime.speculate import Speculation, speculate

SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "max_position_embeddings": 600}
IDS = np.random.default_rng(0).integers(0, 300, 60)
SPLITS = ([60], [1] * 60, [20, *[1] * 40], [17, *[4] * 10, 3], [1, 16, 16, 16, 8, 2, 1])


@pytest.fixture(scope="module")
def session(compile_tiny: Callable[..., Path]) -> Session:
    """A graph for CUDA in float16, run by the CPU, which widens it."""
    return Session(open_artifact(compile_tiny("int4", "cuda", **SIZES)))


def device_binding(session: Session, captured: int = 16) -> DeviceBinding:
    cache = DeviceCache(session.layers, session.context, CACHE_TYPES["tensor(float16)"], "cpu")
    return DeviceBinding(session._session, cache, session.vocab_size, "cpu", captured)


def logits(binding: Binding, split: Sequence[int]) -> np.ndarray:
    rows, start = [], 0
    for count in split:
        rows.append(binding.run(IDS[start : start + count], count).copy())
        start += count
    return np.concatenate(rows)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("captured", [16, 0])
def test_fixed_steps_compute_what_a_plain_binding_does(session: Session, split: list[int], captured: int) -> None:
    # In the same pieces: kernels for one row and for 60 may round otherwise, by up to 0.1 on a CPU with AVX2 only.
    wanted = logits(session.bind(session.new_cache()), split)
    np.testing.assert_allclose(logits(device_binding(session, captured), split), wanted, atol=0.01)


def test_rewinding_and_growing(session: Session) -> None:
    binding = device_binding(session)
    first = logits(binding, [40, 4, 4, 4, 4, 4])
    binding.cache.trim(44)
    np.testing.assert_array_equal(binding.run(IDS[44:48], 4), first[44:48])
    generation = binding.cache.generation
    binding.run(np.tile(IDS, 4))
    assert binding.cache.generation == generation + 1
    binding.cache.trim(44)
    np.testing.assert_allclose(binding.run(IDS[44:48], 4), first[44:48], atol=0.05)


def test_what_a_run_wrote_is_kept_in_parts(session: Session) -> None:
    binding, plain = device_binding(session), device_binding(session)
    wanted = logits(plain, [20, 4, 4])
    binding.run(IDS[:20])
    first = binding.run(IDS[20:24], 4, keep=1).copy()
    assert binding.cache.length == 21
    binding.cache.extend(3)
    np.testing.assert_array_equal(np.concatenate([first, binding.run(IDS[24:28], 4)]), wanted[20:])


def test_a_full_context_leaves_the_cache_as_it_was(session: Session) -> None:
    binding = device_binding(session)
    binding.run(IDS)
    with pytest.raises(DsoptError, match="the context is full"):
        binding.run(np.zeros(541, np.int64))
    assert binding.cache.length == 60


@pytest.mark.parametrize("count", [1, 2, 40, 64])
def test_candidates_are_the_largest_logits(session: Session, count: int) -> None:
    one, other = device_binding(session), device_binding(session)
    assert one.most_candidates == 64
    for width in (20, 4, 1):
        whole = other.run(IDS[:width], width)
        for row, found in zip(whole, one.top(IDS[:width], count, width), strict=True):
            np.testing.assert_array_equal(found.tokens, np.argsort(-row, kind="stable")[:count])
            np.testing.assert_array_equal(found.logits, row[found.tokens])


SAMPLINGS = {
    "greedy": Sampling(),
    "top-k": Sampling(temperature=0.9, top_k=40, seed=3),
    "all cuts": Sampling(temperature=1.3, top_k=64, top_p=0.8, min_p=0.02, seed=4),
    "one": Sampling(temperature=1.0, top_k=1, seed=5),
    "penalty off by its window": Sampling(temperature=0.9, top_k=7, repeat_penalty=1.5, repeat_last_n=0, seed=6),
}


def tokens(binding: Binding, sampling: Sampling, limit: int, end: frozenset[int] = frozenset()) -> list[int]:
    prompt = IDS[:9].tolist()
    return [s.token for s in decode(binding, prompt, choose=Sampler(sampling), limit=limit, end=end)]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_candidates_give_the_tokens_that_all_logits_give(
    session: Session, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = device_binding(session)
    whole.most_candidates = 0
    wanted = tokens(whole, SAMPLINGS[name], 30)
    binding = device_binding(session)
    monkeypatch.setattr(binding, "run", None)  # whoever wants all logits fails
    assert tokens(binding, SAMPLINGS[name], 30) == wanted
    if name == "greedy":
        assert (
            tokens(device_binding(session), Sampling(), 30, frozenset(wanted[5:6]))
            == (wanted[: wanted.index(wanted[5]) + 1])
        )
    binding = device_binding(session)
    assert tokens(binding, SAMPLINGS[name], 0) == []
    assert binding.cache.length == 9


@pytest.mark.parametrize("name", ["greedy", "top-k"])
def test_verification_needs_no_more_than_candidates(
    session: Session, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them where it is greedy: the lead tells near ties."""
    prompt, counts = IDS[:9].tolist(), set[int]()
    text = tokens(session.bind(session.new_cache()), SAMPLINGS[name], 24)

    def run(binding: Binding) -> tuple[list[int], int]:
        speculation = Speculation(Oracle([*prompt, *text], session.vocab_size, 1), Forced(1))
        steps = speculate(binding, prompt, speculation, sampler=Sampler(SAMPLINGS[name]), limit=24)
        return [step.token for step in steps], speculation.tally.near_ties

    whole = device_binding(session)
    whole.most_candidates = 0
    binding = device_binding(session)
    top = binding.top
    monkeypatch.setattr(binding, "run", None)
    monkeypatch.setattr(binding, "top", lambda ids, count, *rest: counts.add(count) or top(ids, count, *rest))
    made = run(binding)
    assert made == run(whole)
    assert made[0] == text
    assert counts == {2 if name == "greedy" else 40}


def test_a_device_takes_larger_chunks_of_a_prompt(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    binding = device_binding(session)
    advance = binding._advance
    monkeypatch.setattr(binding, "_advance", lambda ids, *rest: widths.append(len(ids)) or advance(ids, *rest))
    for sampling in (Sampling(), Sampling(temperature=1, seed=1)):
        binding.cache.trim(0)
        list(decode(binding, [1] * 400, choose=Sampler(sampling), limit=2))
    assert widths == [400, 1] * 2


def test_what_candidates_cannot_decide_gets_all_logits(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = device_binding(session)
    monkeypatch.setattr(binding, "top", None)
    for options in ({"seed": 1}, {"top_k": 65, "seed": 1}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert len(list(decode(binding, [1, 2], choose=Sampler(Sampling(temperature=1, **options)), limit=3))) == 3
    assert len(list(decode(binding, [1, 2], choose=Sampler(Sampling(repeat_penalty=1.1)), limit=3))) == 3
    steps = list(decode(binding, [1, 2], choose=Sampler(Sampling()), limit=3, top=2))
    assert all(len(step.top) == 2 for step in steps)


def test_a_saved_cache_comes_back(session: Session) -> None:
    binding = device_binding(session)
    logits(binding, [40])
    saved = binding.cache.valid()
    assert all(part.dtype == np.float32 for part in saved.values())
    other = device_binding(session)
    other.cache.restore(saved, 40)
    np.testing.assert_array_equal(other.run(IDS[40:44], 4), binding.run(IDS[40:44], 4))
    with pytest.raises(DsoptError, match="does not fit this model"):
        other.cache.restore({name: part[:, :, :8] for name, part in saved.items()}, 40)


def test_bfloat16_widens_and_narrows_exactly() -> None:
    bits = np.array([0x3F80, 0xC2F7, 0x0001, 0x7F7F], np.uint16)
    assert _widen(bits)[:2].tolist() == [1.0, -123.5]
    np.testing.assert_array_equal(_narrow(_widen(bits), np.uint16), bits)


class TestSessionForACard:
    """How a session is asked for, and what becomes of one that ONNX Runtime quietly makes on the CPU."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        made, kind = dict[str, Any](), ort.InferenceSession

        def make(graph: Path, options: ort.SessionOptions, *, providers: Any, **rest: Any) -> Any:
            made.update(options=options, providers=providers, **rest)
            session = kind(graph, options, providers=["CPUExecutionProvider"])
            monkeypatch.setattr(session, "get_providers", lambda: made.get("got", ["CUDAExecutionProvider"]))
            return session

        monkeypatch.setattr(ort, "InferenceSession", make)
        return made

    @pytest.mark.parametrize(("captured", "graphs"), [(16, "1"), (0, "0")])
    def test_options(
        self, asked: dict[str, Any], compile_tiny: Callable[..., Path], captured: int, graphs: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.delenv("ORT_FPA_INTB_GEMM", raising=False)
        artifact = open_artifact(compile_tiny("int4", "cuda", **SIZES))
        Session(artifact, device="cuda", captured=captured)
        assert asked["providers"] == [("CUDAExecutionProvider", {"enable_cuda_graph": graphs})]
        assert asked["enable_fallback"] == 0
        entry = asked["options"].get_session_config_entry
        assert entry("ep.cuda.fpa_intb_gemm") == "1"
        assert entry("session.use_device_allocator_for_initializers") == "1"
        monkeypatch.setenv("ORT_FPA_INTB_GEMM", "0")
        Session(artifact, device="cuda")
        with pytest.raises(RuntimeError, match="fpa_intb_gemm"):
            asked["options"].get_session_config_entry("ep.cuda.fpa_intb_gemm")

    def test_the_cpu_in_its_place(self, asked: dict[str, Any], compile_tiny: Callable[..., Path]) -> None:
        asked["got"] = ["CPUExecutionProvider"]
        with pytest.raises(DsoptError, match=r"^--device cuda: ONNX Runtime .* took the CPU in its place: ") as caught:
            Session(open_artifact(compile_tiny("int4", "cuda", **SIZES)), device="cuda")
        assert "\n" not in str(caught.value)

    def test_no_cpu_session_comes_of_a_missing_library(self, compile_tiny: Callable[..., Path]) -> None:
        if missing_provider("CUDAExecutionProvider") is None:
            pytest.skip("there is a card")
        with pytest.raises(DsoptError, match=r"took the CPU in its place|cannot load it"):
            Session(open_artifact(compile_tiny("int4", "cuda", **SIZES)), device="cuda")


class Recorder:
    """A session whose bindings note what is bound; a run notes its graph's id and how much of the mask is ones."""

    def __init__(self) -> None:
        self.bound: list[dict[str, tuple[Any, ...]]] = []
        self.runs: list[tuple[str, int, int]] = []  # graph, length of the mask, ones in it

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="candidates.tokens")]

    def io_binding(self) -> Any:
        values: dict[str, tuple[Any, ...]] = {}
        self.bound.append(values)
        return SimpleNamespace(
            values=values,
            bind_input=lambda name, *where: values.update({name: where}),
            bind_output=lambda name, *where: values.update({name: where}),
            bind_ortvalue_input=lambda name, value: values.update({name: (value,)}),
            bind_ortvalue_output=lambda name, value: values.update({name: (value,)}),
        )

    def run_with_iobinding(self, io: Any, options: ort.RunOptions) -> None:
        mask = io.values["attention_mask"][0].numpy()
        self.runs.append((options.get_run_config_entry("gpu_graph_id"), mask.shape[1], int(mask[0].sum())))


class TestBinding:
    """What a step binds, without a card: addresses, types, graphs."""

    @staticmethod
    def make(captured: int = 16, kind: str = "tensor(bfloat16)", batch: int = 1) -> tuple[DeviceBinding, Recorder]:
        recorder = Recorder()
        cache = DeviceCache([LayerShape(0, 2, 8), LayerShape(3, 1, 4)], 600, CACHE_TYPES[kind], "cpu", batch)
        return DeviceBinding(recorder, cache, 50, "cpu", captured), recorder  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("kind", "number"),
        [("tensor(bfloat16)", 16), ("tensor(float16)", 10), ("tensor(int8)", 3), ("tensor(float8e4m3fn)", 17)],
    )
    def test_past_and_present_are_one_buffer_by_pointer(self, kind: str, number: int) -> None:
        binding, recorder = self.make(kind=kind)
        binding.run(np.zeros(1, np.int64))
        (bound,) = recorder.bound
        for name, shape in (("0.key", [1, 2, 256, 8]), ("3.value", [1, 1, 256, 4])):
            address = binding.cache.values[name].data_ptr()
            assert bound[f"past_key_values.{name}"] == ("cpu", 0, number, shape, address)
            assert bound[f"present.{name}"] == bound[f"past_key_values.{name}"]

    def test_each_shape_of_few_rows_is_a_graph_of_its_own(self) -> None:
        binding, recorder = self.make()
        for count, rows, candidates in ((1, 1, 0), (1, 1, 1), (8, 8, 2), (8, 1, 2), (16, 16, 0)) * 2:
            binding.cache.trim(0)
            ids = np.zeros(count, np.int64)
            binding.top(ids, candidates, rows) if candidates else binding.run(ids, rows)
        graphs = [graph for graph, _, _ in recorder.runs]
        assert graphs[:5] == graphs[5:]  # used again
        assert len(set(graphs)) == 5
        assert "-1" not in graphs
        assert len(recorder.bound) == 5
        assert {(length, ones) for _, length, ones in recorder.runs} == {(256, 1), (256, 8), (256, 16)}
        other, recorder_2 = self.make()
        other.run(np.zeros(1, np.int64))
        assert recorder_2.runs[0][0] not in graphs  # ids are unique in a process

    def test_growth_makes_new_graphs(self) -> None:
        binding, recorder = self.make()
        binding.run(np.zeros(1, np.int64))
        binding.cache.reserve(300)
        binding.run(np.zeros(1, np.int64))
        (first, *_), (second, length, ones) = recorder.runs
        assert first != second
        assert (length, ones) == (512, 2)
        before, after = (bound["past_key_values.0.key"] for bound in recorder.bound)
        assert before[4] != after[4]

    def test_prompts_are_not_captured_and_nothing_is_where_it_is_off(self) -> None:
        binding, recorder = self.make()
        binding.run(np.zeros(17, np.int64))
        binding.run(np.zeros(40, np.int64))
        assert recorder.runs == [("-1", 17, 17), ("-1", 57, 57)]  # the mask is as long as the sequence
        off, recorder = self.make(captured=0)
        off.run(np.zeros(1, np.int64))
        off.run(np.zeros(2, np.int64))
        assert recorder.runs == [("-1", 256, 1), ("-1", 3, 3)]

    def test_several_sequences_advance_together(self) -> None:
        binding, recorder = self.make(batch=3)
        assert binding.run(np.zeros((3, 1), np.int64)).shape == (3, 50)
        assert [len(row.tokens) for row in binding.top(np.zeros((3, 2), np.int64), 5, 2)] == [5] * 6
        assert recorder.bound[0]["past_key_values.0.key"][3] == [3, 2, 256, 8]

    def test_a_quantized_cache_is_saved_as_its_codes(self) -> None:
        for kind in ("tensor(int8)", "tensor(float8e4m3fn)"):
            cache, other = (self.make(kind=kind)[0].cache for _ in range(2))
            codes = np.random.default_rng(0).integers(0, 127, (1, 2, 256, 8)).astype(cache.kind.storage)
            cache.values["0.key"].update_inplace(codes)
            cache.length = 9
            other.restore(cache.valid(), 9)
            np.testing.assert_array_equal(other.values["0.key"].numpy()[:, :, :9], codes[:, :, :9])


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["int4", "none", "int8,dtype=bf16", "fp8,dtype=bf16"])
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_exact_mode_has_one_text_with_any_drafter(
    compile_tiny: Callable[..., Path], device: str, recipe: str, width: int
) -> None:
    """Every run has the same rows: bit for bit the same text, whatever was drafted and rejected."""
    if device == "cpu" and "bf16" in recipe:
        pytest.skip("the CPU has no such kernels")
    loaded = Session(open_artifact(compile_tiny(recipe, "cuda", **SIZES)), device=device)
    prompt = IDS[:9].tolist()

    def text(drafter: Oracle | None) -> list[int]:
        binding = device_binding(loaded) if device == "cpu" else loaded.bind(loaded.new_cache())
        speculation = Speculation(drafter, Forced(2, width - 1), widths=(width,))
        steps = speculate(binding, prompt, speculation, sampler=Sampler(Sampling()), limit=40)
        return [step.token for step in steps]

    wanted = text(None)
    for seed in range(3):
        assert text(Oracle([*prompt, *wanted], loaded.vocab_size, seed)) == wanted


@pytest.mark.cuda
class TestOnTheCard:
    """Needs a GPU: numbers against the float32 graph on the CPU, and graph replay against plain runs."""

    @pytest.fixture(scope="class")
    def reference(self, compile_tiny: Callable[..., Path]) -> np.ndarray:
        session = Session(open_artifact(compile_tiny("none", **SIZES)))
        return logits(session.bind(session.new_cache()), [60])

    @pytest.mark.parametrize("recipe", ["none", "none,dtype=bf16", "int4", "int8,dtype=bf16", "fp8,dtype=bf16"])
    def test_parity(self, compile_tiny: Callable[..., Path], recipe: str, reference: np.ndarray) -> None:
        session = Session(open_artifact(compile_tiny(recipe, "cuda", **SIZES)), device="cuda")
        words = recipe.split(",")
        if words[0] in ("int4", "int8"):  # the same codes on the CPU: what is compared is arithmetic
            plain = Session(open_artifact(compile_tiny(words[0], **SIZES)))
            reference = logits(plain.bind(plain.new_cache()), [60])
        tolerance = {"fp8": 1.5, "none": 0.05}.get(words[0], 0.15)  # fp8 is compared with unrounded weights
        if "bf16" in recipe and words[0] != "fp8":
            tolerance *= 4
        for split in SPLITS:
            np.testing.assert_allclose(
                logits(session.bind(session.new_cache()), split), reference, atol=tolerance, err_msg=str(split)
            )

    def test_norms_inside_attention(self, compile_tiny: Callable[..., Path]) -> None:
        qwen = {**SIZES, "model_type": "qwen3", "num_attention_heads": 4}
        plain = Session(open_artifact(compile_tiny("none", **qwen)))
        session = Session(open_artifact(compile_tiny("none", "cuda", **qwen)), device="cuda")
        wanted = logits(plain.bind(plain.new_cache()), [60])
        for split in SPLITS:
            np.testing.assert_allclose(logits(session.bind(session.new_cache()), split), wanted, atol=0.05)

    @pytest.mark.parametrize("recipe", ["none", "int4", "none,dtype=bf16"])
    def test_replay_is_the_plain_run(self, compile_tiny: Callable[..., Path], recipe: str) -> None:
        artifact = open_artifact(compile_tiny(recipe, "cuda", **SIZES))
        captured = Session(artifact, device="cuda")
        plain = Session(artifact, device="cuda", captured=0)
        for split in SPLITS:
            one = logits(captured.bind(captured.new_cache()), split)
            np.testing.assert_allclose(one, logits(plain.bind(plain.new_cache()), split), atol=0.05)

    def test_rewind_and_verify_widths(self, compile_tiny: Callable[..., Path]) -> None:
        session = Session(open_artifact(compile_tiny("none", "cuda", **SIZES)), device="cuda")
        binding = session.bind(session.new_cache())
        whole = logits(binding, [60])
        for width in (1, 2, 3, 5, 8, 16):
            for _ in range(3):  # run, capture, replay
                binding.cache.trim(40)
                np.testing.assert_allclose(binding.run(IDS[40 : 40 + width], width), whole[40 : 40 + width], atol=0.05)

    @pytest.mark.parametrize("width", [1, 2, 4, 5, 8, 16])
    @pytest.mark.parametrize("recipe", ["none", "none,dtype=bf16", "int4", "int8", "fp8,dtype=bf16", "int4,cache=int8"])
    def test_a_step_of_fixed_width_does_not_depend_on_its_neighbours(
        self, compile_tiny: Callable[..., Path], recipe: str, width: int
    ) -> None:
        session = Session(open_artifact(compile_tiny(recipe, "cuda", **SIZES)), device="cuda")
        binding = session.bind(session.new_cache())
        logits(binding, [40])
        first = []
        for fill in (0, 17, 250, 3):  # a run, its capture, replays
            binding.cache.trim(40)
            ids = np.full(width, fill)
            ids[0] = IDS[40]
            first.append(binding.run(ids, width)[0].copy())
        for other in first[1:]:
            np.testing.assert_array_equal(first[0], other)

    @pytest.mark.parametrize("count", [1, 2, 40, 64])
    def test_candidates(self, compile_tiny: Callable[..., Path], count: int) -> None:
        session = Session(open_artifact(compile_tiny("int4", "cuda", **SIZES)), device="cuda")
        whole, some = (session.bind(session.new_cache()) for _ in range(2))
        for width in (20, 4, 4, 4, 1, 1, 1):
            rows = whole.run(IDS[:width], width).copy()
            for row, found in zip(rows, some.top(IDS[:width], count, width), strict=True):
                np.testing.assert_array_equal(found.logits, np.sort(row)[::-1][:count])
                np.testing.assert_array_equal(row[found.tokens], found.logits)

    @pytest.mark.parametrize("recipe", ["none,cache=int8", "none,cache=fp8"])
    def test_a_cache_in_8_bits(self, compile_tiny: Callable[..., Path], recipe: str, reference: np.ndarray) -> None:
        session = Session(open_artifact(compile_tiny(recipe, "cuda", **SIZES)), device="cuda")
        for split in SPLITS:
            np.testing.assert_allclose(logits(session.bind(session.new_cache()), split), reference, atol=1.5)
