"""The two ways in which input can be wrong."""


class UserError(Exception):
    """A mistake the user can mend. One line: the field or file, what was found, what was expected, how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """


class BadSample(Exception):
    """One sample that cannot be used. It stays in its batch as an invalid row and goes into the ledger with this reason."""
