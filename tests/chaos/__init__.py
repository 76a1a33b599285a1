"""Faults of every kind, and what a run makes of them. ``make test`` does a short form, ``make chaos`` the long one."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LONG = os.environ.get("SWINSCALE_CHAOS") == "long"
"""Set by ``make chaos``: more kills, longer runs."""
