"""What a model's activations look like on a text: absolute maxima, means, squares and Gram matrices of each input.

A sweep through the blocks, one in memory at a time. What it finds is kept in the cache, a file a layer, under a
fingerprint of weights and text: a sweep that was cut short goes on where it stopped, one that was done is not done
again.

First tokens of a text are apart: later ones attend to them, whatever they say (attention sinks, arXiv:2309.17453), and
what they look like inside is unlike all others. A text has one, so tokens are also run alone.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsopt.compiler.recipe import HEAD
from dsopt.compiler.stream import BlockStream, observed
from dsopt.runtime.files import cache_dir

Progress = Callable[[int, int], None]  # layers done, layers in all

_VERSION = 3  # of what is computed: another makes older files strangers
FIRSTS = 256  # tokens run alone
SAMPLE = 4  # windows, the first ones, on which errors are priced
_BATCH = 4  # windows run through a block together: bounds the memory of its activations
_READS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # the same input: the first's is kept


@dataclass(frozen=True)
class InputStatistics:
    """Over all tokens, of one linear layer's input: float32 [K] each, and `gram` = E[x x^T], float32 [K, K].

    `first`: inputs of tokens that a text begins with, float32 [FIRSTS, K]; none of the head's.
    """

    absmax: Tensor
    mean: Tensor
    gram: Tensor
    first: Tensor

    @property
    def square(self) -> Tensor:
        """E[x^2], float32 [K]."""
        return self.gram.diagonal()

    def weighted(self, sink: float) -> Tensor:
        """`gram`, with first tokens on top that count `sink` times as much as all tokens together."""
        if not sink:
            return self.gram
        return self.gram.addmm(self.first.T, self.first, alpha=sink / len(self.first))


@dataclass(frozen=True)
class Statistics:
    """What a sweep left behind. `windows` int64 [windows, tokens] are the text it was done on.

    The first SAMPLE and the last `held` of them are in no statistic: what is made by these statistics is priced on
    those, and judged on these. What weights are rounded by fits the tokens that it is of better than any others.
    """

    directory: Path
    windows: np.ndarray
    held: int
    depth: int

    def input(self, module: str) -> InputStatistics:
        """Of the input of a linear layer, by module name (`model.layers.3.mlp.down_proj`)."""
        if module == HEAD:
            return _input(self.directory, self.depth, HEAD)
        path, _, leaf = module.rpartition(".")
        layer = int(module.split(".")[2])
        return _input(self.directory, layer, f"{path}.{_READS.get(leaf, leaf)}")

    def hidden(self, layer: int) -> Tensor:
        """The input of a block, or after the last one of the final norm: float32 [SAMPLE, tokens, width]."""
        return self._hidden(layer)[:SAMPLE]

    def held_out(self) -> tuple[np.ndarray, Tensor]:
        """The windows held out [held, tokens] and their last hidden states, float32 [held, tokens, width]."""
        return self.windows[-self.held :], self._hidden(self.depth)[-self.held :]

    def _hidden(self, layer: int) -> Tensor:
        return self._read(layer, "hidden")

    def _read(self, layer: int, name: str) -> Tensor:
        with safe_open(_file(self.directory, layer), "pt") as file:
            return file.get_tensor(name)


@lru_cache(maxsize=4)
def _input(directory: Path, layer: int, name: str) -> InputStatistics:
    with safe_open(_file(directory, layer), "pt") as file:
        return InputStatistics(*(file.get_tensor(f"{name}.{part}") for part in ("absmax", "mean", "gram", "first")))


def fingerprint(source: str, windows: np.ndarray, held: int) -> str:
    """Of a checkpoint (its own fingerprint) and a text: what statistics depend on."""
    text = hashlib.sha256(np.ascontiguousarray(windows, np.int64).tobytes()).hexdigest()
    return hashlib.sha256(f"{_VERSION} {source} {windows.shape} {held} {text}".encode()).hexdigest()[:32]


def calibrate(
    stream: BlockStream, windows: np.ndarray, held: int, progress: Progress = lambda done, total: None
) -> Statistics:
    """Sweep the model over windows of ids int64 [windows, tokens], each from an empty context; the first SAMPLE and the
    last `held` are run, but kept out of the statistics.

    On disk: for each layer the Gram matrices of its inputs, those of first tokens and a few hidden states, in float32.
    """
    assert len(windows) > SAMPLE + held > SAMPLE
    directory = cache_dir() / "statistics" / fingerprint(stream.checkpoint.fingerprint, windows, held)
    directory.mkdir(parents=True, exist_ok=True)
    found = Statistics(directory, windows, held, stream.depth)
    first = next((layer for layer in range(stream.depth) if not _is_complete(directory, layer)), stream.depth)
    with torch.inference_mode():
        if first == 0:
            firsts = _firsts(windows[SAMPLE:-held], stream)
            _keep(directory, 0, {"hidden": stream.embed(windows), "alone": stream.embed(firsts)})
        for layer in range(first, stream.depth):
            progress(layer, stream.depth)
            _sweep_block(stream, found, layer)
        if not _is_complete(directory, stream.depth):
            _sweep_head(stream, found)
    progress(stream.depth, stream.depth)
    return found


def _firsts(windows: np.ndarray, stream: BlockStream) -> np.ndarray:
    """Tokens to run alone, int64 [FIRSTS, 1]: of the windows, and for a quarter the one that texts begin with."""
    tokens = windows.flatten()
    drawn = tokens[np.linspace(0, len(tokens) - 1, FIRSTS).round().astype(int)]
    begin = stream.checkpoint.config.get("bos_token_id")
    if isinstance(begin, int) and 0 <= begin < stream.checkpoint.tensors["model.embed_tokens.weight"].shape[0]:
        drawn[::4] = begin
    return drawn[:, None]


def _sweep_block(stream: BlockStream, found: Statistics, layer: int) -> None:
    """Begin the next layer's file with its input, then complete this one's.

    Killed between the two, a resumption finds the next layer begun and this one without statistics: it looks for that.
    """
    hidden, block, sums, firsts = found._hidden(layer), stream.block(layer), _Sums(), dict[str, Tensor]()

    def run(windows: Tensor, together: int = _BATCH) -> Tensor:
        parts = windows.split(together)
        return torch.cat([block(part, *stream.state(layer, *part.shape[:2]))[0] for part in parts])

    def add(module: str, x: Tensor, _output: Tensor) -> None:
        if _is_kept(module):
            sums.add(module, x)

    def keep(module: str, x: Tensor, _output: Tensor) -> None:
        if _is_kept(module):
            firsts[f"{module}.first"] = x.flatten(0, -2)

    known = slice(SAMPLE, len(hidden) - found.held)
    with observed(block, f"model.layers.{layer}.", add):
        counted = run(hidden[known])
    with observed(block, f"model.layers.{layer}.", keep):
        alone = run(found._read(layer, "alone"), FIRSTS)
    outputs = torch.cat([run(hidden[: known.start]), counted, run(hidden[known.stop :])])
    _keep(found.directory, layer + 1, {"hidden": outputs, "alone": alone})
    # A layer of which nothing is left has no statistics; `swept` says that they are not missing.
    _keep(found.directory, layer, {"hidden": hidden[:SAMPLE], "swept": torch.ones(1), **sums.statistics(), **firsts})


def _is_kept(module: str) -> bool:
    return module.rpartition(".")[2] not in _READS


def _sweep_head(stream: BlockStream, found: Statistics) -> None:
    hidden, sums, norm = found._hidden(found.depth), _Sums(), stream.norm()
    for window in hidden[SAMPLE : -found.held]:
        sums.add(HEAD, norm(window))
    kept = torch.cat([hidden[:SAMPLE], hidden[-found.held :]])
    none = {f"{HEAD}.first": kept.new_empty(0, kept.shape[-1])}
    _keep(found.directory, stream.depth, {"hidden": kept, **sums.statistics(), **none})


def _is_complete(directory: Path, layer: int) -> bool:
    if not _file(directory, layer).exists():
        return False
    with safe_open(_file(directory, layer), "pt") as file:
        return not {"hidden", "alone"}.issuperset(file.keys())


class _Sums:
    """Running sums over the tokens that pass."""

    def __init__(self) -> None:
        self._gram: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._absmax: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, module: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        if module not in self._gram:
            width = x.shape[1]
            self._gram[module], self._sum[module] = torch.zeros(width, width), torch.zeros(width)
            self._absmax[module], self._tokens[module] = torch.zeros(width), 0
        self._gram[module].addmm_(x.T, x)
        self._sum[module] += x.sum(0)
        self._absmax[module] = torch.maximum(self._absmax[module], x.abs().amax(0))
        self._tokens[module] += len(x)

    def statistics(self) -> dict[str, Tensor]:
        made = {}
        for module, tokens in self._tokens.items():
            made[f"{module}.gram"] = self._gram[module] / tokens
            made[f"{module}.mean"] = self._sum[module] / tokens
            made[f"{module}.absmax"] = self._absmax[module]
        return made


def _file(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer:03}.safetensors"


def _keep(directory: Path, layer: int, tensors: dict[str, Tensor]) -> None:
    """Written aside and renamed: a file that is there is whole."""
    path = _file(directory, layer)
    aside = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
    aside.replace(path)
