"""Where a choice is to be made, what can be chosen, and what each choice costs in quality.

A site is an input and the linear layers that read it: q, k, v of a layer are one, gate and up are one, for they run
as one packed kernel. A choice is a weight format and, for kernels that quantize activations by the tensor, the exponent
of a smoothing and whether the context of attention is rotated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from dsopt.compiler.calibrate import InputStatistics, Statistics
from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.gptq import Feedback, error_feedback
from dsopt.compiler.passes.quantize_linears import GPTQ_COLUMNS, is_exact
from dsopt.compiler.recipe import Format
from dsopt.compiler.rotation import rotated_gram, run_time_block
from dsopt.compiler.rounding import dynamic, quantize_activations, rounded
from dsopt.compiler.sensitivity import Observed, divergence, sink_weight
from dsopt.compiler.smoothing import column_maxima, repeat_channels, shared_channels, smoothed_gram, smoothing_scales
from dsopt.compiler.targets import Target

FORMATS = tuple(
    Format.parse(text)
    for text in (*(f"w{bits}a8{rows}{basis}" for bits in (8, 7) for rows in ("", "-token") for basis in ("", "-rot")),
                 "int8", "int8-b64", "int8-b128", "int4-min", "int4-zp", "int4-zp-b64", "int4", "int4-b64")
)  # fmt: skip
# Of a target whose kernels leave activations as they are, where its table has them.
WEIGHT_ONLY = tuple(
    Format.parse(text)
    for text in ("none", "fp8", "int8", "int8-b128", "int4", "int4-b64", "int4-b128", "int4-zp", "int4-zp-b128")
)
ALPHAS = (0.5, 0.65, 0.8)
_FAR = 2.0  # times the least price
_FEW_ALPHAS = (0.65,)  # where rows have scales of their own, or are rotated, channels need less
_UNLIKE = ("o_proj", "down_proj")  # what reads rows that no norm has made alike
_GROUPS = {"q_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",), "gate_proj": ("gate_proj", "up_proj"),
           "down_proj": ("down_proj",)}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    format: Format
    alpha: float | None = None
    rotated: bool = False

    def __str__(self) -> str:
        return f"{self.format}{'' if self.alpha is None else f' smoothed {self.alpha:g}'}{' rotated' * self.rotated}"


@dataclass(frozen=True)
class Arithmetic:
    """What a target's kernels compute with: `formats` to choose from, the float type of scales and plain weights,
    and whether weight-only kernels round their inputs."""

    formats: tuple[Format, ...]
    floats: torch.dtype = torch.float32
    rounds: bool = True

    @classmethod
    def of(cls, target: Target, dtype: str) -> "Arithmetic":
        """The candidates that `target` has kernels for, with activations of type `dtype`."""
        if target.rounds_activations:
            return CPU
        known = target.linears[dtype]
        formats = tuple(form for form in WEIGHT_ONLY if str(form) in known)
        return cls(formats, {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype], rounds=False)

    def inputs(self, x: Tensor, form: Format) -> Tensor:
        """What the kernel of `form` makes of activations x [T, K]."""
        return quantize_activations(x, form.block) if self.rounds and form.kernel == "nbits" else x


CPU = Arithmetic(FORMATS)
_COARSE = {Format.parse(text) for text in ("int4-zp-b64", "int4", "int4-b64")}
_LOOSE = 0.03  # nats
_FEW_CHANNELS = 16  # rotated together even out little


def worth_pricing(arithmetic: Arithmetic, loss: float, *, is_small: bool) -> Arithmetic:
    """Without the formats that a tight budget has no use for, where there is no limit on the size either (`is_small`):
    pricing these takes a third of the time, and what they are faster than the finest of 4 bits is a tenth."""
    if not arithmetic.rounds or is_small or loss >= _LOOSE:
        return arithmetic
    return replace(arithmetic, formats=tuple(form for form in arithmetic.formats if form not in _COARSE))


@dataclass
class Site:
    """`name` is the first module's; `prices` in nats a token (KL divergence); `scales` by alpha, of the smoothings.

    `copies` is 2 where another matrix of this size has the same format: a table beside a head that is not tied to it.
    `kept` of an o_proj: the site that makes its values, and the format in which those keep the codes of their file. A
    rotation would round them again, which no price of that site knows: the two choices exclude each other.
    `sink`: by which GPTQ weighs the first tokens of texts, see `sensitivity.sink_weight`.
    """

    name: str
    modules: tuple[str, ...]
    layer: int | None
    n: int
    k: int
    prices: dict[Choice, float] = field(default_factory=dict)
    scales: dict[float, Tensor] = field(default_factory=dict)
    copies: int = 1
    kept: tuple[str, Format] | None = None
    sink: float = 0.0

    def nbytes(self, form: Format, width: int = 4) -> int:
        """Of the site's weights, and of the embedding with the head's; `width` is that of a float of the graph."""
        if self.layer is None and form.kernel == "fp8":  # no gather reads it: the table stays float
            return form.nbytes(self.n, self.k) + width * self.n * self.k
        return self.copies * form.nbytes(self.n, self.k, width)


class Pricer:
    """Prices the sites of each layer as a sweep back passes it (`sensitivity.sweep_back` calls it)."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        statistics: Statistics,
        head_dim: int | None,
        arithmetic: Arithmetic = CPU,
    ) -> None:
        """`head_dim` is None where values are normed, so that o_proj's inputs cannot be smoothed by v_proj's rows."""
        self.checkpoint, self.statistics, self.head_dim = checkpoint, statistics, head_dim
        self.arithmetic = arithmetic
        self.sites: list[Site] = []

    def __call__(self, layer: int, seen: dict[str, Observed]) -> None:
        with torch.no_grad():
            # A layer that was pruned may lack its attention or its feed-forward.
            leaves = {module.rpartition(".")[2] for module in seen}
            made = [self._site(layer, first, seen) for first in _GROUPS if first in leaves]
        for site in made:
            if any(choice.rotated for choice in site.prices):
                site.kept = self._kept_values(made)
        self.sites[:0] = made  # the sweep goes back, the list goes forth

    def _site(self, layer: int, first: str, seen: dict[str, Observed]) -> Site:
        modules = [module for leaf in _GROUPS[first] for module in seen if module.endswith(f".{leaf}")]
        linears = [seen[module] for module in modules]
        k = linears[0].x.shape[1]
        site = Site(modules[0], tuple(modules), layer, sum(linear.w.shape[0] for linear in linears), k)
        site.sink = sink_weight(linears)
        inputs = self.statistics.input(site.name)
        weighted = inputs.weighted(site.sink)
        formats = offered_formats(k, self.arithmetic)
        feedback = cache(lambda: error_feedback(weighted, *fed_back_blocks(formats)))
        heads = self._heads(layer, seen)

        @cache
        def in_basis(alpha: float | None, head: int | None) -> Feedback:
            gram = smoothed_gram(weighted, _channel_scales(site, alpha, heads))
            return error_feedback(rotated_gram(gram, head), GPTQ_COLUMNS)

        for form in formats:
            if form.kernel == "w8a8":
                if _suits(form, first, heads):
                    if form.bits == 8:
                        self._price_smoothed(site, linears, inputs, form, heads)
                    else:
                        self._price_fed_back(site, linears, form, heads, in_basis)
            else:
                exact = [self._is_exact(module, form) for module in modules]
                weights = rounded(linears, exact, form, feedback, self.arithmetic.floats)
                x = self.arithmetic.inputs(linears[0].x, form)
                site.prices[Choice(form)] = divergence(linears, [x @ w.T for w in weights])
        return site

    def _kept_values(self, made: list[Site]) -> tuple[str, Format] | None:
        """The site of v_proj, and the format among its choices that has the file's own codes, if one has."""
        for site in made:
            for module in site.modules:
                if module.endswith(".v_proj"):
                    forms = [choice.format for choice in site.prices if self._is_exact(module, choice.format)]
                    return (site.name, forms[0]) if forms else None
        return None

    def _is_exact(self, module: str, form: Format) -> bool:
        return is_exact(self.checkpoint.tensors[f"{module}.weight"], form)

    def _heads(self, layer: int, seen: dict[str, Observed]) -> tuple[int, int] | None:
        """Query heads and key-value heads of a layer; None without attention or where its values are normed."""
        leaves = [seen.get(f"model.layers.{layer}.self_attn.{leaf}") for leaf in ("q_proj", "k_proj")]
        if self.head_dim is None or None in leaves:
            return None
        heads, kv_heads = (leaf.w.shape[0] // self.head_dim for leaf in leaves if leaf)
        return heads, kv_heads

    def _price_smoothed(
        self,
        site: Site,
        linears: list[Observed],
        inputs: InputStatistics,
        form: Format,
        heads: tuple[int, int] | None,
    ) -> None:
        maxima, absmax = column_maxima([linear.w for linear in linears]), inputs.absmax
        is_context = site.name.endswith("o_proj")
        block = run_time_block(site.k) if form.rotated else None
        if is_context and heads is None:
            site.prices[Choice(form)] = dynamic(linears, torch.ones_like(maxima), form, block)
            return
        heads = heads if is_context else None
        head = site.k // heads[0] if heads else None
        if heads:
            absmax, maxima = shared_channels(absmax, *heads), shared_channels(maxima, *heads)
        for alpha in (None, *_alphas(form)):
            scales = torch.ones_like(maxima) if alpha is None else smoothing_scales(absmax, maxima, alpha)
            if alpha is not None:
                site.scales[alpha] = scales
            whole = repeat_channels(scales, *heads) if heads else scales
            site.prices[Choice(form, alpha)] = dynamic(linears, whole, form, block)
            if head:
                site.prices[Choice(form, alpha, rotated=True)] = dynamic(linears, whole, form, head)

    def _price_fed_back(
        self,
        site: Site,
        linears: list[Observed],
        form: Format,
        heads: tuple[int, int] | None,
        feedback: Callable[[float | None, int | None], Feedback],
    ) -> None:
        """With fewer bits than 8 weights are rounded by GPTQ, which takes time: in the way that is best without it.

        `feedback` is for inputs smoothed by an alpha and rotated in heads of a size.
        """

        def price(choice: Choice, *, fed_back: bool) -> float:
            head = run_time_block(site.k) if form.rotated else site.k // heads[0] if heads and choice.rotated else None
            scales = _channel_scales(site, choice.alpha, heads)
            return dynamic(linears, scales, form, head, feedback(choice.alpha, head) if fed_back else None)

        # What is best with 8 bits leaves too much to coarser weights, but what is far worse there is not best here.
        known = {choice: found for choice, found in site.prices.items() if choice.format == replace(form, bits=8)}
        likely = [replace(c, format=form) for c, found in known.items() if found <= _FAR * min(known.values())]
        best = replace(min(known, key=known.__getitem__), format=form) if known else Choice(form)
        if len(likely) > 1:
            best = min(likely, key=lambda choice: price(choice, fed_back=False))
        for rotated in {best.rotated, False}:  # values that keep the codes of a file are not rotated
            site.prices[replace(best, rotated=rotated)] = price(replace(best, rotated=rotated), fed_back=True)


def _suits(form: Format, first: str, heads: tuple[int, int] | None) -> bool:
    """Whether a kernel with activations of 8 bits is worth its price for the layers that read one input.

    Not where another is nearly as fast and loses far less: the context of attention is rotated with its values for
    nothing, where these have no norm (`heads`), and of an MLP's product the channels must be rotated, and rows mostly
    have scales of their own. (In 8 bits it is priced as it comes nevertheless, to show it.)
    """
    if first == "down_proj":
        return form.rotated or form.bits == 8
    if form.rotated:
        return form.per_token == (first in _UNLIKE) and not (first == "o_proj" and heads)
    return first in _UNLIKE or not form.per_token


def _alphas(form: Format) -> tuple[float, ...]:
    if form.rotated and form.per_token:
        return ()
    return _FEW_ALPHAS if form.rotated or form.per_token else ALPHAS


def _channel_scales(site: Site, alpha: float | None, heads: tuple[int, int] | None) -> Tensor:
    """What each input of the site is divided by, [K]; where heads share a smoothing its channels are repeated."""
    scales = torch.ones(site.k) if alpha is None else site.scales[alpha]
    return repeat_channels(scales, *heads) if heads and len(scales) < site.k else scales


def offered_formats(k: int, arithmetic: Arithmetic = CPU) -> list[Format]:
    """What rows of k weights can have. With 8 bits the largest two blocks: smaller ones cost time and spare no loss."""
    fitting = [form for form in arithmetic.formats if form.kernel != "nbits" or k % form.block == 0]
    if run_time_block(k) < _FEW_CHANNELS:
        fitting = [form for form in fitting if not form.rotated]
    eights = [form for form in fitting if form.kernel == "nbits" and form.bits == 8]
    return [form for form in fitting if form not in eights[:-2]]


def fed_back_blocks(formats: list[Format]) -> list[int]:
    """The sizes of blocks that GPTQ rounds, falling: one order of the channels is for all."""
    return sorted({form.block for form in formats if form.kernel == "nbits" and form.bits < 8}, reverse=True)
