"""What can be chosen for the head, and what it costs with the embedding that shares its codes."""

from functools import cache

import torch
from torch import Tensor
from torch.func import functional_call

from dsopt.compiler.calibrate import Statistics
from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.gptq import error_feedback
from dsopt.compiler.passes.quantize_linears import GPTQ_COLUMNS, is_exact
from dsopt.compiler.quantizers import quantize_columns
from dsopt.compiler.recipe import HEAD, Format
from dsopt.compiler.rotation import rotated_columns, rotated_gram, run_time_block
from dsopt.compiler.rounding import dynamic_values, nearest, rounded, values_of
from dsopt.compiler.sensitivity import Observed, divergence
from dsopt.compiler.sites import Arithmetic, Choice, Site, fed_back_blocks, offered_formats
from dsopt.compiler.smoothing import column_maxima, smoothed_gram, smoothing_scales
from dsopt.compiler.stream import BlockStream
from dsopt.runtime.errors import DsoptError

_ALPHA = 0.5  # rotated too: with 0.65 the head of SmolLM2 loses as much in 8 bits and a fifth more in 7


def _suits_head(form: Format) -> bool:
    """A norm has made the head's rows alike; channels that stand out are rotated."""
    return (
        form.kernel in ("none", "fp8")
        or (form.kernel == "nbits" and not form.minima)
        or (form.kernel == "w8a8" and form.rotated and not form.per_token)
    )


def price_head(
    checkpoint: Checkpoint,
    head: torch.nn.Sequential,
    statistics: Statistics,
    arithmetic: Arithmetic,
    gradient: Tensor,
    name: str,
) -> Site:
    """The head's site, priced by the divergence itself: its outputs are the logits. `name` is its weight's.

    The embedding has the head's format: what that costs, by `gradient` at the embeddings, is part of the price.

    Raises DsoptError where no format fits: rows that are not whole blocks.
    """
    norm, linear = head
    assert isinstance(linear, torch.nn.Linear)
    x = norm(statistics.hidden(statistics.depth)[:, ::4]).flatten(0, 1)
    w = linear.weight
    log_p = linear(x).log_softmax(-1)
    n, k = w.shape
    site = Site(HEAD, (HEAD,), None, n, k, copies=2 if name == f"{HEAD}.weight" else 1)
    formats = offered_formats(k, arithmetic)
    gram = statistics.input(HEAD).gram
    in_blocks = cache(lambda: error_feedback(gram, *fed_back_blocks(formats)))
    scales, block = smoothing_scales(statistics.input(HEAD).absmax, column_maxima([w]), _ALPHA), run_time_block(k)
    in_columns = cache(lambda: error_feedback(rotated_gram(smoothed_gram(gram, scales), block), GPTQ_COLUMNS))
    for form in formats:
        if not _suits_head(form):
            continue
        if form.kernel == "w8a8":
            by = in_columns() if form.bits < 8 else None
            read, weight = dynamic_values(x, w, scales, form, block, by)
        else:
            seen, exact = [Observed(x, w, x, x)], [is_exact(checkpoint.tensors[name], form)]
            weight = rounded(seen, exact, form, in_blocks, arithmetic.floats)[0]
            read = arithmetic.inputs(x, form)
        log_q = functional_call(linear, {"weight": weight}, read).log_softmax(-1)
        price = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        if form.kernel in ("nbits", "w8a8"):  # beside any other head the embedding stays float
            table = weight if site.copies == 1 else None
            price += _price_embedding(checkpoint, statistics, gradient, form, table, scales)
        site.prices[Choice(form, _ALPHA if form.kernel == "w8a8" else None)] = price
    if any(choice.alpha for choice in site.prices):
        site.scales[_ALPHA] = scales
    if not site.prices:
        raise DsoptError(f"--quant auto: rows of {w.shape[1]} are not whole blocks of 32; --quant int8 does without")
    return site


def _price_embedding(
    checkpoint: Checkpoint,
    statistics: Statistics,
    gradient: Tensor,
    form: Format,
    table: Tensor | None,
    scales: Tensor,
) -> float:
    """`table` [vocab, width] is the rounded one where the head has it, in its kernel's basis and smoothed by `scales`
    [width] if that is w8a8; an embedding of its own is rounded by rows."""
    y = statistics.hidden(0).flatten(0, 1)
    seen, block = (
        Observed(y, y, y, gradient.flatten(0, 1), len(gradient)),
        run_time_block(y.shape[1]) if form.rotated else None,
    )
    if table is not None:
        embedding = BlockStream(checkpoint).blank(lambda model: model.model.embed_tokens)
        ids = torch.from_numpy(statistics.windows[: len(gradient)]).flatten()
        rows = functional_call(embedding, {"weight": table}, ids)
        return divergence([seen], [rotated_columns(rows, block, back=True) / scales if form.kernel == "w8a8" else rows])
    if form.kernel == "w8a8":
        codes, steps = quantize_columns(rotated_columns(y, block), form.bits)
        return divergence([seen], [rotated_columns(codes.float() * steps[:, None], block, back=True)])
    if is_exact(checkpoint.tensors["model.embed_tokens.weight"], form):
        return 0.0
    return divergence([seen], [values_of(nearest(y, form), y.shape[1])])
