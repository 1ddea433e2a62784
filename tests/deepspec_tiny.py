"""Tiny random drafters of DeepSpec's formats, and their forward pass as in training, built on transformers' parts.

Training sees a whole text at once: all blocks side by side under one mask, next tokens given. That shares no code with
the compiler's modules, which draft one block behind a cache, and no order of computation.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gemma_tiny import GEMMA
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import Gemma4TextConfig, Qwen3Config
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

TARGET: dict[str, Any] = {
    "model_type": "qwen3", "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 1e5,
}  # fmt: skip
COMMON = {"num_target_layers": 4, "tie_word_embeddings": False}
BLOCK = {
    "architectures": ["Qwen3DSparkModel"], "num_hidden_layers": 2, "block_size": 4, "mask_token_id": 300,
    "num_anchors": 8, "target_layer_ids": [0, 2], "enable_confidence_head": False, "markov_rank": 0,
}  # fmt: skip
DSPARK = {**BLOCK, "enable_confidence_head": True, "markov_rank": 32}
ONE = {"num_hidden_layers": 1}  # a trace takes as long as there are layers
# Layers that see all and a window by turns; a drafter's see all, and its file says more about rotation than there is.
GEMMA4 = GEMMA | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA_ONE = ONE | {
    "layer_types": ["full_attention"],
    "rope_parameters": GEMMA["rope_parameters"] | {"rope_theta": None, "rope_type": "default"},
}
GEMMA_TWO = GEMMA_ONE | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
LLAMA = TARGET | {"model_type": "llama"}
# By name: the target's own fields, and the drafter's.
DRAFTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vanilla": (TARGET, DSPARK | {"markov_head_type": "vanilla", "confidence_head_with_markov": True}),
    "gated": (LLAMA, DSPARK | ONE | {"markov_head_type": "gated", "confidence_head_with_markov": False}),
    "rnn": (TARGET, DSPARK | ONE | {"markov_head_type": "rnn", "confidence_head_with_markov": True}),
    "unsure": (LLAMA, BLOCK | ONE | {"markov_rank": 32, "markov_head_type": "rnn", "head_norms": False}),
    "dflash": (LLAMA, BLOCK | ONE | {"head_norms": False}),
    "eagle3": (TARGET, ONE | {"architectures": ["Qwen3Eagle3Model"], "ttt_length": 4, "target_layer_ids": [0, 2],
                              "step_loss_decay": 0.8}),
    "gemma-vanilla": (GEMMA4, DSPARK | GEMMA_TWO | {"markov_head_type": "vanilla",
                                                    "confidence_head_with_markov": True}),
    "gemma-gated": (GEMMA4, DSPARK | GEMMA_ONE | {"markov_head_type": "gated", "confidence_head_with_markov": False}),
    "gemma-rnn": (GEMMA4, DSPARK | GEMMA_ONE | {"markov_head_type": "rnn", "confidence_head_with_markov": True}),
    "gemma-dflash": (GEMMA4, BLOCK | GEMMA_ONE),
    "gemma-eagle3": (GEMMA4, GEMMA_ONE | {"architectures": ["Gemma4Eagle3Model"], "ttt_length": 4,
                                          "target_layer_ids": [0, 2]}),
    "eagle3-llama": (LLAMA, ONE | {"ttt_length": 4, "target_layer_ids": [0, 2], "head_norms": False}),
}  # fmt: skip


def draft_weights(config: dict[str, Any], target: dict[str, np.ndarray], seed: int = 7) -> dict[str, np.ndarray]:
    """Random float32 weights with the names and shapes of DeepSpec; embedding and head are the target's."""
    rng = np.random.default_rng(seed)
    hidden, wide, gemma = config["hidden_size"], config["intermediate_size"], config["model_type"] == "gemma4_text"
    names = ("global_head_dim", "num_global_key_value_heads") if gemma else ("head_dim", "num_key_value_heads")
    head, groups = (config[name] for name in names)
    query, key = config["num_attention_heads"] * head, groups * head
    eagle = "ttt_length" in config
    reads = 2 * hidden if eagle else hidden
    layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (query, reads), "self_attn.k_proj": (key, reads), "self_attn.v_proj": (key, reads),
        "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    if config.get("head_norms", True):
        layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    if gemma:
        del layer["self_attn.v_proj"]
        layer |= {f"{place}_feedforward_layernorm": (hidden,) for place in ("pre", "post")}
    shapes: dict[str, tuple[int, ...]] = {"fc": (hidden, len(config["target_layer_ids"]) * hidden), "norm": (hidden,)}
    if eagle:
        layer["hidden_norm"] = (hidden,)
    else:
        shapes["hidden_norm"] = (hidden,)
    shapes |= {f"layers.{i}.{n}": s for i in range(config["num_hidden_layers"]) for n, s in layer.items()}
    biases: dict[str, tuple[int, ...]] = {}
    if rank := config.get("markov_rank", 0):
        shapes |= {"markov_head.markov_w1": (config["vocab_size"], rank)}
        shapes |= {"markov_head.markov_w2": (config["vocab_size"], rank)}
        extra = {"vanilla": {}, "gated": {"gate_proj": (rank, hidden + rank)},
                 "rnn": {"joint_proj": (3 * rank, 2 * rank + hidden)}}[config["markov_head_type"]]  # fmt: skip
        shapes |= {f"markov_head.{name}": shape for name, shape in extra.items()}
        biases |= {f"markov_head.{name}": shape[:1] for name, shape in extra.items()}
    if config.get("enable_confidence_head"):
        width = hidden + config["confidence_head_with_markov"] * config["markov_rank"]
        shapes["confidence_head.proj"], biases["confidence_head.proj"] = (1, width), (1,)
    made = {f"{n}.weight": rng.normal(0, 0.3, s) + (len(s) == 1) for n, s in shapes.items()}
    if gemma:
        made |= {f"layers.{i}.layer_scalar": rng.normal(1, 0.3, 1) for i in range(config["num_hidden_layers"])}
    made |= {f"{n}.bias": rng.normal(0, 0.3, s) for n, s in biases.items()}
    embedding = target["model.embed_tokens.weight"]
    own = {"embed_tokens.weight": embedding, "lm_head.weight": target.get("lm_head.weight", embedding)}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in {**made, **own}.items()}


