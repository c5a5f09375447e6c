"""Starts engines, commands and servers in separate processes."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, [ROOT, Path(__file__).parent])),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}
LIMIT_S = 1800.0  # of a start or a run, which take a minute on a machine without other work


def start(*command: object, **environment: str) -> subprocess.Popen[bytes]:
    """Starts Python with these command-line arguments in a new session. ``environment`` adds environment variables."""
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, env={**ENVIRONMENT, **environment}, start_new_session=True)


def finish(process: subprocess.Popen[Any]) -> None:
    """Waits for a process and asserts that it succeeded."""
    assert process.wait(LIMIT_S) == 0, process.args


@contextmanager
def server(model: Path, *options: str) -> Iterator[str]:
    """Runs vLLM's server for the duration of a ``with`` block, with the model name "served". Yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "served"]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--dtype",
        "float32",
        "--max-model-len",
        1024,
        "--enforce-eager",
    ]
    command += ["--max-num-batched-tokens", 65536, "--distributed-executor-backend", "uni"]
    process = start(*command, *options, VLLM_LOGGING_LEVEL="ERROR")
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen[Any]) -> None:
    """Waits until a server responds. Fails if its process ends."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(url)


def descendants(pid: int) -> list[int]:
    """Returns the ids of all descendant processes of a process."""
    from mpo_ext.generate.orphans import children

    found: list[int] = []
    level = children(pid)
    while level:
        found += level
        level = {child for each in level for child in children(each)}
    return found


def is_alive(pid: int) -> bool:
    """Returns whether a process is running. A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
