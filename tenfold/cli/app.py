"""All commands as one application; adding a file to ``commands`` adds a command."""

from __future__ import annotations

import shlex
import sys
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated

import typer

from tenfold import __version__
from tenfold.cli import commands
from tenfold.cli.launch import refuse_launch
from tenfold.cli.record_options import as_command, help_of
from tenfold.cli.terminal import Misuse, UsageProblem, complain, end_on_sigterm

ABOUT = """\
Make trained PyTorch networks smaller and really faster by tensor decomposition.

One natural way through: profile (what does it cost?), plan (what to do with each layer?), compress (do it, recover,
measure, save), tune (train on), eval. Start with `tenfold demo`.
"""


def build() -> typer.Typer:
    """Return the application with every command of the folder ``commands``, in their order."""
    app = typer.Typer(
        help=ABOUT,
        invoke_without_command=True,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    modules = [import_module(f"{commands.__name__}.{found.name}") for found in iter_modules(commands.__path__)]
    for module in sorted(modules, key=lambda m: m.ORDER):
        app.command(module.__name__.rpartition(".")[2], help=help_of(module.run))(as_command(module.run))
    return app


def _check_launch(args: list[str]) -> None:
    """Raise a usage error if several processes run a command that is for one."""
    name = next((arg for arg in args if not arg.startswith("-")), "")
    found = any(module.name == name for module in iter_modules(commands.__path__))
    if found and not getattr(import_module(f"{commands.__name__}.{name}"), "LAUNCHABLE", False):
        refuse_launch(name)


def _check_utf8(args: list[str]) -> None:
    """Raise a usage error for text that no record could hold, and that some libraries cannot open as a path."""
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            msg = f"{arg!a} is not UTF-8: rename the file or folder, or lead there by a link"
            raise Misuse(msg) from None


def run(args: list[str]) -> int:
    """Return the exit code of a command line."""
    end_on_sigterm()
    try:
        _check_utf8(args)
        _check_launch(args)
        code = build()(args, prog_name="tenfold", standalone_mode=False, obj=shlex.join(["tenfold", *args]))
    except UsageProblem as problem:
        message = getattr(problem, "format_message", problem.__str__)()
        context = getattr(problem, "ctx", None)
        help_of = context.command_path if context is not None else " ".join(("tenfold", *filter(str.isalpha, args[:1])))
        complain(f"{(message or 'a command is missing').rstrip('.')}. See {help_of} --help.")
        return 2
    return code if isinstance(code, int) else 0


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it
    if wanted:
        sys.stdout.write(f"tenfold {__version__}\n")
        raise typer.Exit


def _options(
    context: typer.Context,
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    del version
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")
