"""What runs found: tables over seeds, figures, the suspects, one page that holds it all.

Reads finished folders only; nothing that trains may import it, since it reads the truth.
"""

from dbd_dist.reporting.page import write_report
from dbd_dist.reporting.tables import format_results

__all__ = ["format_results", "write_report"]
