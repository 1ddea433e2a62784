"""A tiny Gemma 4: two layers that see a window, one that sees all with wider heads and one projection for keys and
values."""

from typing import Any

GEMMA: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "final_logit_softcapping": 6.0, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e3},
    },
}  # fmt: skip
