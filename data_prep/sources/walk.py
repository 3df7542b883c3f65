"""Which files below a folder are pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.images import readable_suffixes

_USUAL = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")


def is_clutter(name: str) -> bool:
    """What file managers, archives and notebooks leave behind."""
    return name.startswith((".", "$RECYCLE")) or name in (
        "Thumbs.db", "desktop.ini", "__MACOSX", "__pycache__", "@eaDir", "lost+found",
    )  # fmt: skip


class Walk:
    """Finds pictures in folders and the folders in them; counts the files that are none.

    Args:
        root: links must not lead out of this folder.
        follow_links: unless the user says that they may.
    """

    def __init__(self, root: Path, *, follow_links: bool):
        self._root, self._follow = os.path.realpath(root), follow_links
        self.passed_over: Counter[str] = Counter()
        """Files that are no pictures, by the end of their name."""

    def pictures(self, folder: Path) -> list[Path]:
        """The pictures below a folder, sorted by path.

        Raises:
            UserError: a link that leads out of the root, or to a folder above itself.
        """
        self.check_link(folder)
        return sorted(self._below(folder, (os.path.realpath(folder),)))

    def folders(self, folder: Path) -> list[str]:
        """The names of the folders in a folder, without clutter, sorted."""
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not is_clutter(entry.name) and entry.is_dir())

    def check_link(self, path: Path) -> None:
        """Raises:
        UserError: a link that leads out of the root.
        """
        if not path.is_symlink() or self._follow:
            return
        aim = os.path.realpath(path)
        if os.path.commonpath([self._root, aim]) != self._root:
            raise UserError(
                f"a link to {aim}, outside the image folder",
                where=path,
                expected="links to what is inside",
                hint="give follow_links where you made these links yourself",
            )

    def _below(self, folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
        with os.scandir(folder) as entries:
            listed = list(entries)
        for entry in listed:
            if is_clutter(entry.name):
                continue
            path = folder / entry.name
            if entry.is_symlink():
                self.check_link(path)
            if entry.is_dir():
                real = os.path.realpath(path) if entry.is_symlink() else str(path)
                if entry.is_symlink() and any(os.path.commonpath([real, up]) == real for up in above):
                    raise UserError("a link to a folder above itself", where=path, hint="remove it")
                yield from self._below(path, (*above, os.path.realpath(path)))
            elif _is_picture(path):
                yield path
            else:
                self.passed_over[path.suffix or path.name] += 1

    def note(self) -> list[str]:
        """What was passed over, in a sentence; empty where nothing was."""
        if not self.passed_over:
            return []
        shown = ", ".join(f"{count:,} {kind}" for kind, count in self.passed_over.most_common(5))
        return [f"{self.passed_over.total():,} files that are no pictures were passed over ({shown})"]


def _is_picture(path: Path) -> bool:
    """By the end of its name; where that says nothing, by its first bytes."""
    suffix = path.suffix.lower()
    if suffix in _USUAL or suffix in readable_suffixes():
        return True
    if not path.is_file():  # a broken link or a pipe: reported where it is read
        return True
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(_SIGNATURES)
    except OSError:
        return True
