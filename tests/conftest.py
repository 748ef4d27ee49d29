"""Shared by every test: the package on the path, one thread, no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
# At the end, not the front: a folder named `nodes` must not shadow anybody else's module.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
