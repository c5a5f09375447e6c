"""Lets two processes of a test train together on a CPU."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def spawn(run: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Runs ``run(rank, folder, *arguments)`` in two processes. ``run`` must call ``join``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(probe.getsockname()[1]))
    mp.spawn(_run_and_exit, args=(run, str(folder), *arguments), nprocs=2)


def _run_and_exit(rank: int, run: Callable[..., None], folder: str, *arguments: Any) -> None:
    run(rank, folder, *arguments)
    # The destructors of gloo's and DeepSpeed's threads can abort a process that ends on a busy machine.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def join(rank: int, folder: str) -> None:
    """Makes this process one of two ranks: sets the number of threads and the environment variables."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text(),
                   "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}  # fmt: skip
