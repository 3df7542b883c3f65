"""Values as words: names from strangers made safe to show, fractions, durations, counts.

Class names, file names and data set names come with the images, from their author. They may hold markup, terminal
escape codes, characters that reverse the writing direction, or a megabyte of text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def printable(value: Any, limit: int = 80) -> str:
    """One line of at most `limit` characters that no terminal acts on; the middle of longer text is left out."""
    text = str(value)
    if len(text) > limit:  # file names differ at their ends
        tail = limit // 2
        text = text[: limit - tail - 1] + "…" + text[len(text) - tail :]
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    kind = unicodedata.category(character)
    if character.isspace():
        return " "
    if kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _BIDI:
        return "\ufffd"
    return character


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in 0-1 as "97.2 %"; a dash where there is none."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def duration(seconds: float) -> str:
    """Seconds as "4.2 s", "38 s", "2 min 10 s", "1 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    minutes = round(seconds / 60)
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def number(value: float) -> str:
    """Up to two decimals, without trailing zeros, thousands apart: "1,438", "3.25"."""
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def joined(parts: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    words = list(parts)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def seeds(values: Iterable[int]) -> str:
    """ "seed 0", "seeds 0, 1, 2"; runs of neighbours as "seeds 0-4"."""
    ordered = sorted(set(values))
    parts: list[str] = []
    start = 0
    for i, value in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] != value + 1:
            many = i - start
            parts.append(f"{ordered[start]}–{value}" if many > 1 else ", ".join(map(str, ordered[start : i + 1])))
            start = i + 1
    return f"seed{'' if len(ordered) == 1 else 's'} {', '.join(parts)}"
