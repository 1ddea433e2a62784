"""What a compiled graph may hold, by the execution provider that will run it. Another provider is another entry."""

from dataclasses import dataclass

from dsopt.runtime.errors import UsageError


@dataclass(frozen=True)
class Target:
    """An execution provider and the float types of its graphs, the first being the default."""

    name: str
    provider: str
    device: str  # as OrtValue and IO binding call it
    dtypes: tuple[str, ...]  # fp32 | fp16 | bf16


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "CPUExecutionProvider", "cpu", ("fp32",)),
        Target("cuda", "CUDAExecutionProvider", "cuda", ("fp16", "bf16")),
    )
}


def find_target(name: str) -> Target:
    """Raises UsageError on an unknown name."""
    if name not in TARGETS:
        raise UsageError(f"--target is {name!r}; it must be one of {', '.join(TARGETS)}")
    return TARGETS[name]
