"""placeholder"""


def compare_command() -> None:
    """placeholder"""
