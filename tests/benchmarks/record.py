"""What a measurement leaves in docs/results: its numbers with the command, the machine and the commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dbd_dist.runtime.machine import commit, host


def record(path: Path | None, rows: list[dict[str, Any]], *, command: str, note: str, **more: Any) -> None:
    """Print the rows with what they are of; write them to `path` where one is given.

    Args:
        rows: objects with the same fields, as docs/results.md shows them.
        more: other fields of the file.
    """
    about = {"command": command, "host": host(), "commit": commit(), "note": note}
    text = json.dumps({**about, **more, "rows": rows}, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n")
