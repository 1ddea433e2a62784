"""placeholder"""


def generate_command() -> None:
    """placeholder"""
