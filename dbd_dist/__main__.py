"""``python -m dbd_dist``: the `dbd` command."""

import sys

from dbd_dist.cli import main

sys.exit(main())
