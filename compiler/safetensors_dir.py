"""A Hugging Face model directory: config.json, tokenizer.json, safetensors weights in one file or shards."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dsopt.compiler.checkpoint import Checkpoint, Source, Tensor
from dsopt.compiler.fp8 import DTYPE as FP8
from dsopt.compiler.fp8 import join_scales, read_codes, read_square
from dsopt.compiler.text_part import text_part
from dsopt.runtime.errors import DsoptError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class SafetensorsTensor(Tensor):
    """A tensor of a safetensors file.

    The file is opened for each read: that takes half a millisecond, and the mapped pages leave the process's
    memory when it is closed.
    """

    path: Path

    def _rows(self, start: int, stop: int) -> np.ndarray:
        if self.dtype not in (*_ITEM_BYTES, FP8):
            raise DsoptError(_unreadable(self.path, self.name, self.dtype))
        try:
            if self.dtype == FP8:
                return read_codes(self.path, self.name, start, stop)
            with safe_open(self.path, "np") as file:
                return file.get_slice(self.name)[start:stop] if self.shape else file.get_tensor(self.name)
        except (OSError, SafetensorError) as error:
            raise DsoptError(f"{self.path}: tensor {self.name} could not be read ({error})") from error


def open_safetensors_dir(path: Path, *, kind: str, name: str) -> Checkpoint:
    """Open the directory `path` without reading a weight.

    Raises DsoptError for: a missing or malformed file, pickled weights, quantized ones but for float8 with a scale a
    square, an index that names files elsewhere, a missing or truncated shard, a dtype other than F32, F16 and BF16.
    """
    config = read_json(path / "config.json")
    square = read_square(config, path) if "quantization_config" in config else None
    files = _tokenizer_files(path)
    stored = open_tensors(path, fp8=square is not None)
    tensors = join_scales(stored, square, path) if square else stored
    shards = {tensor.path for tensor in stored.values()}
    beside = [p for p in (path / "config.json", *(path / file for file in files)) if p.exists()]
    source = Source(kind, name, path, content=tuple(sorted({*shards, *beside})))
    return text_part(Checkpoint(source, config, tensors, files))


def read_json(path: Path, hint: str = "a model directory needs it") -> dict[str, Any]:
    """A JSON object. Raises DsoptError when the file is missing or holds anything else; `hint` says what it is for."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DsoptError(f"{path} could not be read ({error.strerror}); {hint}") from error
    except (ValueError, RecursionError) as error:
        raise DsoptError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DsoptError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    if not (path / "tokenizer.json").exists():
        has = " (only a SentencePiece tokenizer.model)" if (path / "tokenizer.model").exists() else ""
        raise DsoptError(
            f"{path} has no tokenizer.json{has}; "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        )
    files = {}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (path / name).exists():
            read_json(path / name)
            files[name] = (path / name).read_bytes()
    if (template := _chat_template(path)) is not None:
        try:
            files["chat_template.jinja"] = template.encode()
        except UnicodeEncodeError as error:
            raise DsoptError(f"{path}: the chat template is not valid text ({error.reason})") from error
    return files


def _chat_template(path: Path) -> str | None:
    """The template of its own file, else that of tokenizer_config.json, which may be a list of named ones."""
    if (path / "chat_template.jinja").exists():
        try:
            return (path / "chat_template.jinja").read_text("utf-8")
        except ValueError as error:
            raise DsoptError(f"{path / 'chat_template.jinja'} is not UTF-8 text ({error})") from error
    if not (path / "tokenizer_config.json").exists():
        return None
    template = read_json(path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None or isinstance(template, str):
        return template
    raise DsoptError(f"{path / 'tokenizer_config.json'}: chat_template is a {type(template).__name__}, not text")


def open_tensors(path: Path, *, fp8: bool = False) -> dict[str, SafetensorsTensor]:
    """The tensors of a directory by name, unread; those in float8 only with `fp8`, as bare codes. Raises DsoptError as
    `open_safetensors_dir` does."""
    if (path / SINGLE).exists():
        return _checked(_open_shard(path / SINGLE), fp8)
    if (path / INDEX).exists():
        return _checked(_open_index(path), fp8)
    if pickles := sorted(file.name for pattern in _PICKLES for file in path.glob(pattern)):
        raise DsoptError(
            f"{path}: {pickles[0]} holds pickled weights, which can run code when loaded; "
            "convert them to safetensors (transformers' save_pretrained does)"
        )
    raise DsoptError(f"{path} has no weights: neither {SINGLE} nor {INDEX}")


def _checked(tensors: dict[str, SafetensorsTensor], fp8: bool) -> dict[str, SafetensorsTensor]:
    for tensor in tensors.values():
        # Other types are found among buffers that no layer multiplies by (masks, positions): those stand unread.
        known = tensor.dtype in _ITEM_BYTES or (fp8 and tensor.dtype == FP8)
        if not known and tensor.name.endswith(".weight"):
            raise DsoptError(_unreadable(tensor.path, tensor.name, tensor.dtype))
    return tensors


def _open_index(path: Path) -> dict[str, SafetensorsTensor]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise DsoptError(f"{path / INDEX} has no weight_map")
    shards = _open_shards(path, weight_map.values())
    tensors = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise DsoptError(f"{path / shard} lacks tensor {name}, which {INDEX} places there; download both again")
        tensors[name] = shards[shard][name]
    return tensors


def _open_shards(path: Path, names: Iterable[object]) -> dict[object, dict[str, SafetensorsTensor]]:
    shards: dict[object, dict[str, SafetensorsTensor]] = {}
    for name in dict.fromkeys(map(_checked_name, names)):
        if not (path / name).is_file():
            raise DsoptError(f"{path} lacks the shard {name} that {INDEX} names; download it")
        shards[name] = _open_shard(path / name)
    return shards


def _checked_name(name: object) -> str:
    """An index is data from elsewhere: it may name files beside itself and no others."""
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise DsoptError(f"{INDEX} names the file {name!r}; only plain file names in its own directory are read")
    return name


def _open_shard(path: Path) -> dict[str, SafetensorsTensor]:
    tensors = {}
    try:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                entry = file.get_slice(name)
                tensors[name] = _declare(path, name, tuple(entry.get_shape()), entry.get_dtype())
    except (OSError, SafetensorError) as error:
        raise DsoptError(f"{path} is damaged or cut short ({error}); download it again") from error
    return tensors


def _declare(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> SafetensorsTensor:
    nbytes = int(np.prod(shape, dtype=np.int64)) * _ITEM_BYTES.get(dtype, 1)
    return SafetensorsTensor(name, shape, dtype, nbytes, path)


def _unreadable(path: Path, name: str, dtype: str) -> str:
    return f"{path}: tensor {name} is stored as {dtype}; only F32, F16 and BF16 are read"
