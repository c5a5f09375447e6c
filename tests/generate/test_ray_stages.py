"""The stage of Ray Data, on two local workers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from stub_engine import StubEngine

from mpo_ext.generate import ray_stages, runner
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.sampler import journal_path


def write_items(path: Path) -> Path:
    lines = [{"question": f"Q{n}", "chosen": f"It is {n}, as one sees."} for n in range(13)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(source: Path, out: Path, **options: Any) -> Any:
    pipeline = DropoutNTP(DropoutNTPConfig(samples=2))
    engine = ray_stages.RemoteEngine(StubEngine, "stub", {"engine": "stub"})
    return ray_stages.run(pipeline, engine, source, out, block_size=4, stream=None, **options)


def test_two_workers_give_the_outputs_of_a_plain_run(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
    items = write_items(tmp_path / "items.jsonl")
    pipeline = DropoutNTP(DropoutNTPConfig(samples=2))
    runner.run(pipeline, StubEngine(), items, tmp_path / "plain", stream=None, block_size=4)
    environment = {"env_vars": {"PYTHONPATH": ":".join([str(Path(__file__).parent), *filter(None, sys.path)])}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    try:
        run(items, tmp_path / "ray", workers=2)
        journal = journal_path(tmp_path / "ray", 0, 1)
        whole = journal.read_bytes()
        journal.write_bytes(whole[: len(whole) * 2 // 3])  # as a kill leaves it
        run(items, tmp_path / "ray", workers=2)
    finally:
        ray.shutdown()
    assert journal.read_bytes() == whole
    for name in ("pairs.jsonl", "summary.json"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_missing_ray_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="ray_stages needs Ray Data: install the extra 'ray' of mpo-ext"):
        run(write_items(tmp_path / "items.jsonl"), tmp_path / "out")
