"""Exact mode: every run of generation has a number of rows that gives the same bits, so that the text is the same
with any drafter and with none.

Kernels are chosen by a run's shape, and rounding differs with them; at a near tie another token wins. On the CPUs seen
a single row is computed in its own way, and every wider run, of 2 to 32 rows, gives each row the same bits: the rows
do not look at each other, and padding a lonely row with another is enough. Which widths agree is found out together
with the verify curve. Where none do, every run has the same width.

What is promised: tokens and logits after the same prompt (or saved state) are the same bits with any drafter and with
none, on the same kind of CPU and version of ONNX Runtime. Seen to hold too, and tested on small models: for 1 and 2
threads, for a cache that grew on the way, for any of the widths that agree, up to the end of the context. Not
promised: across machines; for a prompt that is computed again in other pieces (a last piece of one row is a row
alone); against plain decoding, whose rows are alone; and against a batch, whose steps have one row a sequence and the
bits of plain decoding (ONNX Runtime's CPU attention verifies for no more than one sequence at a time).
"""

from dsopt.runtime.artifact import Artifact
from dsopt.runtime.curve import VerifyCurve
from dsopt.runtime.errors import DsoptError

WORTH = 0.05  # exactness that makes a plain step slower by no more than this is switched on with a drafter
_ALONE = (2, 4, 8, 16)  # widths to choose from where there can be only one
_SURVIVAL = 0.8  # of a drafted token, where a drafter is worth having
_DEPTH = 512


def exact_widths(curve: VerifyCurve) -> tuple[int, ...]:
    """The rows that a run may have. They depend on nothing but the curve, and so are the same with every drafter.

    Those that agree; where there are no two, the one with the most tokens a second, if four drafted tokens of five
    are right.
    """
    if len(curve.same_bits) > 1:
        return curve.same_bits
    alone = [width for width in _ALONE if width <= curve.widths[-1]]
    return (max(alone, key=lambda width: _expected(width) / curve.seconds(width, _DEPTH)),)


def exact_cost(curve: VerifyCurve, widths: tuple[int, ...]) -> float:
    """By what share the narrowest run is slower than one of a single row."""
    return max(curve.seconds(widths[0], _DEPTH) / curve.seconds(1, _DEPTH) - 1, 0.0)


def check_exact(artifact: Artifact) -> None:
    """Raises DsoptError where rows look at each other: w8a8 and w7a8 have one activation scale for all of a run."""
    if mixed := mixes_rows(artifact):
        raise DsoptError(
            f"--exact: {artifact.directory} has {mixed} w8a8 or w7a8 layers, where a token depends on those computed "
            "with it; compile it with --quant int8"
        )


def mixes_rows(artifact: Artifact) -> int:
    """The number of layers in which the rows of a run depend on one another; a gather reads each row by itself."""
    linears = [node for node in artifact.manifest.nodes if node["role"] != "embed"]
    return sum(str(node["format"]).startswith(("w8a8", "w7a8")) for node in linears)


def _expected(width: int) -> float:
    return sum(_SURVIVAL**position for position in range(width))
