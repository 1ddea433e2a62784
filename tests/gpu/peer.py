"""The peer: transformers with torch.compile and a static cache, on the same device, the same sizes, random weights."""

import time
from collections.abc import Callable
from typing import Any

import torch

STEPS = 3  # first calls: compilation and the capture of its CUDA graphs


class Peer:
    """One model of transformers; a step is compiled, a prompt is not (its shapes are the user's)."""

    def __init__(self, config: dict[str, Any], device: str, dtype: str, *, compiled: bool) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {key: value for key, value in config.items() if key not in ("model_type", "name", "architectures")}
        self.config = AutoConfig.for_model(config["model_type"], **fields)
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype).eval()
        self.device = device
        self.forward = self.model.forward
        if compiled:
            self.forward = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def prompt(self, tokens: int) -> float:
        """Seconds of a prompt, the least of several."""
        from transformers import StaticCache

        ids = torch.randint(0, 256, (1, tokens), device=self.device)
        cache = StaticCache(config=self.config, max_cache_len=tokens + 8)
        return self._least(lambda: self.model(ids, past_key_values=cache, logits_to_keep=1), cache, rounds=4)

    @torch.no_grad()
    def step(self, batch: int, depth: int, tokens: int) -> float:
        """Seconds of one decoding step behind `depth` cached tokens, averaged over `tokens`."""
        from transformers import StaticCache

        cache = StaticCache(config=self.config, max_cache_len=depth + tokens + STEPS + 8)
        ids = torch.randint(0, 256, (batch, 1), device=self.device)
        if depth:
            self.model(torch.randint(0, 256, (batch, depth), device=self.device), past_key_values=cache,
                       logits_to_keep=1)  # fmt: skip
        start = 0.0
        for index in range(tokens + STEPS):
            if index == STEPS:
                self._wait()
                start = time.perf_counter()
            position = torch.arange(depth + index, depth + index + 1, device=self.device)
            torch.compiler.cudagraph_mark_step_begin()
            logits = self.forward(ids, past_key_values=cache, position_ids=position[None]).logits
            ids = logits[:, -1:].argmax(-1).clone()
        self._wait()
        return (time.perf_counter() - start) / tokens

    def _least(self, call: Callable[[], Any], cache: Any, rounds: int) -> float:
        times = []
        for _ in range(rounds):
            cache.reset()
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return min(times)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
