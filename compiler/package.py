"""A graph with lazy weights -> an artifact directory, streamed to disk, written aside and renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dsopt.runtime.artifact import GRAPH, MANIFEST, Manifest
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import hash_content, remember_sha256

Progress = Callable[[int, int], None]  # bytes written, bytes in all
_INLINE = 1024  # smaller tensors stay in the graph file: shape inference and constant folding read them
_PARTIAL = ".partial-"
MAX_LENGTH = 4096  # onnxruntime-genai allocates and clears the whole cache for this length up front


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A new directory beside `out` that takes its place when the block ends well, and vanishes when it does not.

    A link is followed: its target is replaced. Raises DsoptError when the place cannot be written. A process killed
    inside leaves a directory `.NAME.partial-PID-...`, which the next compilation to `out` removes.
    """
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise DsoptError(f"{out}: is a file; choose another -o")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}{_PARTIAL}{os.getpid()}-", dir=out.parent))
        try:
            aside.chmod(0o755)  # mkdtemp makes private ones
            yield aside
            _take_place(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise DsoptError(f"{out}: cannot be written: {error.strerror or error}") from error


def _take_place(aside: Path, out: Path) -> None:
    if not out.exists():
        aside.rename(out)
        return
    # A directory cannot be renamed over a full one. Between these two renames there is no artifact, never half a one.
    old = aside.with_name(f"{aside.name}.old")
    out.rename(old)
    try:
        aside.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _remove_leftovers(out: Path) -> None:
    """What processes that are gone left; one with this process's own id too, ids repeat in containers.

    One killed between its two renames left the old artifact as `.old`: it goes back to its place.
    """
    prefix = f".{out.name}{_PARTIAL}"
    for path in list(out.parent.iterdir()):
        found = path.name.startswith(prefix)
        pid = path.name.removeprefix(prefix).partition("-")[0].removesuffix(".old")
        gone = pid.isdigit() and (int(pid) == os.getpid() or not _is_running(int(pid)))
        if found and gone and path.suffix == ".old" and not out.exists():
            path.rename(out)
        elif found and gone:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_free_space(out: Path, needed: int) -> None:
    """Raises DsoptError when the file system of `out` has less than `needed` bytes left."""
    place = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise DsoptError(f"{place}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free; choose another -o")


def stored_bytes(model: ir.Model, above: int = 0) -> int:
    """Bytes of all weights as they will be written, of those larger than `above`."""
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None]
    return sum(size for size in sizes if size > above)


def write_graph(model: ir.Model, directory: Path, progress: Progress | None = None, name: str = GRAPH) -> None:
    """Write the graph `name` and its weights `name`.data, evaluating one lazy tensor after the other."""
    total, done = stored_bytes(model, above=_INLINE), 0

    def written(tensor: ir.TensorProtocol, _info: object) -> None:
        nonlocal done
        done += tensor.nbytes
        if progress:
            progress(done, total)

    try:
        # Page-aligned weights: ONNX Runtime maps them instead of reading them.
        ir.save(
            model,
            directory / name,
            external_data=f"{name}.data",
            size_threshold_bytes=_INLINE,
            callback=written,
            alignment=4096,
        )
    except ir.serde.SerdeError as error:  # wraps what a lazy tensor raised, once for each level of the graph
        raise _root_cause(error) from error


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def write_texts(directory: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (directory / name).write_bytes(data)


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file written, for the manifest. Directories have manifests of their own."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hash_content(path)}
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST and path.is_file()
    }


def seal(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST).write_bytes(manifest.to_json())


def remember_hashes(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """The hashes just computed hold at the final path too: spare the first reader."""
    for name, entry in files.items():
        remember_sha256(directory / name, str(entry["sha256"]))


def _genai_providers(target: str) -> list[dict[str, Any]]:
    """The CPU's must not be listed; CUDA graphs are onnxruntime-genai's user's to switch on."""
    return [] if target == "cpu" else [{target: {"enable_cuda_graph": "0"}}]


def genai_config(manifest: Manifest) -> bytes:
    """genai_config.json for onnxruntime-genai; its schema is strict, so nothing of dsopt's own goes in."""
    model = manifest.model
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask",
              "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}  # fmt: skip
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    decoder = {
        "session_options": {
            "log_id": "onnxruntime-genai",
            "log_severity_level": 3,
            "provider_options": _genai_providers(manifest.target),
        },
        "filename": GRAPH,
        "head_size": model["head_dim"],
        "hidden_size": model["hidden_size"],
        "num_attention_heads": model["heads"],
        "num_hidden_layers": model["layers"],
        "num_key_value_heads": model["kv_heads"],
        "inputs": inputs,
        "outputs": outputs,
    }
    eos = list(manifest.eos)
    config = {
        "model": {
            "type": manifest.family,
            "bos_token_id": manifest.bos if manifest.bos is not None else eos[0],
            "eos_token_id": eos,
            "pad_token_id": eos[0],
            "vocab_size": model["vocab_size"],
            "context_length": model["context_length"],
            "decoder": decoder,
        },
        "search": {
            "do_sample": False, "max_length": min(model["context_length"], MAX_LENGTH), "min_length": 0,
            "num_beams": 1, "num_return_sequences": 1, "past_present_share_buffer": True,
            "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 1, "top_p": 1.0,
        },
    }  # fmt: skip
    return json.dumps(config, indent=1).encode()
