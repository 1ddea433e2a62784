"""A drafter's checkpoint: config and lazy tensors. It has no tokenizer, the target's is its own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsopt.compiler.checkpoint import Source, Tensor
from dsopt.compiler.drafters.config import DraftConfig, check_layout
from dsopt.compiler.safetensors_dir import SafetensorsTensor, open_tensors, read_json
from dsopt.compiler.text_part import with_dtype
from dsopt.runtime.errors import DsoptError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class DraftCheckpoint:
    source: Source
    config: DraftConfig
    tensors: Mapping[str, Tensor]


def open_drafter(name: str) -> DraftCheckpoint:
    """Open the drafter in a directory or of a hub id ("deepseek-ai/dspark_qwen3_4b_block7").

    Raises DsoptError when it is missing, damaged, of another layout or for a target that is not supported.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        if path.exists() or not _HUB_ID.fullmatch(name):
            raise DsoptError(f"no drafter {name!r}: neither a directory here nor a hub id such as org/name")
        from dsopt.compiler.hub import snapshot

        path = snapshot(name)
    raw, tensors = read_json(path / "config.json"), open_tensors(path)
    try:
        check_layout(raw, tensors)
        config = DraftConfig.from_dict(with_dtype(raw, tensors, "embed_tokens.weight"), tensors)
    except DsoptError as error:
        raise DsoptError(f"{path}: {error}") from error
    files = {tensor.path for tensor in tensors.values() if isinstance(tensor, SafetensorsTensor)}
    short = name.rstrip("/").split("/")[-1] if not Path(name).is_dir() else path.resolve().name
    source = Source("huggingface", short, path, content=tuple(sorted({*files, path / "config.json"})))
    return DraftCheckpoint(source, config, tensors)
