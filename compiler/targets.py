"""What a compiled graph may hold, by the execution provider that will run it. Another provider is another entry.

An entry says which kernels there are. It is the record of a probe (`compiler/probe.py`) of ONNX Runtime 1.31.1, which
stands where the provider cannot be loaded, as when a graph for a GPU is compiled on a machine without one.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from dsopt.runtime.errors import DsoptError, UsageError

_BLOCKS = (16, 32, 64, 128, 256)
_NBITS = tuple(
    f"int{bits}{zero}{'' if block == 32 else f'-b{block}'}"
    for bits, zero, block in itertools.product((4, 8), ("", "-zp"), _BLOCKS)
)
_DYNAMIC = tuple(f"w{bits}a8{rows}{basis}" for bits in (8, 7) for rows in ("", "-token") for basis in ("", "-rot"))


@dataclass(frozen=True)
class Target:
    """An execution provider, as its graphs see it.

    `linears`: by float type of the activations (the first is the default) the formats of linear layers that have a
    kernel. `operators`: the float types of every other operator, () where floats do not matter.
    """

    name: str
    provider: str
    device: str  # as OrtValue and IO binding call it
    linears: Mapping[str, tuple[str, ...]]
    operators: Mapping[str, tuple[str, ...]]
    largest_head: int  # values of an attention head
    fuses_qk_norms: bool = False  # whether attention takes the norms of queries and keys
    caches: tuple[str, ...] = ("float",)  # of keys and values: float is the type of the rest
    rounds_activations: bool = True  # whether weight-only kernels make int8 of their inputs

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(self.linears)

    def check_dtype(self, dtype: str | None) -> str:
        """`dtype`, or the default. Raises DsoptError on one that has no kernels here."""
        if dtype is None:
            return self.dtypes[0]
        if dtype not in self.dtypes:
            raise DsoptError(f"--dtype {dtype}: {self.name} has kernels for {', '.join(self.dtypes)}")
        return dtype


_FLOAT_OPERATORS = (
    "GroupQueryAttention",
    "SkipSimplifiedLayerNormalization",
    "RMSNormalization",
    "GatherBlockQuantized",
    "Gather",
    "Slice",
    "Split",
    "Concat",
    "Sigmoid",
    "Mul",
    "Add",
    "Reshape",
    "Unsqueeze",
    "Cast",
)
_CPU_OPERATORS = (
    "AveragePool",
    "Abs",
    "ReduceMax",
    "Max",
    "Div",
    "Pad",
    "Gelu",
    "Tanh",
    "MatMul",
    "SimplifiedLayerNormalization",
    "DequantizeLinear",
    "Transpose",
)
_INTEGER_OPERATORS = ("ReduceSum", "Sub", "Shape", "Squeeze", "TopK", "Constant")


def _operators(*dtypes: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(_FLOAT_OPERATORS, dtypes) | dict.fromkeys(_INTEGER_OPERATORS, ())


TARGETS = {
    target.name: target
    for target in (
        Target(
            "cpu",
            "CPUExecutionProvider",
            "cpu",
            {"fp32": ("none", *_DYNAMIC, *_NBITS)},
            _operators("fp32") | dict.fromkeys(_CPU_OPERATORS, ("fp32",)),
            largest_head=1 << 16,
            caches=("float", "int8"),
        ),
        Target(
            "cuda",
            "CUDAExecutionProvider",
            "cuda",
            {"fp16": ("none", "fp8", *_NBITS), "bf16": ("none", "fp8", *_NBITS)},
            _operators("fp16", "bf16"),
            largest_head=256,
            fuses_qk_norms=True,
            caches=("float", "int8", "fp8"),
            rounds_activations=False,
        ),
    )
}


def find_target(name: str) -> Target:
    """Raises UsageError on an unknown name."""
    if name not in TARGETS:
        raise UsageError(f"--target is {name!r}; it must be one of {', '.join(TARGETS)}")
    return TARGETS[name]
