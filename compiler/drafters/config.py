"""What a drafter's config.json says, told apart by fields: DFlash carries the class name of DSpark."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from dsopt.compiler.models import gemma4_text, kinds_of, llama, qwen3
from dsopt.runtime.errors import DsoptError

HEADS = ("vanilla", "gated", "rnn")
_FAMILIES: dict[object, type[llama.Config]] = {
    "llama": llama.Config,
    "qwen3": qwen3.Config,
    "gemma4_text": gemma4_text.Config,
    "gemma4_unified_text": gemma4_text.Config,
}
_MOST = 64  # rows of a block, a chain is unrolled as often
# Fields and tensors that only other layouts have, and what they are.
_FOREIGN_FIELDS = {
    "dflash_config": "z-lab's DFlash: its anchor row predicts nothing",
    "speculators_config": "vLLM speculators: its rows and vocabulary are others",
    "speculators_model_type": "vLLM speculators: its rows and vocabulary are others",
    "sample_from_anchor": "vLLM speculators: its rows and vocabulary are others",
    "dspark_block_size": "DeepSeek-V4 with its drafter inside (mixture of experts)",
}
_FOREIGN_TENSORS = {
    "d2t": "a reduced vocabulary (d2t)",
    "t2d": "a reduced vocabulary (t2d)",
    "mtp.": "DeepSeek-V4 with its drafter inside (mixture of experts)",
}


@dataclass(frozen=True)
class DraftConfig:
    """A drafter of DeepSpec. `decoder` has the shape of its layers and their number."""

    kind: str  # dspark | dflash | eagle3
    decoder: llama.Config
    head_norms: bool  # query and key are normed by heads
    taps: tuple[int, ...]  # layers of the target whose outputs it reads, -1 the embedding
    target_layers: int
    steps: int  # proposals a round
    mask_token: int = 0
    markov_rank: int = 0
    markov_head: str = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], tensors: Container[str]) -> "DraftConfig":
        """Read the config.json of a drafter whose tensors are named `tensors`.

        Raises DsoptError on another layout, a missing field or a value that cannot be run.
        """
        kind = _kind(config)
        family = _FAMILIES.get(config.get("model_type"))
        if family is None:
            raise DsoptError(
                f"config.json: the drafter reads hidden states of a {config.get('model_type')!r} model, a family that "
                f"dsopt does not compile yet; it drafts for {', '.join(map(str, _FAMILIES))}"
            )
        try:
            made = cls(
                kind=kind,
                decoder=family.from_dict({**config, "tie_word_embeddings": False}),
                head_norms="layers.0.self_attn.q_norm.weight" in tensors,
                taps=tuple(_integer(layer) for layer in config["target_layer_ids"]),
                target_layers=_integer(config["num_target_layers"]),
                **(_chain(config) if kind == "eagle3" else _block(config)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DsoptError(f"config.json: missing or malformed field ({error!r}) for a {kind} drafter") from error
        made._check()
        return made

    def _check(self) -> None:
        first = 0 if self.kind == "eagle3" else -1
        rising = all(a < b for a, b in zip(self.taps, self.taps[1:], strict=False))
        # The last layer's output is seen by the final norm alone: no drafter was trained on it.
        if not self.taps or not rising or not first <= self.taps[0] <= self.taps[-1] < self.target_layers - 1:
            raise DsoptError(
                f"config.json: target_layer_ids {list(self.taps)} must rise from {first} "
                f"to at most {self.target_layers - 2}"
            )
        if not 1 <= self.steps <= _MOST:
            raise DsoptError(f"config.json: {self.steps} proposals a round are not between 1 and {_MOST}")
        if not 0 <= self.mask_token < self.decoder.vocab_size:
            raise DsoptError(f"config.json: mask_token_id {self.mask_token} is not in the vocabulary")
        if self.markov_rank and self.markov_head not in HEADS:
            raise DsoptError(f"config.json: markov_head_type {self.markov_head!r} is none of {', '.join(HEADS)}")
        if self.markov_rank < 0 or (self.confidence_with_markov and not self.markov_rank):
            raise DsoptError(f"config.json: markov_rank {self.markov_rank} does not fit the other fields")
        if self.kind == "eagle3" and self.decoder.num_hidden_layers != 1:
            raise DsoptError(f"config.json: an eagle3 drafter has 1 layer, not {self.decoder.num_hidden_layers}")
        if len(kinds_of(self.decoder)) > 1:
            raise DsoptError("config.json: layer_types of a drafter must all be the same")


def check_layout(config: Mapping[str, Any], tensors: Container[str] | Mapping[str, Any]) -> None:
    """Raises DsoptError when a field or a tensor belongs to a drafter of another project."""
    for field, layout in _FOREIGN_FIELDS.items():
        if field in config:
            raise DsoptError(f"config.json has {field}: the drafter is of {layout}; DeepSpec's drafters work")
    if config.get("draft_vocab_size") not in (None, config.get("vocab_size")):
        raise DsoptError(
            f"config.json has draft_vocab_size {config['draft_vocab_size']}: the drafter has a reduced vocabulary; "
            "DeepSpec's drafters, which have the target's, work"
        )
    for name in tensors if isinstance(tensors, Mapping) else ():
        for start, layout in _FOREIGN_TENSORS.items():
            if name == start or (start.endswith(".") and name.startswith(start)):
                raise DsoptError(f"the drafter has the tensor {name}: it is of {layout}; DeepSpec's drafters work")


def _kind(config: Mapping[str, Any]) -> str:
    if "target_layer_ids" not in config:
        raise DsoptError("config.json has no target_layer_ids: this is no drafter of DeepSpec (DSpark, DFlash, Eagle3)")
    if "block_size" in config:
        return "dspark" if config.get("markov_rank") or config.get("enable_confidence_head") else "dflash"
    if "ttt_length" in config:
        return "eagle3"
    raise DsoptError("config.json has neither block_size nor ttt_length: this is no drafter of DeepSpec")


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
    rank, confidence = _integer(config["markov_rank"]), bool(config["enable_confidence_head"])
    return {
        "steps": _integer(config["block_size"]),
        "mask_token": _integer(config["mask_token_id"]),
        "markov_rank": rank,
        "markov_head": str(config["markov_head_type"]) if rank else "vanilla",
        "confidence": confidence,
        "confidence_with_markov": confidence and bool(config["confidence_head_with_markov"]),
    }


def _chain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"steps": _integer(config["ttt_length"])}


def _integer(value: object) -> int:
    if type(value) is not int:
        raise ValueError(value)
    return value
