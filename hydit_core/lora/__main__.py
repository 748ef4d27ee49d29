"""``python -m hydit_core.lora``: look into LoRAs, convert, merge, combine and extract them."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
