"""Tests runs on a Ray cluster. They must equal runs without Ray, also after a worker or the driver was killed."""

import json
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_driver import make_pipeline, run
from stub_engine import StubEngine

from mpo_ext.generate import runner
from mpo_ext.generate.feeding import Feeder
from mpo_ext.generate.ray_pool import BlockError
from mpo_ext.generate.ray_worker import Block, RayWorker
from mpo_ext.generate.sampler import journal_path
from mpo_ext.journal import SettingsMismatchError

ITEMS = 40
WAIT_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Starts a local Ray cluster."""
    ray = pytest.importorskip("ray", reason="ray is not installed: make ray-check")
    # The processes of the cluster get the environment of this process.
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()
    if old is not None:
        os.environ["PYTHONPATH"] = old


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    lines = [{"question": f"Q{n}", "chosen": f"It is {n}, as one sees."} for n in range(ITEMS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def plain(items: Path, tmp_path: Path) -> dict[str, bytes]:
    """Returns the contents of the files of a run without Ray, by name."""
    runner.run(make_pipeline(), StubEngine(), items, tmp_path / "plain", stream=None, block_size=4)
    return files(tmp_path / "plain")


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix != ".lock"}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "the condition must hold in time"
        time.sleep(0.02)


def n_records(out: Path) -> int:
    path = journal_path(out, 0, 1)
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def is_alive(pid: int) -> bool:
    try:
        return b"\nState:\tZ" not in Path(f"/proc/{pid}/status").read_bytes()
    except FileNotFoundError:
        return False


def test_two_engines_give_the_files_of_a_plain_run(
    cluster: Any, items: Path, plain: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "ray"
    run(items, out, tmp_path / "pids")
    assert files(out) == plain
    journal = journal_path(out, 0, 1)
    journal.write_bytes(plain[journal.name][: len(plain[journal.name]) * 2 // 3])  # as a kill leaves it
    run(items, out, tmp_path / "pids")
    assert files(out) == plain
    with pytest.raises(SettingsMismatchError, match=r"pipeline.samples: 2 in the file, 3 now"):
        run(items, out, tmp_path / "pids", samples=3)


def test_a_killed_worker_is_replaced(cluster: Any, items: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    out, pids = tmp_path / "ray", tmp_path / "pids"
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: n_records(out) > 20)
        killed.append(int(next(pids.iterdir()).name))
        os.kill(killed[0], 9)

    thread = threading.Thread(target=kill)
    thread.start()
    run(items, out, pids, delay_s=0.05)
    thread.join()
    assert len(list(pids.iterdir())) == 3
    assert files(out) == plain


def test_a_killed_worker_and_a_killed_driver(items: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: make ray-check")
    out, pids = tmp_path / "ray", tmp_path / "pids"
    script = Path(__file__).with_name("ray_driver.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), *filter(None, sys.path)])}
    command = [sys.executable, str(script), str(items), str(out), str(pids)]

    def processes() -> list[int]:
        """Returns the process ids of the Ray actors and of their child processes, oldest first."""
        return [int(path.name) for path in sorted(pids.iterdir(), key=lambda path: path.stat().st_mtime_ns)]

    driver = subprocess.Popen([*command, "0.5"], env=environment)
    wait_for(lambda: n_records(out) >= 8)
    os.kill(processes()[0], 9)
    wait_for(lambda: len(processes()) == 6)  # another actor has taken over
    driver.kill()
    driver.wait()
    assert 8 <= n_records(out) < 2 * ITEMS
    wait_for(lambda: not any(map(is_alive, processes())))
    subprocess.run([*command, "0"], env=environment, check=True)
    assert files(out) == plain


def test_a_slow_block_holds_no_other_block_back(
    cluster: Any, items: Path, plain: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "ray"
    early, seen = out / "early-00000-of-00001.jsonl", []

    def watch() -> None:
        wait_for(lambda: early.exists() and early.read_bytes().count(b"\n") > 4)
        seen.append(n_records(out))

    thread = threading.Thread(target=watch)
    thread.start()
    run(items, out, tmp_path / "pids", stub={"slow": "Q1"})
    thread.join()
    assert seen == [0]  # the first block was not finished
    assert files(out) == plain


def test_an_error_names_its_item_and_the_other_blocks_are_stored(
    cluster: Any, items: Path, plain: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "ray"
    message = r"items 7 to 8: FloatingPointError: NaN in 4 requests; alone, item 8 \('Q7'\) fails"
    with pytest.raises(BlockError, match=message):
        run(items, out, tmp_path / "pids", stub={"broken": "Q7"})
    assert 12 <= n_records(out) < 2 * ITEMS
    run(items, out, tmp_path / "pids")
    assert files(out) == plain


def test_a_deadly_block_is_named(cluster: Any, items: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "ray"
    with pytest.raises(BlockError, match=r"items 7 to 8: 3 engines died: "):
        run(items, out, tmp_path / "pids", stub={"deadly": "Q7"})
    run(items, out, tmp_path / "pids")
    assert files(out) == plain


def test_an_engine_that_cannot_be_created_is_an_error(cluster: Any, items: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"creating an engine failed: TypeError: .*unexpected keyword argument 'x'"):
        run(items, tmp_path / "ray", tmp_path / "pids", stub={"x": 1})


def test_a_missing_ray_is_said(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="ray_stages needs ray: install the extra 'ray' of mpo-ext"):
        run(items, tmp_path / "out", tmp_path / "pids")


def test_a_file_of_the_user_is_not_replaced(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pairs.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"pairs\.jsonl"):
        run(items, tmp_path / "out", tmp_path / "pids")


def test_a_worker_keeps_a_streaming_engine_busy() -> None:
    from test_feeding import StreamingStub

    from mpo_ext.generate.items import Item

    pipeline = make_pipeline()
    worker = RayWorker(pipeline, lambda: StreamingStub(3, stuck="Q0"), "2026-01-01")
    assert worker.start().concurrency == 3
    items = [Item(question=f"Q{n}", chosen="It is one, as one sees.") for n in range(4)]
    blocks = [Block(2 * n, n, [item], pipeline.keys(item)) for n, item in enumerate(items)]
    finished = worker.step(blocks)
    while len(finished) < 3:
        finished += worker.step([])
    assert {result.start for result in finished} == {2, 4, 6}  # the first block holds no other block back
    (failed,) = worker.step([])
    assert failed.error == "item 1 ('Q0'): TimeoutError: only requests that never end are running"
    assert isinstance(worker._feeder, Feeder)


def test_a_worker_reports_a_failed_block_and_finishes_the_others() -> None:
    from test_feeding import StreamingStub

    from mpo_ext.generate.items import Item

    pipeline = make_pipeline()
    worker = RayWorker(pipeline, lambda: StreamingStub(3, broken="Q0"), "2026-01-01")
    worker.start()
    items = [Item(question=f"Q{n}", chosen="It is one, as one sees.") for n in range(3)]
    results = worker.step([Block(2 * n, n, [item], pipeline.keys(item)) for n, item in enumerate(items)])
    while len(results) < 3:
        finished = worker.step([])
        assert finished
        results += finished
    errors = {result.start: result.error for result in results}
    assert errors.pop(0).startswith("item 1 ('Q0'): ValueError: top_k must be 0 for Q0")  # type: ignore[union-attr]
    assert errors == {2: None, 4: None}
    assert worker.step([]) == []
