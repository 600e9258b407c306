"""The entry point of the command line: errors, environment, the table of commands.

A command's module is imported when the command is called, and its stage when the command runs: `--help` loads no torch,
dask or zarr.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
import traceback
from importlib import import_module
from types import TracebackType
from typing import Any, NoReturn

import click

from actstore import __version__
from pipelines.shared.environment import set_environment
from pipelines.shared.visible_text import escaped, visible

COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Begin": {
        "demo": ("demo", "The whole chain on the built-in GPT-2; offline."),
        "ls": ("store", "What lies below a folder, and what it was made from."),
        "info": ("store", "What a store, run, codes, analysis or other result is."),
    },
    "Fill and keep a store": {
        "collect": ("collect", "Run the model over a corpus; write or extend a store."),
        "estimate": ("collect", "What `collect` would take here: bytes, memory, time."),
        "verify": ("store", "Compare stores and results with what was committed."),
        "repair": ("store", "Drop what is damaged, to be filled in again."),
        "recode": ("store", "Copy a store into another encoding."),
    },
    "Train": {
        "train": ("train", "Train sparse autoencoders on a store: one, or a sweep."),
        "evaluate": ("train", "How well an SAE explains held-out rows; model loss."),
    },
    "Look": {
        "encode": ("codes", "Every row's active features, indexed by feature."),
        "analyze": ("codes", "What every feature does over the whole corpus."),
        "features": ("features", "List features: frequency, strength, tokens."),
        "feature": ("features", "One feature: figures, tokens, examples, firings."),
        "search": ("features", "Which features fire on a token or a text."),
        "inspect": ("features", "Which features are active on new sentences."),
        "structure": ("findings", "Which features fire together beyond chance."),
        "concepts": ("findings", "How well features follow labelled concepts."),
        "compare": ("findings", "Which features two runs or more share."),
        "superposition": ("findings", "The toy model of superposition."),
        "report": ("report", "One self-contained HTML page of an analysis."),
    },
    "Test causes": {
        "attribute": ("causal", "Which parts of the model make a token's logit."),
        "patch": ("causal", "Put one text's activations into another's run."),
        "ablate": ("causal", "What predictions owe to features of a text."),
        "steer": ("causal", "What the model writes while a feature is changed."),
        "effects": ("causal", "What ablating each feature does over the corpus."),
        "lens": ("causal", "Which tokens a feature's direction promotes."),
    },
    "Exchange": {
        "export": ("exchange", "Write a run's SAE as another tool's files."),
        "import": ("exchange", "Make a run of another tool's SAE."),
    },
}
"""Heading -> command -> (its module in `pipelines/commands/`, its line in the help). An empty heading is not shown."""
MODULES = {name: module for rows in COMMANDS.values() for name, (module, _) in rows.items()}


class _Commands(click.Group):
    """The commands of `COMMANDS`, each imported when it is asked for; expected failures end in one line and a status."""

    def list_commands(self, ctx: click.Context | None) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: click.Context | None, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULES:
            return None
        members = vars(import_module(f"pipelines.commands.{MODULES[cmd_name]}")).values()
        return next(member for member in members if isinstance(member, click.Command) and member.name == cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, MODULES))
        for heading, rows in COMMANDS.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl([(name.ljust(width), line) for name, (_, line) in rows.items()])

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        debug = "--debug" in sys.argv
        sys.excepthook = _show_traceback
        _escape_what_the_output_cannot_encode()
        try:
            super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.Exit as stop:
            sys.exit(stop.exit_code)
        except click.ClickException as error:
            _show_usage(error)
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("stopped; everything committed is kept.", err=True)
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            from pipelines.shared.error_line import mendable_line

            line = None if debug else mendable_line(error)
            if line is None:
                raise
            click.echo(visible(f"error: {line}"), err=True)
            sys.exit(1)
        sys.exit(0)


def _escape_what_the_output_cannot_encode() -> None:
    """Where the locale is not UTF-8, a letter that it lacks is printed as JSON would write it."""

    def as_escapes(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        return escaped(error.object[error.start : error.end]), error.end

    codecs.register_error("actstore", as_escapes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="actstore")


def _show_usage(error: click.ClickException) -> None:
    """What click says of arguments that it refuses, which it quotes as they are."""
    error.message = visible(error.message)  # type: ignore[misc]
    said = io.StringIO()
    error.show(file=said)
    for line in said.getvalue().rstrip("\n").split("\n"):
        click.echo(visible(line), err=True)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    for entry in traceback.format_exception(kind, error, trace):
        for line in entry.rstrip("\n").split("\n"):
            click.echo(visible(line), err=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Run a language model once, keep its activations, train sparse autoencoders, see what the features do.

    \b
    Example:
      actstore demo --out demo-out
    """
    if debug:
        logging.basicConfig(level=logging.INFO)
    set_environment()


if __name__ == "__main__":
    cli()
