"""The exception for everything about machines and storage that a user can get wrong."""

from __future__ import annotations

from os import PathLike


class ClusterError(Exception):
    """A mistake that its user can mend; the command prints it as one message and exits with code 2.

    Args:
        what: what is wrong, in one sentence that holds the offending value.
        where: the file, node, field or flag that it was found in.
        allowed: what would have been accepted.
        fix: what to do next.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | PathLike[str] | None = None,
        allowed: str | None = None,
        fix: str | None = None,
    ):
        self.what, self.where, self.allowed, self.fix = what, where, allowed, fix
        stop = "" if what.endswith((".", "?", "!")) else "."
        parts = [f"{what}{stop}" if where is None else f"{where}: {what}{stop}"]
        if allowed is not None:
            parts.append(f"Allowed: {allowed}.")
        if fix is not None:
            parts.append(f"To do: {fix}.")
        super().__init__(printable(" ".join(parts)))

    def __reduce__(self):  # keyword-only arguments survive the trip from a worker process
        return (_rebuild, (self.what, self.where, self.allowed, self.fix))


def _rebuild(what: str, where, allowed, fix) -> ClusterError:
    return ClusterError(what, where=where, allowed=allowed, fix=fix)


def printable(text: str) -> str:
    """One line that no terminal acts on: names come with the data, from whoever made it, and may hold escape codes,
    line breaks or characters that reverse the writing direction. They are shown as Python writes them in strings."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
