"""`python -m mmsdk` is `mmsdk`."""

from __future__ import annotations

import sys

from mmsdk.cli import main

if __name__ == "__main__":
    sys.exit(main())
