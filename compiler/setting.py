"""What a search chooses among, on which target, by whose times; and what runs its builds to judge them."""

import dataclasses
from dataclasses import dataclass

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.probe import adds_in_16_bits, probed
from dsopt.compiler.sites import CPU, Arithmetic
from dsopt.runtime.devices import cpu_lacks, missing_provider
from dsopt.runtime.errors import DsoptError


@dataclass(frozen=True)
class Setting:
    """The target, and what is known of it before a model is looked at."""

    target: str = "cpu"
    dtype: str = "fp32"
    arithmetic: Arithmetic = CPU
    device: str = "cpu"  # that judges: the target's, or the CPU in its place
    table: KernelTable | None = None  # of another machine; None: this one is timed

    @classmethod
    def open(cls, checkpoint: Checkpoint, target: str, dtype: str | None, table: KernelTable | None) -> "Setting":
        """Raises DsoptError where `table` is of another target or float type, and where the target is not here and
        there is no table, or the CPU cannot run what is built for it."""
        chosen = probed(target)
        dtype = chosen.check_dtype(dtype)
        arithmetic, device = Arithmetic.of(chosen, dtype), chosen.device
        if missing := missing_provider(chosen.provider):
            arithmetic, device = _without_device(arithmetic, checkpoint, dtype, missing, table), "cpu"
        if table is not None:
            arithmetic = _timed(arithmetic, table, target, dtype)
        elif any(f.bits == 7 for f in arithmetic.formats) and not adds_in_16_bits():
            arithmetic = dataclasses.replace(arithmetic, formats=tuple(f for f in arithmetic.formats if f.bits != 7))
        return cls(target, dtype, arithmetic, device, table)


HERE = Setting()  # the CPU's


def _without_device(
    arithmetic: Arithmetic, checkpoint: Checkpoint, dtype: str, missing: str, table: KernelTable | None
) -> Arithmetic:
    """What the CPU can stand in for. Its MatMulNBits rounds activations, so a loss comes out higher than there."""
    if table is None:
        raise DsoptError(
            f"a search times the kernels of the target, and {missing}; give --profile of a machine that has it, or a "
            "recipe, such as --quant int8"
        )
    if lacks := cpu_lacks(str(checkpoint.config.get("model_type")), dtype):
        raise DsoptError(
            f"a search runs what it builds, and {missing}; the CPU cannot stand in, it has no {lacks} kernels for this "
            "model; give a recipe, such as --quant int8"
        )
    formats = tuple(form for form in arithmetic.formats if not cpu_lacks("", str(form)))
    return dataclasses.replace(arithmetic, formats=formats)


def _timed(arithmetic: Arithmetic, table: KernelTable, target: str, dtype: str) -> Arithmetic:
    """The formats of which `table` has times."""
    found = f"{table.target} in {table.dtype}"
    if found != f"{target} in {dtype}":
        raise DsoptError(f"--profile: has times of {found}, wanted are those of {target} in {dtype}")
    formats = tuple(form for form in arithmetic.formats if str(form) in table.formats)
    if not any(form.kernel in ("nbits", "none") for form in formats):
        raise DsoptError(
            f"--profile: has times of {', '.join(sorted(table.formats)) or 'nothing'}; none of them will do"
        )
    return dataclasses.replace(arithmetic, formats=formats)