def write_drafter(folder: Path, target: Path, fields: dict[str, Any], **changes: Any) -> Path:
    """A checkpoint for the target in `target`, as DeepSpec saves it."""
    config = {**json.loads((target / "config.json").read_text()), **COMMON, **fields, **changes}
    weights = draft_weights(config, load_file(target / "model.safetensors"))
    config.pop("head_norms", None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def open_reference(folder: Path) -> "Reference":
    config = json.loads((folder / "config.json").read_text())
    return (GemmaReference if config["model_type"] == "gemma4_text" else Reference)(folder)


class Reference:
    """The forward pass of a checkpoint of DeepSpec as its training does it."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {n: torch.from_numpy(w) for n, w in load_file(folder / "model.safetensors").items()}
        self.head, self.scale = self.config["head_dim"], self.config["head_dim"] ** -0.5
        self._rotary = self._make_rotary()

    def _make_rotary(self) -> Any:
        fields = {k: v for k, v in self.config.items() if k not in ("architectures", "layer_types")}
        return Qwen3RotaryEmbedding(Qwen3Config(**fields))

    def _embed(self, ids: Tensor) -> Tensor:
        return self.weights["embed_tokens.weight"][ids]

    def _head(self, rows: Tensor) -> Tensor:
        return self._linear("lm_head", rows)

    def _values(self, layer: str, seen: Tensor) -> Tensor:
        return self._heads(layer, "v", seen)

    def _finish(self, layer: str, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return x + self._mlp(layer, self._norm(f"{layer}.post_attention_layernorm", x))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in self.weights:
            return x
        norm = Qwen3RMSNorm(x.shape[-1], self.config["rms_norm_eps"])
        norm.weight.data = self.weights[f"{name}.weight"]
        return norm(x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _heads(self, layer: str, part: str, x: Tensor) -> Tensor:
        return self._linear(f"{layer}.self_attn.{part}_proj", x).unflatten(-1, (-1, self.head))

    def _attend(self, layer: str, read: Tensor, seen: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        """Rows `read` look at rows `seen`, of which the last are themselves; `positions` of seen."""
        query = self._norm(f"{layer}.self_attn.q_norm", self._heads(layer, "q", read)).transpose(0, 1)[None]
        key = self._norm(f"{layer}.self_attn.k_norm", self._heads(layer, "k", seen)).transpose(0, 1)[None]
        value = self._values(layer, seen).transpose(0, 1)[None]
        cos, sin = self._rotary(value, positions[None])
        padded = F.pad(query, (0, 0, len(seen) - len(read), 0))  # the rows of queries stand last
        query, key = apply_rotary_pos_emb(padded, key, cos, sin)
        groups = query.shape[1] // key.shape[1]
        scores = query[:, :, -len(read) :] @ repeat_kv(key, groups).mT * self.scale
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        mixed = (weights @ repeat_kv(value, groups))[0].transpose(0, 1).flatten(1)
        return self._linear(f"{layer}.self_attn.o_proj", mixed)

    def _mlp(self, layer: str, x: Tensor) -> Tensor:
        gate, up = (self._linear(f"{layer}.mlp.{part}_proj", x) for part in ("gate", "up"))
        return self._linear(f"{layer}.mlp.down_proj", self._activate(gate) * up)

    def _activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate)

    def blocks(self, taps: Tensor, tokens: list[int], anchors: list[int]) -> list[Tensor]:
        """DSpark and DFlash: taps [S, m * H] of a whole text, `tokens` of it; all blocks in one masked pass.

        Returns the rows behind the last norm of each block, [block_size, H] each.
        """
        size, length = self.config["block_size"], len(taps)
        context = self._norm("hidden_norm", self._linear("fc", taps))
        ids = torch.full((len(anchors), size), self.config["mask_token_id"])
        ids[:, 0] = torch.tensor([tokens[anchor] for anchor in anchors])
        x = self._embed(ids.flatten())
        starts = torch.tensor(anchors).repeat_interleave(size)
        positions = torch.cat([torch.arange(length), starts + torch.arange(size).repeat(len(anchors))])
        block = torch.arange(len(anchors)).repeat_interleave(size)
        allowed = torch.cat([torch.arange(length) < starts[:, None], block[:, None] == block], 1)
        for index in range(self.config["num_hidden_layers"]):
            layer = f"layers.{index}"
            read = self._norm(f"{layer}.input_layernorm", x)
            x = self._finish(layer, x, self._attend(layer, read, torch.cat([context, read]), positions, allowed))
        return list(self._norm("norm", x).split(size))

    def logits(self, rows: Tensor, previous: list[int]) -> tuple[Tensor, Tensor | None]:
        """Of the rows of a block whose tokens before are given: logits [rows, vocab] and confidence [rows]."""
        made = self._head(rows)
        rank, confidence = self.config["markov_rank"], None
        embedded = self.weights["markov_head.markov_w1.weight"][torch.tensor(previous)] if rank else rows[:, :0]
        if rank:
            made = made + self._linear("markov_head.markov_w2", self._features(rows, embedded))
        if self.config["enable_confidence_head"]:
            parts = [rows, embedded] if self.config["confidence_head_with_markov"] else [rows]
            confidence = self._linear("confidence_head.proj", torch.cat(parts, -1))[:, 0]
        return made, confidence

    def _features(self, rows: Tensor, embedded: Tensor) -> Tensor:
        if self.config["markov_head_type"] == "vanilla":
            return embedded
        if self.config["markov_head_type"] == "gated":
            return torch.sigmoid(self._linear("markov_head.gate_proj", torch.cat([rows, embedded], -1))) * embedded
        state, made = torch.zeros(embedded.shape[1]), []
        for row, token in zip(rows, embedded, strict=True):
            joint = self._linear("markov_head.joint_proj", torch.cat([state, token, row]))
            gate, candidate, output = joint.chunk(3)
            state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
            made.append(torch.tanh(output))
        return torch.stack(made)

    def unrolled(self, taps: Tensor, tokens: list[int], steps: int) -> list[Tensor]:
        """Eagle3's training-time test: at step k each row reads its own output of step k - 1 and the token k + 1
        behind it. Returns the logits of each step, [rows, vocab]; rows whose token is beyond the text are left out.
        """
        x, made, seen, spots = self._linear("fc", taps), [], [], []
        for step in range(steps):
            count = min(len(taps), len(tokens) - 1 - step)
            x = x[:count]
            ids = torch.tensor(tokens[1 + step : 1 + step + count])
            embedded = self._norm("layers.0.input_layernorm", self._embed(ids))
            both = torch.cat([embedded, self._norm("layers.0.hidden_norm", x)], -1)
            seen.append(both)
            spots.append(torch.arange(count) + step)
            own = torch.arange(count)[:, None]
            parts = [torch.arange(len(rows)) for rows in seen]
            allowed = torch.cat([parts[0] <= own, *(part == own for part in parts[1:])], 1)
            x = self._finish("layers.0", x, self._attend("layers.0", both, torch.cat(seen), torch.cat(spots), allowed))
            made.append(self._head(self._norm("norm", x)))
        return made


class GemmaReference(Reference):
    """With the parts of transformers' Gemma 4, and values made of keys."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.head, self.scale = self.config["global_head_dim"], 1.0

    def _make_rotary(self) -> Any:
        rope = {"full_attention": self.config["rope_parameters"]["full_attention"]}
        names = ("hidden_size", "num_attention_heads", "head_dim", "global_head_dim")
        sizes = {name: self.config[name] for name in names}
        config = Gemma4TextConfig(**sizes, num_hidden_layers=1, layer_types=["full_attention"], rope_parameters=rope)
        rotary = Gemma4TextRotaryEmbedding(config)
        return lambda x, positions: rotary(x, positions, "full_attention")

    def _norm(self, name: str, x: Tensor) -> Tensor:
        norm = Gemma4RMSNorm(x.shape[-1], self.config["rms_norm_eps"], with_scale=bool(name))
        if name:
            norm.weight.data = self.weights[f"{name}.weight"]
        return norm(x)

    def _embed(self, ids: Tensor) -> Tensor:
        return super()._embed(ids) * self.config["hidden_size"] ** 0.5

    def _head(self, rows: Tensor) -> Tensor:
        cap = self.config["final_logit_softcapping"]
        return torch.tanh(super()._head(rows) / cap) * cap

    def _values(self, layer: str, seen: Tensor) -> Tensor:
        return self._norm("", self._heads(layer, "k", seen))

    def _activate(self, gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")

    def _finish(self, layer: str, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self._norm(f"{layer}.post_attention_layernorm", attended)
        made = self._mlp(layer, self._norm(f"{layer}.pre_feedforward_layernorm", x))
        return (x + self._norm(f"{layer}.post_feedforward_layernorm", made)) * self.weights[f"{layer}.layer_scalar"]
