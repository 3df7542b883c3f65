"""The `dbd` command: finds the subcommand, and turns errors that a user can fix into one message and exit code 2,
and other failures of a run into one message and exit code 1.

Subcommands are imported when they are called, so that ``dbd --help`` answers at once.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys

COMMANDS = {
    "demo": ("dbd_dist.commands.demo", "end-to-end demo on embedded images, in minutes on a laptop"),
    "prepare": ("dbd_dist.commands.prepare", "images and an attack -> dataset folder"),
    "craft": ("dbd_dist.commands.craft", "clean dataset folder -> artefact of an attack that needs a trained model"),
    "train": ("dbd_dist.commands.train", "dataset folder -> run folder"),
    "evaluate": ("dbd_dist.commands.evaluate", "measure a run's model again: accuracy, attack success"),
    "tune": ("tune_spaces.cli", "a Ray Tune sweep"),
    "report": ("dbd_dist.reporting.cli", "tables, plots and an HTML page from run folders"),
    "bench": ("dbd_dist.commands.bench", "how fast this machine runs every part"),
    "doctor": ("dbd_dist.commands.doctor", "is this machine or cluster fit to run? are these folders whole?"),
}


PATHS = (
    "--storage", "--data", "--out", "--root", "--datasets", "--artefact", "--surrogate", "--backbone", "--json",
    "--config", "--compute.stage", "--model.weights", "--pattern", "--source.root", "--attack.artefact",
    "--attack.pattern", "--list", "--path", "--source.list",
)  # fmt: skip
"""Flags whose values are paths."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {phrase}" for name, (_, phrase) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dbd COMMAND ...",
            "",
            "Train image classifiers on data that may be poisoned.",
            "",
            *lines,
            "",
            "dbd COMMAND --help lists what a command takes; --debug anywhere shows tracebacks.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 a mistake in what was asked for, 70 ended because
    it hung, 130 interrupted, 143 terminated."""
    if argv is None:
        _as_utf8()
    argv = [_at_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"error: there is no command {name!r}.{hint} Expected: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2

    from data_prep.errors import UserError

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        _refuse_empty(rest)
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    except UserError as error:
        if debug:
            raise
        # a run that was asked to stop is no error
        print(error if getattr(error, "is_request", False) else f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except BrokenPipeError:  # the reader of our output has what it wants, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 141
    except OSError as error:
        if debug or error.errno != errno.ENAMETOOLONG:  # wherever a path is looked up first; only arguments are so long
            raise
        path = str(error.filename)
        print(f"error: {path if len(path) <= 80 else path[:77] + '...'}: file name too long.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130


def _as_utf8() -> None:
    """Start again in Python's UTF-8 mode where arguments are not read as UTF-8 (LC_ALL=C without coercion): names
    of files are bytes, and FFCV, Arrow and Ray take them as UTF-8."""
    if sys.getfilesystemencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # for workers too
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _at_home(argument: str) -> str:
    """An argument with ~ for the home folder, which a shell expands at the beginning of a word only."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{os.path.expanduser(value)}" if value.startswith("~") else argument


def _refuse_empty(arguments: list[str]) -> None:
    """An empty path would be the current folder: what a script passes whose variable is not set."""
    from data_prep.errors import UserError

    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if not equals and i + 1 < len(arguments):
            value, equals = arguments[i + 1], "="
        if flag in PATHS and equals and not value:
            raise UserError("the path is empty", where=flag, expected="a path")
        try:
            odd = b"\0" in argument.encode()
        except UnicodeEncodeError:  # bytes that are no UTF-8: FFCV, Arrow and Ray take no such paths
            odd = True
        if odd:
            raise UserError("not valid UTF-8 without NUL", where=repr(argument), hint="rename the file or folder")


if __name__ == "__main__":
    sys.exit(main())
