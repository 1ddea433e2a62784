"""How a session on a card is asked for, and what its steps bind; without a card."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from cuda_tiny import SIZES

from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.cuda import DeviceBinding, DeviceCache
from dsopt.runtime.devices import missing_provider
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.kv import CACHE_TYPES, LayerShape
from dsopt.runtime.session import Session


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
