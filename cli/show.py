"""placeholder"""


def inspect_command() -> None:
    """placeholder"""
