"""Pre-training CLIP on untrusted image-caption pairs.

\b
safeclip index 'shards/{00000..00099}.tar' --out INDEX    what each shard holds
safeclip doctor CONFIG data.index=INDEX run.dir=RUN       what would go wrong with a run
safeclip train CONFIG data.index=INDEX run.dir=RUN        train, or resume a run
safeclip evaluate RUN                                     what the model knows, and what the attacks achieve
safeclip export RUN OUT                                   an open_clip local directory
"""

import errno
import gc
import multiprocessing
import os
import select
import signal
import sys
from collections.abc import Sequence

import click

from pipeline import logs
from pipeline.cli.audit import audit, score
from pipeline.cli.data import attack, data, index, shards
from pipeline.cli.masks import mask
from pipeline.cli.options import Group
from pipeline.cli.training import compare, config, doctor, evaluate, export, train
from shards.errors import ChangedShard, RunFailed, Unreachable, UserError

# Heavy packages are imported in the commands that use them: `safeclip --help` answers at once.
safeclip = Group(
    help=__doc__,
    commands=[data, shards, index, attack, config, doctor, train, evaluate, compare, export, mask, score, audit],
    params=[click.Option(["--log-level", "level"], help="DEBUG, INFO, WARNING or ERROR (default INFO)")],
    callback=logs.set_up,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


# Of a file or folder that a user has named: what to do about it.
FREE, OTHER = "free some and start again", "name another file or folder"
REFUSED = {errno.ENOSPC: FREE, errno.EDQUOT: FREE, errno.EROFS: OTHER, errno.ENAMETOOLONG: OTHER}
REFUSED |= {errno.ENOENT: "bring it back, or " + OTHER, errno.ENOTDIR: OTHER, errno.EISDIR: OTHER, errno.EEXIST: OTHER}
REFUSED |= dict.fromkeys((errno.EACCES, errno.EPERM), "allow this user to read and write it, or " + OTHER)


def own_words(error: Exception) -> str:
    """The message of an error, in one line; torch puts the traceback of a reading process around it."""
    if isinstance(error, click.UsageError):
        message = " ".join(error.format_message().split()).rstrip(".")
        return f"{message} (see `{error.ctx.command_path if error.ctx else 'safeclip'} --help`)"
    return str(error).rpartition(f"{type(error).__name__}: ")[2].strip()


def says(error: Exception) -> bool:
    """Whether this process prints the error: rank 0, and of another host its first process what rank 0 may not find.

    Any process prints what it alone has met, that a server is lost, or that a shard has changed.
    """
    # Under srun LOCAL_RANK becomes the GPU's number (comm.init); under torchrun, which srun may start, it is the rank.
    counted = "LOCAL_RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_LOCALID"
    first = os.environ.get(counted, os.environ.get("LOCAL_RANK", "0")) == "0"
    alone = isinstance(error, UserError) and (error.alone or not error.everywhere and first)
    return logs.rank() == 0 or alone or isinstance(error, (Unreachable, ChangedShard))


def nobody_reads() -> bool:
    """Whether who read stdout has gone, as in `safeclip config | head`; what is left of the output is dropped then."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    gone = bool(poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def handed_on(code: int) -> int:
    """The exit code of this process, all others having the same. Under launch/torchrun.sh 0, and the code in a file of
    the script: at any other code torchrun starts all processes again, which would end as before."""
    if ends := os.environ.get("SAFECLIP_ENDS"):
        with open(ends, "a") as file:
            file.write(f"{code}\n")
        return 0
    return code


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exit codes: 0 done, 2 a user's mistake (one line on stderr), 75 asked to stop, 1 else."""
    gc.set_threshold(50_000, 20, 20)  # imports make half a million objects, none of them garbage
    try:
        # Not safeclip.main(): it hides broken pipes and interrupts.
        with safeclip.make_context("safeclip", list(sys.argv[1:] if argv is None else argv)) as context:
            safeclip.invoke(context)
        sys.stdout.flush()
        handed_on(0)
    except click.exceptions.Exit as end:  # --help, or all processes end
        sys.exit(handed_on(end.exit_code))
    except (UserError, click.UsageError) as error:
        if says(error):
            print(f"safeclip: {logs.origin() if logs.rank() else ''}{own_words(error)}", file=sys.stderr)
        # Of several nodes perhaps only one has met it: the others have to be started again, and told so.
        everywhere = isinstance(error, UserError) and error.everywhere or os.environ.get("GROUP_WORLD_SIZE") == "1"
        sys.exit(handed_on(2) if everywhere else 2)
    except RunFailed as error:
        print(f"safeclip: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            sys.exit(1)
        if error.errno not in REFUSED or error.errno != errno.ENOSPC and not error.filename:
            raise
        place = error.filename2 or error.filename or "disk"
        print(f"safeclip: {place}: {error.strerror}; {REFUSED[error.errno]}", file=sys.stderr)
        sys.exit(2)
    finally:
        # A reading process ignores SIGTERM, and would be waited for; torch's handler would call its end an error.
        for child in multiprocessing.active_children():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child.kill()
