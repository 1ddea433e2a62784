"""placeholder"""


def bench_command() -> None:
    """placeholder"""
