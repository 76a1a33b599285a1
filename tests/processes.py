"""Several processes on this machine, joined by gloo as under ``torchrun``: for tests that need more than one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(count: int, code: str, *arguments: object, **options: object) -> list[subprocess.Popen[str]]:
    """Starts ``count`` processes that run ``code`` (Python) with ``arguments`` in ``sys.argv[1:]``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            # One thread each: sums depend on the number of threads, and tests compare them.
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each process; all are gone afterwards."""
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, ended, strict=True)]


def launch(count: int, code: str, *arguments: object, timeout: float = 240) -> list[str]:
    """Runs ``count`` processes to their end and returns what each printed; a failure of one fails the test."""
    results = finish(start(count, code, *arguments), timeout)
    assert all(code == 0 for code, _, _ in results), "\n\n".join(err[-3000:] for _, _, err in results)
    return [out for _, out, _ in results]
