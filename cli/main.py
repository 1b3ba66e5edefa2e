"""The `cmfg` command: its subcommands, and how errors end."""

from __future__ import annotations

import errno
import importlib
import io
import signal
import sys
import traceback

import click

from cmfg_dgl import __version__
from cmfg_dgl.errors import CmfgError

from .options import Verbosity

__all__ = ["main"]

COMMANDS = {
    "train": "Train a model on image-caption pairs.",
    "eval": "Evaluate a trained run on a split, both stages.",
    "bench": "Compare CMFG with other methods.",
    "ablate": "Measure what a relation or a setting is worth.",
    "rerank": "Measure what a run's second stage is worth, over k and alpha.",
    "inspect": "Show where a run's attention goes, for a picture and a caption.",
    "audit": "Check a run's numbers for leaks and inflated metrics.",
    "export": "Write a trained run as a folder that works on its own.",
    "data": "List, describe and check data sets.",
    "features": "Plan, build, merge and verify the feature store.",
    "config": "Show, validate and list configurations.",
    "env": "Print versions, kernels and devices.",
}
EXIT_INTERRUPTED = 130


class _Commands(click.Group):
    """Imports a subcommand when it is called, for torch and DGL take seconds to import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:
                return None
            raise click.NoSuchCommand(cmd_name, possibilities=COMMANDS, ctx=ctx)
        module = importlib.import_module(f"cmfg_dgl.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cmfg")
def cmfg() -> None:
    """Match images and text with attention-weighted heterogeneous graphs.

    \b
    cmfg train -c openmoji -o runs/openmoji      train on installed data
    cmfg eval runs/openmoji --split test         both stages, both directions
    cmfg audit runs/openmoji                     is the number honest?
    cmfg train -c folder data.root=DIR           your own pictures and captions
    """


def _of_the_system(error: OSError) -> str:
    """An error of the system in one line, with what helps."""
    where = f"{error.filename}: " if error.filename else ""
    told = f"{where}{error.strerror or error}"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return f"{told}; free space, then the same command goes on (train with --resume auto)"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{told}; change the permissions, or choose another folder (-o, features.dir)"
    return f"{told}; add -v for the traceback"


def main() -> None:
    """Run the command line; every error is one line and an exit code (see `cmfg_dgl.errors`)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        # A terminal or a pipe that is not UTF-8 gets escapes of what it cannot show.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    verbosity = Verbosity()
    try:
        sys.exit(cmfg.main(prog_name="cmfg", standalone_mode=False, obj=verbosity))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        where = (
            f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        )
        click.echo(f"cmfg: {error.format_message()}{where}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "cmfg: interrupted; the same command goes on where it stopped (train with --resume auto)", err=True
        )
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        if verbosity.verbose:
            traceback.print_exc()
        click.echo(f"cmfg: {_of_the_system(error)}", err=True)
        sys.exit(1)
    except Exception as error:
        known = isinstance(error, CmfgError)
        if verbosity.verbose:
            traceback.print_exc()
        remedy = "" if known else "; add -v for the traceback, and please report it with the output of cmfg env"
        name = "" if known else f"{type(error).__name__}: "
        click.echo(f"cmfg: {name}{' '.join(str(error).split())}{remedy}", err=True)
        sys.exit(error.exit_code if isinstance(error, CmfgError) else 1)
