"""Tests engines that accept requests at any time.

A question may start before earlier questions have finished. The outputs must stay the same.
"""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from stub_engine import StubEngine
from test_runner import PIPELINES, outputs, run, write_items

from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Generation, Request
from mpo_ext.generate.feeding import Feeder, Steps
from mpo_ext.generate.sampler import journal_path
from mpo_ext.journal import read_records


class StreamingStub(StubEngine):
    """A stub engine that answers the submitted requests in a random order.

    Questions that contain ``refused`` are refused. Questions that contain ``stuck`` are never answered. ``submit``
    raises an error for questions that contain ``broken``.
    """

    def __init__(self, concurrency: int, *, refused: str = "?!", stuck: str = "?!", broken: str = "?!") -> None:
        super().__init__()
        self.concurrency, self.refused, self.stuck, self.broken = concurrency, refused, stuck, broken
        self.running: dict[str, Request] = {}
        self.ended: list[tuple[str, Generation]] = []
        self.most_running = self.submitted = 0
        self.rng = random.Random(0)
        self.names = itertools.count()

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        raise AssertionError("requests must be submitted")

    def submit(self, request: Request) -> str:
        if self.broken in request.question:
            raise ValueError(f"top_k must be 0 for {request.question}")
        name = str(next(self.names))
        self.submitted += 1
        if self.refused in request.question:
            self.ended.append((name, Generation((), "", "length", refusal=f"{request.key} is too long")))
        else:
            self.running[name] = request
            self.most_running = max(self.most_running, len(self.running))
        return name

    def finished(self) -> list[tuple[str, Generation]]:
        ended, self.ended = self.ended, []
        names = [name for name, request in self.running.items() if self.stuck not in request.question]
        if not names and not ended:
            raise TimeoutError("only requests that never end are running")
        for name in self.rng.sample(names, min(len(names), 3)):
            ended.append((name, self._answer(self.running.pop(name))))
        return ended

    def cancel(self, names: Sequence[str]) -> None:
        for name in names:
            self.running.pop(name, None)


@pytest.mark.parametrize("name", [*PIPELINES, "sample_chosen"])
def test_the_outputs_are_those_of_single_blocks(name: str, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 40)
    if name == "sample_chosen":
        lines = [json.loads(line) for line in items.read_text().splitlines()]
        for line in lines[::3]:
            del line["chosen"]
        items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pipeline = {**PIPELINES, "sample_chosen": lambda: DropoutNTP(DropoutNTPConfig(sample_chosen=True))}[name]()
    run(pipeline, items, tmp_path / "blocks", block_size=8)
    engine = StreamingStub(concurrency=20)
    run(pipeline, items, tmp_path / "stream", engine, block_size=8)
    assert outputs(tmp_path / "stream") == outputs(tmp_path / "blocks")
    journals = [journal_path(tmp_path / folder, 0, 1).read_bytes() for folder in ("stream", "blocks")]
    assert journals[0] == journals[1]
    assert 16 <= engine.most_running < 20 + 8
    assert engine.running == {}


def test_a_block_that_does_not_end_lets_a_limited_number_begin(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 100)
    engine = StreamingStub(concurrency=10, stuck="Question 2?")
    with pytest.raises(TimeoutError):
        run(Correctness(CorrectnessConfig(samples=2)), items, tmp_path / "out", engine, block_size=2)
    stored = [record["key"] for record in read_records(journal_path(tmp_path / "out", 0, 1))]
    assert len(stored) == 4
    assert engine.submitted == 4 + 40  # four times the concurrency
    assert engine.running == {}


def test_an_error_is_raised_after_the_complete_blocks_before_it(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 20)
    engine = StreamingStub(concurrency=4, broken="Question 5?")
    with pytest.raises(ValueError, match=r"top_k must be 0 for Question 5\?"):
        run(Correctness(CorrectnessConfig(samples=2)), items, tmp_path / "out", engine, block_size=2)
    stored = [record["key"] for record in read_records(journal_path(tmp_path / "out", 0, 1))]
    assert 2 <= len(stored) <= 10
    assert engine.running == {}


def test_a_failed_block_leaves_the_other_blocks() -> None:
    engine = StreamingStub(concurrency=9)

    def steps(tag: str) -> Steps:
        requests = [Request(question=f"{tag}{number}") for number in range(3)]
        generations = yield requests
        if tag == "b":
            raise RuntimeError("bad item")
        return [[{"text": generation.text}] for generation in generations]

    feeder = Feeder(engine)
    engine.broken = "c1"  # the request c0 runs already
    for tag in "abcd":
        feeder.add(tag, steps(tag))
    taken: list[tuple[Any, Any]] = []
    while feeder.n_blocks:
        taken += feeder.take(in_order=False)
        feeder.collect()
    results = dict(taken)
    assert list(map(len, (results["a"], results["d"]))) == [3, 3]
    assert (str(results["b"]), str(results["c"])) == ("bad item", "top_k must be 0 for c1")
    assert engine.running == {}
    assert engine.submitted == 10


def test_complete_blocks_behind_a_failed_block_stay() -> None:
    engine = StreamingStub(concurrency=9, broken="b")

    def steps(tag: str) -> Steps:
        yield [Request(question=tag)]
        return [[]]

    feeder = Feeder(engine)
    for tag in "abc":
        feeder.add(tag, steps(tag))
    feeder.collect()
    (first, second) = feeder.take(in_order=True)
    assert first == ("a", [[]])
    assert second[0] == "b"
    assert isinstance(second[1], ValueError)
    assert feeder.take(in_order=True) == [("c", [[]])]


def test_a_cut_journal_is_completed(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 20)
    pipeline = PIPELINES["correctness"]()
    run(pipeline, items, tmp_path / "out", StreamingStub(concurrency=30), block_size=16)
    path = journal_path(tmp_path / "out", 0, 1)
    journal, expected = path.read_bytes(), outputs(tmp_path / "out")
    for size in range(0, len(journal), 4001):
        path.write_bytes(journal[:size])
        engine = StreamingStub(concurrency=30)
        run(pipeline, items, tmp_path / "out", engine, block_size=16)
        assert path.read_bytes() == journal
        assert outputs(tmp_path / "out") == expected
    assert engine.submitted < 20 * 8


@pytest.mark.parametrize(
    "pipeline",
    [
        Correctness(CorrectnessConfig(samples=2)),
        DropoutNTP(DropoutNTPConfig(samples=2)),
        DropoutNTP(DropoutNTPConfig(samples=2, sample_chosen=True)),
    ],
    ids=["correctness", "dropout_ntp", "sample_chosen"],
)
def test_a_refused_prompt_skips_its_item(pipeline: Any, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 8)
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    if getattr(pipeline.config, "sample_chosen", False):
        del lines[5]["chosen"]
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = run(pipeline, items, tmp_path / "out", StreamingStub(4, refused="Question 5?"), block_size=4)
    assert summary.skipped["prompt refused by the engine"] == 1
    refused = [record for record in read_records(journal_path(tmp_path / "out", 0, 1)) if "refusal" in record]
    assert len(refused) == 2
    assert {record["refusal"].removesuffix(" is too long") for record in refused} <= {
        key for record in refused for key in (record["key"], record["key"].rpartition("-")[0])
    }
