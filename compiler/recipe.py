"""What to do to a model, as one small language: `int4`, `int4-zp,head=int8,down=int8`, `w8a8,embed=int8`.

The first word is the format of every linear layer; `ROLE=FORMAT` overrides it for some. A format is

    none            float32
    int4 int8       weight-only, MatMulNBits: per block of the input dimension a scale and, with `-zp`, a zero point
    int4-min        per block a scale and a real minimum, as in GGUF's Q4_1 and Q4_K, which it stores without loss:
                    an integer zero point, and what it misses as weights of the inputs' block means
    w8a8            int8 weights per output channel, activations quantized on the fly: DynamicQuantizeMatMul. The head
                    stays int8 unless said: one activation scale for all rows would make logits depend on their number
    w7a8            the same with 7 bits: for processors without VNNI, which are faster at signed weights but add two
                    products in 16 bits, where 8 bits may overflow. GPTQ makes up for most of the bit
    w8a8-token      w8a8 with a scale for each token, for inputs whose rows differ: of o and down; and w7a8-token
    w8a8-rot        w8a8 of inputs that are rotated first, up to 64 channels together, so that none stands out;
                    w8a8-token-rot for down, whose inputs no norm has made alike (smoothed, w8a8-rot will do); and
                    w7a8-rot, w7a8-token-rot
    fp8             float8 (e4m3) with a scale per 128 inputs: MatMulBlockQuantizedFp8Weight, on CUDA only

with `-b16 ... -b256` for the block size (32 unless said). Roles are q k v o gate up down head embed and the groups
qkv, attn, mlp. `dtype=fp16` or `dtype=bf16` is the type of everything else, float32 unless said;
`cache=int8` stores keys and values in 8 bits with a scale a channel, `cache=fp8` in float8, on CUDA only.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dsopt.compiler.roles import GROUPS, ROLES
from dsopt.runtime.errors import UsageError

_PLAIN: dict[str, tuple[Any, ...]] = {
    "none": (),
    "w8a8": ("w8a8", 8),
    "w8a8-token": ("w8a8", 8, 0, False, False, True),
    "w7a8": ("w8a8", 7),
    "w7a8-token": ("w8a8", 7, 0, False, False, True),
    **{f"w{bits}a8-rot": ("w8a8", bits, 0, False, False, False, True) for bits in (8, 7)},
    **{f"w{bits}a8-token-rot": ("w8a8", bits, 0, False, False, True, True) for bits in (8, 7)},
    "fp8": ("fp8", 8, 128),
}
CACHES = ("float", "int8", "fp8")
DTYPES = ("fp32", "fp16", "bf16")
_FORMAT = re.compile(r"(none|w[78]a8(?:-token)?(?:-rot)?|fp8|int4|int8)(-zp|-min)?(?:-b(16|32|64|128|256))?")


@dataclass(frozen=True)
class Format:
    """How the weight of one linear layer is stored and multiplied."""

    kernel: str = "none"  # none | nbits | w8a8 (with 8 or 7 bits) | fp8
    bits: int = 32
    block: int = 0
    zero_points: bool = False
    minima: bool = False  # a real one for each block; zero_points is set too
    per_token: bool = False  # of w8a8: a scale for each row of the activations
    rotated: bool = False  # of w8a8: activations in another basis

    @classmethod
    def parse(cls, text: str) -> "Format":
        match = _FORMAT.fullmatch(text)
        if match is None:
            raise UsageError(
                f"--quant: {text!r} is no format; none, int4, int8, w8a8, w7a8, fp8, with -zp and -b32 and the like"
            )
        kind, zero_points, block = match.groups()
        if kind in _PLAIN:
            if zero_points or block:
                raise UsageError(f"--quant: {text!r}: {kind} has neither zero points nor a choice of blocks")
            return cls(*_PLAIN[kind])
        if kind == "int8" and zero_points == "-min":
            raise UsageError(f"--quant: {text!r}: 8 bits have no use for minima; int8-zp has zero points")
        return cls("nbits", int(kind[3:]), int(block or 32), bool(zero_points), zero_points == "-min")

    def nbytes(self, n: int, k: int, width: int = 4) -> int:
        """Bytes of a weight [n, k]: codes, scales, zero points; `width` is that of a float of the graph."""
        if self.kernel == "none":
            return width * n * k
        if self.kernel == "w8a8":
            return n * k + 4 * n
        blocks = self.blocks(k)
        if self.kernel == "fp8":
            return n * k + 4 * n * blocks
        zeros = -(-blocks * self.bits // 8) if self.zero_points else 0
        return n * (blocks * self.block * self.bits // 8 + width * blocks + zeros)

    def blocks(self, k: int) -> int:
        """Blocks that a row of k weights takes, those of the block means included."""
        blocks = -(-k // self.block)
        return blocks + (-(-blocks // self.block) if self.minima else 0)

    def __str__(self) -> str:
        if self.kernel == "w8a8":
            return f"w{self.bits}a8" + "-token" * self.per_token + "-rot" * self.rotated
        if self.kernel != "nbits":
            return self.kernel
        offset = "-min" if self.minima else "-zp" * self.zero_points
        return f"int{self.bits}{offset}{'' if self.block == 32 else f'-b{self.block}'}"


HEAD = "lm_head"  # the head's module name, also where its weight is the embedding's

# What `auto` is where nothing is searched: beside pruning, a drafter, a card.
PRESETS = {"auto": "int8"}


@dataclass(frozen=True)
class Recipe:
    """The format of each role; `text` is the recipe as the user would write it, and the same however it was written:
    orders of the same model meet."""

    text: str
    default: Format
    roles: Mapping[str, Format] = field(default_factory=dict)
    modules: Mapping[str, Format] = field(default_factory=dict)  # by module name; goes before the role
    dtype: str = "fp32"
    cache: str = "float"  # float: as dtype | int8 | fp8

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """Raises UsageError on an unknown format or role."""
        first, *overrides = [part.strip() for part in text.split(",")]
        first = PRESETS.get(first, first)
        roles: dict[str, Format] = {}
        dtype, cache, said_dtype = "fp32", "float", False
        for override in overrides:
            role, _, value = override.partition("=")
            if role == "dtype":
                dtype, said_dtype = _check_dtype(value), True
                continue
            if role == "cache":
                cache = _check_cache(value)
                continue
            known = (*ROLES, "embed", *GROUPS)
            if role not in known or not value:
                raise UsageError(f"--quant: {override!r} is not ROLE=FORMAT; roles: {' '.join(known)}")
            roles |= dict.fromkeys(GROUPS.get(role, (role,)), Format.parse(value))
        embed = roles.get("embed", Format())
        if embed.kernel == "fp8" or embed.minima or embed.per_token:
            raise UsageError(f"--quant: no gather reads {embed}, so an embedding cannot have it; embed=int8 works")
        if roles.get("head", Format()).per_token:  # and ONNX Runtime finds no maxima of no rows, all of a chunk's
            raise UsageError(f"--quant: head={roles['head']}: a norm has made its rows alike; head=w8a8-rot works")
        default = Format.parse(first)
        if default.kernel == "w8a8":
            roles.setdefault("head", Format("nbits", 8, 32))
        words = [str(default), *_spelled(default, roles)]
        words += [f"cache={cache}"] if cache != "float" else []
        words += [f"dtype={dtype}"] if said_dtype else []
        return cls(",".join(words), default, roles, dtype=dtype, cache=cache)

    @property
    def float_bytes(self) -> int:
        """Of a float of the graph that is not a code."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def said_dtype(self) -> str | None:
        """The float type that the recipe says, None where it leaves it to the target."""
        return self.dtype if "dtype=" in self.text else None

    def with_dtype(self, dtype: str) -> "Recipe":
        """The same with this float type. Raises UsageError where the recipe says another."""
        if self.said_dtype is not None and dtype != self.dtype:
            raise UsageError(f"--dtype is {dtype}, --quant says dtype={self.dtype}; leave one of them out")
        if dtype == self.dtype:  # fp32, which need not be said any more where it is the target's
            return replace(self, text=self.text.removesuffix(",dtype=fp32"))
        return replace(self, text=f"{self.text},dtype={_check_dtype(dtype)}", dtype=dtype)

    def format(self, role: str, module: str = "") -> Format:
        return self.modules.get(module) or self.roles.get(role, self.default)

    def embedding(self, width: int) -> Format:
        """The table of the embedding: as said, else as the head (so that a tied table can be stored once).

        Of a head with minima no gather reads the layout; 8 bits in blocks stand in. Rows of `width` that are not whole
        blocks stay float: a gather cannot read a padded row.
        """
        form = _readable(self.roles.get("embed", self.format("head", HEAD)))
        return Format() if form.kernel == "nbits" and width % form.block else form


def _readable(form: Format) -> Format:
    """What a gather can read, where the head has `form`."""
    if form.kernel == "fp8":
        return Format()
    return Format("nbits", 8, 32) if form.minima else form


def _spelled(default: Format, roles: Mapping[str, Format]) -> Iterator[str]:
    """ROLE=FORMAT in one order, groups where they say the same, without what goes without saying."""
    implied = Format("nbits", 8, 32) if default.kernel == "w8a8" else default
    head = roles.get("head", implied)
    if head != implied:
        yield f"head={head}"
    if roles.get("embed", _readable(head)) != _readable(head):
        yield f"embed={roles['embed']}"
    left = {role: form for role, form in roles.items() if role not in ("head", "embed") and form != default}
    for name in ("attn", "qkv", "mlp", *ROLES):
        group = GROUPS.get(name, (name,))
        if len({left.get(role) for role in group}) == 1 and group[0] in left:
            yield f"{name}={left[group[0]]}"
            left = {role: form for role, form in left.items() if role not in group}


def _check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return dtype


def _check_cache(cache: str) -> str:
    if cache not in CACHES:
        raise UsageError(f"--quant: cache={cache} is unknown; cache={' or cache='.join(CACHES)}")
    return cache
