"""What a user can get wrong, as exceptions that the command line prints in one line."""


class DsoptError(Exception):
    """Something could not be done; the message says what, which value, and what would work. Exit code 1."""

    exit_code = 1


class UsageError(DsoptError):
    """The call itself is wrong (an option, a value, a missing prompt). Exit code 2."""

    exit_code = 2
