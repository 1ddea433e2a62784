"""Which device runs a model, and what is said where one is missing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest

from dsopt.runtime import devices
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.devices import choose_device, missing_provider
from dsopt.runtime.errors import DsoptError, UsageError


class TestChoosing:
    """`choose_device` where ONNX Runtime finds CUDA and where it does not."""

    @pytest.fixture
    def choose(self, compile_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        def make(
            asked: str, recipe: str, target: str = "cuda", reason: str | None = "libx.so.1 is missing", **sizes: Any
        ) -> Any:
            monkeypatch.setattr(devices, "missing_provider", lambda provider: reason)
            said: list[str] = []
            return choose_device(
                asked, open_artifact(compile_tiny(recipe, target, **sizes)).manifest, said.append
            ), said

        return make

    def test_the_name_of_a_file_is_no_kernel(self, choose: Callable[..., Any]) -> None:
        assert devices.cpu_lacks("llama", "int8 prune vocab=qwen3.txt@fp8bf16a") is None
        assert devices.cpu_lacks("llama", "int8,cache=fp8") == "float8"

    def test_the_gpu_where_there_is_one(self, choose: Callable[..., Any]) -> None:
        for asked in ("auto", "cuda"):
            assert choose(asked, "none", reason=None) == ("cuda", [])

    def test_auto_falls_back_aloud(self, choose: Callable[..., Any]) -> None:
        device, said = choose("auto", "none")
        assert device == "cpu"
        assert len(said) == 1
        assert "on the CPU" in said[0]
        assert "libx.so.1 is missing" in said[0]

    def test_cuda_fails_clearly(self, choose: Callable[..., Any]) -> None:
        with pytest.raises(DsoptError, match=r"^--device cuda: libx.so.1 is missing$"):
            choose("cuda", "none")

    @pytest.mark.parametrize(("recipe", "what"), [("none,dtype=bf16", "bfloat16"), ("fp8", "float8")])
    @pytest.mark.parametrize("asked", ["auto", "cpu"])
    def test_what_the_cpu_cannot_run(self, choose: Callable[..., Any], recipe: str, what: str, asked: str) -> None:
        with pytest.raises(DsoptError, match=f"no {what} kernels .* compile it with --target cpu"):
            choose(asked, recipe)

    def test_qwen3_norms_in_attention_are_of_cuda_only(self, choose: Callable[..., Any]) -> None:
        with pytest.raises(DsoptError, match="no norms-in-attention kernels"):
            choose("auto", "none", model_type="qwen3")
        assert choose("auto", "none", "cpu", model_type="qwen3") == ("cpu", [])

    def test_a_model_for_the_cpu_stays_there(self, choose: Callable[..., Any]) -> None:
        assert choose("auto", "none", "cpu", reason=None) == ("cpu", [])
        with pytest.raises(DsoptError, match="compile it with --target cuda"):
            choose("cuda", "none", "cpu", reason=None)

    def test_an_unknown_device(self, choose: Callable[..., Any]) -> None:
        with pytest.raises(UsageError, match="tpu"):
            choose("tpu", "none")


def test_what_is_missing_is_named() -> None:
    reason = missing_provider("NoSuchProvider")
    assert reason is not None
    assert "has no NoSuchProvider" in reason
    assert missing_provider("CPUExecutionProvider") is None


class TestWhatIsMissing:
    """`missing_provider`, with the system's libraries faked."""

    LIBRARIES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcufft.so.12")

    @pytest.fixture
    def system(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
        """`system(driver, provider=error)`: what is said with this driver, and this error at the provider's load."""

        def ask(driver: Any, provider: str | None = None) -> str | None:
            def load(name: str) -> Any:
                if name == devices._DRIVER:
                    if isinstance(driver, Exception):
                        raise driver
                    return driver
                if provider is not None:
                    raise OSError(provider)
                return object()

            monkeypatch.setattr(devices.ctypes, "CDLL", load)
            monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
            monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libx"), raising=False)
            return missing_provider.__wrapped__("CUDAExecutionProvider")

        return ask

    @staticmethod
    def driver(init: int = 0, count: int = 1, status: int = 0) -> Any:
        def get_count(number: Any) -> int:
            number._obj.value = count
            return status

        return SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=get_count)

    def test_nothing(self, system: Callable[..., str | None], capsys: pytest.CaptureFixture[str]) -> None:
        assert system(self.driver()) is None
        assert capsys.readouterr().out == ""  # stdout is the answer's, whatever preload_dlls prints

    @pytest.mark.parametrize("library", LIBRARIES)
    def test_a_library(self, system: Callable[..., str | None], library: str) -> None:
        said = system(self.driver(), f"{library}: cannot open shared object file: No such file or directory")
        assert said == f'{library} is missing; pip install "onnxruntime-gpu[cuda,cudnn]"'

    def test_the_provider_wants_symbols_of_its_host(self, system: Callable[..., str | None]) -> None:
        assert system(self.driver(), "undefined symbol: Provider_GetHost") is None

    def test_the_driver(self, system: Callable[..., str | None]) -> None:
        assert system(OSError("not found")) == f"no NVIDIA driver ({devices._DRIVER} is missing)"
        for broken in (self.driver(init=999), self.driver(count=0), self.driver(status=3)):
            assert system(broken) == "no NVIDIA GPU is visible to the driver"

    def test_a_wheel_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
        said = missing_provider.__wrapped__("CUDAExecutionProvider")
        assert said is not None
        assert said.endswith("has no CUDAExecutionProvider; install onnxruntime-gpu in its place")
