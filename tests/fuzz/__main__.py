"""`python -m tests.fuzz --minutes 10 [--seed S]`: random damage to everything that is read; prints what came of it.

Exits with 1 where a case failed; each is listed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.driver import child, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="of all cases; drawn from the clock unless given")
    parser.add_argument("--target", action="append", help="these targets only")
    parser.add_argument("--case", help="one case of one target, as a summary names it")
    arguments = parser.parse_args()
    from tests.fuzz.targets import TARGETS

    names = arguments.target or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if arguments.case is not None:
        with child() as process:
            outcome, detail = process.run(names[0], arguments.case)
        print(outcome, detail)
        return outcome == "failed"
    seed = arguments.seed if arguments.seed is not None else int(time.time())
    print(f"seed {seed}, {arguments.minutes:g} minutes", flush=True)
    weights = {name: TARGETS[name].weight for name in names}
    with child() as process:
        summary = fuzz(process, weights, seed, until=time.monotonic() + 60 * arguments.minutes)
    print(summary.text())
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
