"""The attacks that tables name: arguments of `dbd prepare` and `dbd craft`, by the images that they are for."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from data_prep.errors import UserError
from dbd_dist.fields import digest


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attack with its settings: a group of rows."""

    name: str
    title: str
    attack: str
    """As `dbd prepare` names it."""
    flags: tuple[str, ...] = ()
    """Of `dbd prepare`."""
    craft: tuple[str, ...] = ()
    """Of `dbd craft`, where the attack needs it."""
    own: bool = False
    """Its settings are those of a table file."""

    @property
    def key(self) -> str:
        """Names its folders: with the settings where they are somebody's own, so that no two cases share a folder."""
        return f"{self.name}-{digest([self.attack, self.flags, self.craft])[:6]}" if self.own else self.name


CASES = {
    case.name: case
    for case in (
        Case(name="clean", title="none", attack="clean"),
        Case(name="badnets", title="BadNets", attack="badnets"),
        Case(name="badnets-coin", title="BadNets, a coin an image", attack="badnets", flags=("--protocol", "released")),
        Case(name="blended", title="Blended", attack="blended"),
        Case(name="wanet", title="WaNet", attack="wanet"),
        # the rate of WaNet's own paper: 10 % with the trigger, 20 % noise samples
        Case(name="wanet-10", title="WaNet, 10 %", attack="wanet", flags=("--rate", "0.1")),
        Case(name="wanet-no-noise", title="WaNet without noise samples", attack="wanet", flags=("--noise-ratio", "0")),
        Case(name="label-consistent", title="Label-consistent", attack="label-consistent"),
        Case(name="adaptive", title="Adaptive", attack="adaptive"),
        Case(name="sig", title="SIG", attack="sig"),
        Case(name="ctrl", title="CTRL", attack="ctrl"),
        Case(name="adap-blend", title="Adap-Blend", attack="adap-blend"),
        Case(name="adap-patch", title="Adap-Patch", attack="adap-patch"),
        Case(
            name="badnets-all-to-all", title="BadNets, all-to-all", attack="badnets", flags=("--mapping", "all-to-all")
        ),
    )
}
"""With the settings of each attack's paper."""

SETTINGS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "digits": {
        # the originals have 8 x 8 pixels: the default field, 4 x 4 vectors of a quarter of a pixel, is lost in them
        "wanet": (("--grid", "2", "--strength", "4"), ()),
        "label-consistent": (("--patch-px", "4"), ("--eps", "32", "--step", "3.2")),
        "adaptive": ((), ("--optimise", "pattern-and-mask")),
        "sig": (("--delta", "40"), ()),
        # one window an image, the middle and the highest frequency of it, and as much a pixel as at 32 px
        "ctrl": (("--window", "16", "--bands", "7", "15", "--magnitude", "25", "--test-magnitude", "50"), ()),
    },
    "imagefolder": {"label-consistent": ((), ("--eps", "16", "--step", "3"))},
}
"""Source -> attack -> what `dbd prepare` and `dbd craft` are told there instead."""


def find_case(name: str, source: str, *, where: str) -> Case:
    """The case of that name, for the images of that source. NAME-rRATE is a case at another poisoning rate, such as
    badnets-r0.01.

    Raises:
        UserError: there is none.
    """
    stem, rate = re.fullmatch(r"(.*?)(?:-r(0\.\d+))?", name, flags=re.S).groups()  # type: ignore[union-attr]
    if stem not in CASES or (rate is not None and (stem == "clean" or "--rate" in CASES[stem].flags)):
        near = difflib.get_close_matches(name, CASES, n=1)
        raise UserError(
            f"there is no attack {name!r}",
            where=where,
            expected=f"{', '.join(CASES)}, or one of them with a poisoning rate, such as badnets-r0.01",
            hint=f"did you mean {near[0]!r}" if near else None,
        )
    case = CASES[stem]
    flags, craft = SETTINGS.get(source, {}).get(case.attack, ((), ()))
    case = replace(case, flags=(*flags, *case.flags), craft=craft)
    return case if rate is None else at_rate(case, float(rate))


def at_rate(case: Case, rate: float) -> Case:
    """The case at another poisoning rate, which a craft of chosen images is told too."""
    from dbd_dist.craft import CRAFTS

    kind = CRAFTS.get(case.attack)
    craft = ("--rate", f"{rate:g}") if kind is not None and hasattr(kind, "rate") else ()
    return replace(
        case,
        name=f"{case.name}-r{rate:g}",
        title=f"{case.title}, {100 * rate:g} %",
        flags=(*case.flags, "--rate", f"{rate:g}"),
        craft=(*case.craft, *craft),
    )
