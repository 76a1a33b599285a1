"""The exceptions that a user is meant to read, and which process says them."""

from __future__ import annotations

import os


class UsageError(ValueError):
    """What was asked for cannot be done, and the message says why in one line.

    It names the thing, its value, what is allowed and what to do. The command line prints the message and exits with
    code 2; in Python it is an ordinary ``ValueError``. Everything else that is raised is a defect of the library.
    """


class NonFiniteLoss(UsageError):
    """Training met a loss or gradient that is not a number; the message names the module that made it."""


class Stopped(Exception):
    """A run that ended early for a reason outside of it and can be resumed.

    ``signal`` is the number of the signal that stopped it, after saving; 0: another of its processes was lost.
    """

    def __init__(self, message: str, signal: int = 0):
        super().__init__(message)
        self.signal = signal


def speaks() -> bool:
    """Whether this is the one process of a run that talks to people, and writes what is written once."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
