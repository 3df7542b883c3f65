"""Parts by name: the project's own, and those that installed packages add through entry points.

A registry is a plain dict in the package of its parts. A package of somebody else's joins with an entry point in the
group ``dbd_dist.KIND`` (``dbd_dist.attacks``, ``dbd_dist.methods``, ...): its name is the part's, its value names the
class.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any, Generic, TypeVar

from data_prep.errors import UserError

Part = TypeVar("Part")


class Registry(Mapping[str, Part], Generic[Part]):
    """Name -> part. Entry points are read when somebody first looks something up.

    A plugin that does not fit is left out with a note on stderr; asking for it by name raises the same as an error.

    Args:
        kind: of the parts, in the plural: the entry points' group is ``dbd_dist.KIND``.
        own: the project's parts.
        base: the class that parts derive from, or are instances of; None takes anything.
        needs: attributes that every part has; if name is among them, parts are registered by it.
    """

    def __init__(self, kind: str, own: Mapping[str, Part], *, base: type | None = None, needs: tuple[str, ...] = ()):
        self.kind, self.group = kind, f"dbd_dist.{kind}"
        self._own, self._base, self._needs = dict(own), base, needs
        self._all: dict[str, Part] | None = None
        self.refused: dict[str, UserError] = {}
        """Plugins that were left out, by the name that they would have had."""

    def __getitem__(self, name: str) -> Part:
        return self._parts()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts())

    def __len__(self) -> int:
        return len(self._parts())

    def find(self, name: str, *, where: str) -> Part:
        """The part of that name.

        Raises:
            UserError: there is none, or its plugin was left out; `where` names the flag or field that asks.
        """
        parts = self._parts()
        if name in parts:
            return parts[name]
        if name in self.refused:
            raise self.refused[name]
        near = difflib.get_close_matches(name, parts, n=1)
        raise UserError(
            f"there is no {self.kind.removesuffix('s')} {name!r}",
            where=where,
            expected=", ".join(parts),
            hint=f"did you mean {near[0]!r}" if near else None,
        )

    def add(self, name: str, part: Part, *, origin: str = "add") -> None:
        """Add a part while the program runs.

        Raises:
            UserError: the name is taken, or the part lacks what its kind needs.
        """
        self._check(name, part, origin)
        self._parts()[name] = part

    def _parts(self) -> dict[str, Part]:
        if self._all is None:
            self._all = dict(self._own)
            for entry in metadata.entry_points(group=self.group):
                origin = f"{entry.dist.name if entry.dist else 'a package'}: entry point {entry.name} = {entry.value}"
                try:
                    self._all[entry.name] = self._checked(entry, origin)
                except UserError as error:
                    self.refused[entry.name] = error
                    print(f"note: left out {error}", file=sys.stderr)
        return self._all

    def _checked(self, entry: metadata.EntryPoint, origin: str) -> Part:
        try:
            part = entry.load()
        except Exception as error:  # whatever somebody else's module raises: the other parts still work
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"does not import ({reason})", where=origin, hint="repair or uninstall the package"
            ) from error
        self._check(entry.name, part, origin)
        return part

    def _check(self, name: str, part: Any, origin: str) -> None:
        one = self.kind.removesuffix("s")
        if name in (self._own if self._all is None else self._all):
            raise UserError(f"the {one} {name!r} is there already", where=origin, hint="choose another name for it")
        fits = self._base is None or isinstance(part, self._base)
        if self._base is not None and isinstance(part, type):
            fits = issubclass(part, self._base)
        if self._base is not None and not fits:
            wanted = f"{self._base.__module__}.{self._base.__qualname__}"
            raise UserError(f"{part!r} is no {one}", where=origin, expected=f"a subclass or instance of {wanted}")
        missing = [needed for needed in self._needs if not hasattr(part, needed)]
        missing += sorted(getattr(part, "__abstractmethods__", ()))
        if missing:
            needed = ", ".join(dict.fromkeys([*self._needs, *missing]))
            raise UserError(f"the {one} has no {', '.join(missing)}", where=origin, expected=f"the fields {needed}")
        if "name" in self._needs and part.name != name:
            raise UserError(f"the {one} {name!r} has the name {part.name!r}", where=origin, expected=repr(name))
