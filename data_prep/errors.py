"""The one exception for everything a user can get wrong."""

from __future__ import annotations

from os import PathLike


class UserError(Exception):
    """A mistake that its user can mend; the command prints it as one message and exits with code 2.

    Args:
        what: what is wrong, in one sentence that holds the offending value.
        where: the file, row, field or flag that it was found in.
        expected: what would have been accepted.
        hint: what to do next.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | PathLike[str] | None = None,
        expected: str | None = None,
        hint: str | None = None,
    ):
        self.what, self.where, self.expected, self.hint = what, where, expected, hint
        stop = "" if what.endswith((".", "?", "!")) else "."
        parts = [f"{what}{stop}" if where is None else f"{where}: {what}{stop}"]
        if expected is not None:
            parts.append(f"Expected: {expected}.")
        if hint is not None:
            parts.append(f"Hint: {hint}.")
        super().__init__(printable(" ".join(parts)))

    def __reduce__(self):  # keyword-only arguments survive the trip from a worker process
        return (_rebuild, (self.what, self.where, self.expected, self.hint))


def _rebuild(what: str, where, expected, hint) -> UserError:
    return UserError(what, where=where, expected=expected, hint=hint)


def printable(text: str) -> str:
    """One line that no terminal acts on: names come with the data, from its author, and may hold escape codes,
    line breaks or characters that reverse the writing direction. They are shown as Python writes them in strings."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
