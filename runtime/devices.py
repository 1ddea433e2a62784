"""Which device runs a model: what is missing for CUDA, in words, and where the CPU may stand in."""

import contextlib
import ctypes
import io
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from dsopt.runtime.artifact import Manifest
from dsopt.runtime.errors import DsoptError, UsageError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

DEVICES = ("auto", "cpu", "cuda")
_CUDA = "CUDAExecutionProvider"
_DRIVER = {"win32": "nvcuda.dll"}.get(sys.platform, "libcuda.so.1")


def choose_device(asked: str, manifest: Manifest, say: Callable[[str], None]) -> str:
    """cpu or cuda for a model, `asked` being auto, cpu or cuda.

    auto takes what the model was compiled for; where that is missing and the CPU can run it, it says so and takes
    the CPU. Raises DsoptError where the device asked for, or any, cannot run it.
    """
    check_device(asked)
    if manifest.target == "cpu":
        if asked == "cuda":
            raise DsoptError(f"--device cuda: {manifest.name} was compiled for the CPU; compile it with --target cuda")
        return "cpu"
    if asked == "cpu":
        _check_cpu_runs(manifest, "--device cpu")
        return "cpu"
    reason = missing_provider(_CUDA)
    if reason is None:
        return "cuda"
    if asked == "cuda":
        raise DsoptError(f"--device cuda: {reason}")
    _check_cpu_runs(manifest, reason)
    say(f"dsopt: running on the CPU, slowly for a model compiled for CUDA: {reason}")
    return "cpu"


def check_device(asked: str) -> None:
    """Raises UsageError on an unknown device."""
    if asked not in DEVICES:
        raise UsageError(f"--device is {asked}; it must be one of {', '.join(DEVICES)}")


def cpu_lacks(family: str, recipe: str) -> str | None:
    """What a graph for CUDA, of this family by this recipe, has that the CPU cannot run; None where it can."""
    said = re.split(r"[ ,=]", f"{family} {recipe}")  # whole words: a file's name or hash may hold any of these
    words = (("bf16", "bfloat16"), ("fp8", "float8"), ("qwen3", "norms-in-attention"))
    return next((what for word, what in words if word in said), None)


def _check_cpu_runs(manifest: Manifest, why: str) -> None:
    formats = "".join(f" {node['format']}" for node in manifest.nodes)  # a search chooses what no recipe says
    if what := cpu_lacks(manifest.family, manifest.recipe + formats):
        raise DsoptError(f"{why}; the CPU has no {what} kernels for {manifest.name}: compile it with --target cpu")


@cache
def missing_provider(provider: str) -> str | None:
    """Why ONNX Runtime cannot run on `provider` here, in one line; None where it can."""
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        return f"this onnxruntime {ort.__version__} has no {provider}; install onnxruntime-gpu in its place"
    if provider != _CUDA:
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; stdout is the answer's
        ort.preload_dlls()
    return _missing_driver() or _missing_library(Path(ort.__file__).parent / "capi")


def _missing_driver() -> str | None:
    try:
        driver = ctypes.CDLL(_DRIVER)
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
            return None
    except (OSError, AttributeError):
        return f"no NVIDIA driver ({_DRIVER} is missing)"
    return "no NVIDIA GPU is visible to the driver"


def _missing_library(folder: Path) -> str | None:
    """The first library that ONNX Runtime's CUDA provider needs and the system has not."""
    if sys.platform == "win32":
        return None  # the loader names none there; the session's own error has to do
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        found = re.match(r"(\S+): cannot open shared object file", str(error))
        if found:
            return f'{found[1]} is missing; pip install "onnxruntime-gpu[cuda,cudnn]"'
    return None  # loaded, or found everything but the host's own symbols, which are there later
