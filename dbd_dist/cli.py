"""The `dbd` command: finds the subcommand, and turns errors that a user can fix into one message and exit code 2,
and other failures of a run into one message and exit code 1.

Subcommands are imported when they are called, so that ``dbd --help`` answers at once.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

COMMANDS = {
    "demo": ("dbd_dist.commands.demo", "end-to-end demo on embedded images, in minutes on a laptop"),
    "prepare": ("dbd_dist.commands.prepare", "images and an attack -> dataset folder"),
    "craft": ("dbd_dist.commands.craft", "clean dataset folder -> artefact of an attack that needs a trained model"),
    "train": ("dbd_dist.commands.train", "dataset folder -> run folder"),
    "evaluate": ("dbd_dist.commands.evaluate", "measure a run's model again: accuracy, attack success"),
    "tune": ("tune_spaces.cli", "a Ray Tune sweep"),
    "report": ("dbd_dist.reporting.cli", "tables, plots and an HTML page from run folders"),
    "reproduce": ("dbd_dist.commands.reproduce", "a whole table: attacks x methods x seeds, resumable"),
    "bench": ("dbd_dist.commands.bench", "how fast this machine runs every part"),
    "submit": ("dbd_dist.commands.submit", "any of these as a job on a running Ray cluster"),
    "cluster": (
        "cluster.cli",
        "files for clusters: written for a target, checked, and bundles for hosts without network",
    ),
    "doctor": ("dbd_dist.commands.doctor", "is this machine or cluster fit to run? are these folders whole?"),
}


PATHS = (
    "--storage", "--data", "--out", "--figures", "--root", "--datasets", "--artefact", "--surrogate", "--backbone",
    "--json", "--config", "--compute.stage", "--model.weights", "--pattern", "--source.root", "--attack.artefact",
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
    it hung, 130 interrupted, 141 its reader has gone, 143 terminated."""
    if argv is not None:
        return _main(argv, is_process=False)
    _as_utf8()  # nothing was registered or changed before
    try:
        code = _main(sys.argv[1:], is_process=True)
    except SystemExit as ended:
        _end_beside_calls(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
        raise
    _end_beside_calls(code)
    return code


def _end_beside_calls(code: int) -> None:
    """End the process here where a call of Ray's library will not return, as of a Ray whose processes were killed:
    see cluster.calls."""
    calls = sys.modules.get("cluster.calls")  # not there where nothing has called Ray
    if calls is not None and calls.unfinished():
        atexit._run_exitfuncs()
        _flush()
        os._exit(code)


def _main(argv: list[str], *, is_process: bool) -> int:
    argv = [_at_home(argument) for argument in argv]
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]

    from data_prep.errors import UserError

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        with _ended_by_signals():
            code = _run(argv, keep_help=is_process)
            _flush()
            return code
    except UserError as error:
        if debug:
            raise
        # a run that was asked to stop is no error
        _say(str(error) if getattr(error, "is_request", False) else f"error: {error}")
        return getattr(error, "exit_code", 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():  # it has what it wants, as with `| head`
            _forget_output()
            return 141
        if debug:
            raise
        path, reason = str(error.filename or "the output or a file"), error.strerror or error
        if error.errno == errno.ENAMETOOLONG:  # wherever a path is looked up first; only arguments are so long
            _say(f"error: {path if len(path) <= 80 else path[:77] + '...'}: file name too long.")
            return 2
        _say(f"error: {UserError(f'cannot be read or written ({reason})', where=path)}")
        _forget_output()
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        _say("interrupted; the same command resumes from the last checkpoint")
        return 130


def _run(argv: list[str], *, keep_help: bool = False) -> int:
    """Find the command and call it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        _say(f"error: there is no command {name!r}.{hint} Expected: {', '.join(COMMANDS)}.")
        return 2
    _refuse_empty(rest)

    def call() -> int:
        return importlib.import_module(COMMANDS[name][0]).main(rest)

    try:
        from dbd_dist import helptext

        return helptext.show(name, rest, call) if keep_help and helptext.asks(rest) else call()
    except SystemExit:  # tyro's way out, after help has been printed
        _flush()
        raise


# -- streams: a reader that leaves, a disk that is full, a descriptor that was closed


def _open_standard_streams() -> None:
    """A file that is opened while one of the three is closed would take its number, and what is written there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody to tell
        print(text, file=sys.stderr, flush=True)


def _flush() -> None:
    """Write out what is printed, here rather than when Python ends, where errors are tracebacks."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _reader_is_gone() -> bool:
    """Is standard output a pipe that nobody reads? Any other broken pipe is a failure like others."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def _forget_output() -> None:
    """Let what could not be written go: Python tries once more at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the body as an exception does, so that what is half-written is removed; exit code 128 and
    the signal's number. A second one ends the process at once. A signal that somebody handles or ignores stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: ended\n".encode())
        raise SystemExit(128 + number)

    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for number in wanted:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in wanted:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


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
