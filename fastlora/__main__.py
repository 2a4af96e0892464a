"""`python -m fastlora`, and so `torchrun ... -m fastlora`."""

from __future__ import annotations

import sys

from fastlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
