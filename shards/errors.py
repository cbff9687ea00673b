"""Exceptions."""


class UserError(Exception):
    """A mistake that the user can fix. One line: the field or file, what was found, what was expected, how to mend it.

    The command line prints it without a traceback and exits with code 2. everywhere: rank 0 told all
    ranks; alone: only this process has met it.
    """

    everywhere = False
    alone = False


class Unreachable(UserError):
    """A server, or a file system, of which nothing came for as long as was to be waited."""


class ChangedShard(UserError):
    """A shard that does not hold what was indexed. Perhaps only one process notices."""


class BadSample(Exception):
    """One sample that cannot be used. It stays in its batch as an invalid row and is listed in bad_samples/ with
    this reason."""


class RunFailed(Exception):
    """A run that cannot continue though its input is right; what it saved is sound. One line, exit code 1."""
