"""Compares vLLM with TransformersEngine on text and images.

Also tests adapters, suppressed tokens, commands that are killed and resumed, and vLLM's server. ``make vllm-check``
runs these tests. They print the number of equal continuations. Where continuations differ, they print the gap between
the two largest logits.
"""

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import processes
import pytest
import run_engine
import torch

from mpo_ext.generate.engine import Request
from mpo_ext.generate.transformers_engine import TransformersEngine

SCRIPT = Path(run_engine.__file__)
#: Largest gap between two logits that float32 rounding may close; the logits of the models are of the order of 10.
TIE = 2e-5
pytestmark = pytest.mark.timeout(5400)


def run_script(
    engine: str, model: Path, items: Path, out: Path, *, environment: Mapping[str, str] | None = None, **options: Any
) -> None:
    processes.finish(processes.start(SCRIPT, engine, model, items, out, json.dumps(options), **(environment or {})))


@pytest.fixture(scope="session")
def expected(folder: Path) -> Callable[[str], Path]:
    """Returns a function from the name of a model, "text" or "image", to the folder of the expected results.

    TransformersEngine computes the results of each model once.
    """

    @functools.cache
    def results(kind: str) -> Path:
        engine = TransformersEngine.from_pretrained(str(folder / kind), dtype="float32", batch_size=32)
        run_engine.run_all(engine, folder / f"{kind}.jsonl", folder / "expected" / kind)
        return folder / "expected" / kind

    return results


@pytest.fixture(scope="session")
def vllm_runs(folder: Path) -> Callable[[str], Path]:
    """Returns a function that runs vLLM on a model, "text" or "image", and returns the results' folder.

    Results are cached.
    """

    @functools.cache
    def results(kind: str) -> Path:
        run_script("vllm", folder / kind, folder / f"{kind}.jsonl", folder / "vllm" / kind)
        return folder / "vllm" / kind

    return results


def generations(folder: Path, name: str = "generations") -> list[Any]:
    return json.loads((folder / f"{name}.json").read_text())


def journal(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("journal-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def gap_at(engine: TransformersEngine, request: Request, ids: Sequence[int]) -> float:
    """Returns the difference of the two largest logits for the token after ``ids``.

    The model reads the prompt of the request, the response prefix of the request, and ``ids``.
    """
    inputs = engine._inputs([Request(**{**vars_of(request), "prefix_ids": (*request.prefix_ids, *ids)})],
                            [engine.chat.prompt(request)])  # fmt: skip
    with torch.inference_mode():
        top = engine.model(**inputs).logits[0, -1].topk(2).values
    return float(top[0] - top[1])


def vars_of(request: Request) -> dict[str, Any]:
    names = ("key", "question", "messages", "tools", "images", "prefix_ids", "seed", "sampling")
    return {name: getattr(request, name) for name in names}


def require_equal_or_tied(
    kind: str, engine: TransformersEngine, requests: Sequence[Request], ours: list[Any], theirs: list[Any]
) -> None:
    """Asserts that both engines continue each request equally, except for differences that rounding can cause.

    At the first different token, the gap between the two largest logits must be below ``TIE``.
    """
    differences = []
    for request, our, their in zip(requests, ours, theirs, strict=False):
        if our != their:
            place = next((n for n, pair in enumerate(zip(our[0], their[0], strict=False)) if pair[0] != pair[1]),
                         min(len(our[0]), len(their[0])))  # fmt: skip
            gap = gap_at(engine, request, our[0][:place])
            differences.append(gap)
            print(f"{kind}: request {request.key} differs at token {place}: the gap of the logits is {gap:.2e}")
    print(f"{kind}: {len(ours) - len(differences)} of {len(ours)} greedy continuations are equal")
    assert len({tuple(our[0]) for our in ours}) > len(ours) // 2
    assert all(gap < TIE for gap in differences)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_greedy_continuations_equal_those_of_transformers(
    folder: Path, expected: Callable[[str], Path], vllm_runs: Callable[[str], Path], kind: str
) -> None:
    ours, (*theirs, long) = generations(expected(kind)), generations(vllm_runs(kind))
    assert len(ours) == len(theirs) == 200
    assert "longer than the maximum model length" in long[3] or "maximum" in long[3]
    engine = TransformersEngine.from_pretrained(str(folder / kind), dtype="float32")
    require_equal_or_tied(kind, engine, run_engine.requests_of(folder / f"{kind}.jsonl"), ours, theirs)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_conversations_equal_those_of_transformers(
    folder: Path, expected: Callable[[str], Path], vllm_runs: Callable[[str], Path], kind: str
) -> None:
    ours, theirs = (generations(runs(kind), "conversations") for runs in (expected, vllm_runs))
    assert [our[3] for our in ours] == [None] * 12
    engine = TransformersEngine.from_pretrained(str(folder / kind), dtype="float32")
    requests = run_engine.conversations_of(folder / f"{kind}.jsonl")
    require_equal_or_tied(f"{kind}, conversations", engine, requests, ours, theirs)


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("pipeline", ["dropout_ntp", "dropout_ntp_with_image", "correctness"])
def test_the_counts_of_the_summaries_are_equal(
    expected: Callable[[str], Path], vllm_runs: Callable[[str], Path], kind: str, pipeline: str
) -> None:
    folders = [runs(kind) / pipeline for runs in (expected, vllm_runs)]
    summaries = [json.loads((out / "summary.json").read_text()) for out in folders]
    print(f"{kind}, {pipeline}: {summaries[1]['items']} items, {summaries[1]['lines']}")
    assert summaries[0] == summaries[1]
    assert journal(folders[0]) == journal(folders[1])
    assert pipeline == "correctness" or summaries[0]["lines"]["pairs"] > 20


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_server_gives_what_the_engine_in_this_process_gives(
    folder: Path, vllm_runs: Callable[[str], Path], kind: str
) -> None:
    """Compares the results of the server with those of the engine, for greedy and for random samples.

    Some requests have prefixes, images or both.
    """
    out = folder / "server" / kind
    with processes.server(folder / kind) as url:
        run_script("openai", folder / kind, folder / f"{kind}.jsonl", out, base_url=url)
    ours, theirs = generations(vllm_runs(kind)), generations(out)
    engine = TransformersEngine.from_pretrained(str(folder / kind), dtype="float32")
    items = folder / f"{kind}.jsonl"
    require_equal_or_tied(f"server, {kind}", engine, run_engine.requests_of(items), ours[:-1], theirs[:-1])
    turns = [generations(path, "conversations") for path in (vllm_runs(kind), out)]
    require_equal_or_tied(f"server, {kind}, conversations", engine, run_engine.conversations_of(items), *turns)
    assert "status 400" in theirs[-1][3]
    for pipeline in run_engine.PIPELINES:
        ours, theirs = journal(vllm_runs(kind) / pipeline), journal(out / pipeline)
        equal = sum(one == two for one, two in zip(ours, theirs, strict=True))
        print(f"server, {kind}, {pipeline}: {equal} of {len(ours)} records are equal")
        assert equal == len(ours)
    summary = json.loads((out / "drawn" / "summary.json").read_text())
    assert summary["lines"]["pairs"] > 20


def test_suppressed_tokens_and_adapters(folder: Path) -> None:
    from peft import PeftModel

    items, adapter = folder / "text.jsonl", str(folder / "adapter")
    run_script("vllm", folder / "suppressed", items, folder / "adapted", adapter=adapter)
    engine = TransformersEngine.from_pretrained(str(folder / "suppressed"), dtype="float32", batch_size=32)
    plain = engine.generate(run_engine.requests_of(items)[:20])
    engine.model = PeftModel.from_pretrained(engine.model, adapter).merge_and_unload().eval()
    run_engine.run_all(engine, items, folder / "adapted-expected")
    ours, (*theirs, _) = generations(folder / "adapted-expected"), generations(folder / "adapted")
    requests = run_engine.requests_of(items)
    require_equal_or_tied("adapter and suppressed tokens", engine, requests, ours, theirs)
    assert not {token for row in theirs for token in row[0]} & set(engine.model.generation_config.suppress_tokens)
    assert [list(made.token_ids) for made in plain] != [row[0] for row in ours[:20]]


@pytest.fixture
def command(folder: Path) -> list[object]:
    """Returns the arguments of a command that samples like the pipeline "drawn" in run_engine.py.

    Tests replace the argument "OUT" by the output folder.
    """
    options = ["--engine", "vllm", "--dtype", "float32", "--samples", "8", "--temperature", "1", "--allow-truncated",
               "--max-new-tokens", "12", "--matcher", "exact", "--style", "regex:([a-z])"]  # fmt: skip
    for name, value in run_engine.VLLM.items():
        options += [] if name == "dtype" else ["--engine-option", f"{name}={json.dumps(value)}"]
    options += [
        "--limit",
        str(run_engine.N_ITEMS),
        "--engine-option",
        "concurrency=16",
    ]  # so that a kill meets the run in its middle
    return [
        "-m",
        "mpo_ext",
        "sample",
        "correctness",
        folder / "text.jsonl",
        "OUT",
        "--model",
        folder / "text",
        *options,
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_command_leaves_no_process_and_resumes(
    folder: Path, vllm_runs: Callable[[str], Path], command: list[object], number: signal.Signals
) -> None:
    out = folder / f"killed-{number.name}"
    words = [out if word == "OUT" else word for word in command]
    process = processes.start(*words)
    path = out / "journal-00000-of-00001.jsonl"
    deadline_s = time.monotonic() + processes.LIMIT_S
    while not path.exists() or len(path.read_bytes().splitlines()) < 100:
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    pids = processes.descendants(process.pid)
    process.send_signal(number)
    process.wait(120)
    records = len(path.read_bytes().splitlines()) - 1
    begun_s = time.monotonic()
    while any(map(processes.is_alive, pids)) and time.monotonic() < begun_s + 60:
        time.sleep(0.05)
    gone_s = time.monotonic() - begun_s
    print(f"{number.name} after {records} records: {len(pids)} processes had ended after {gone_s:.1f} s")
    assert len(pids) >= 2  # the watcher and vLLM's engine
    assert gone_s < 30
    assert records < 480
    processes.finish(processes.start(*words))
    for name in ("pairs.jsonl", "format_pairs.jsonl", "unsolved.jsonl"):
        assert sorted((out / name).read_bytes().splitlines()) == sorted(
            (vllm_runs("text") / "drawn" / name).read_bytes().splitlines()
        )
    assert journal(out) == journal(vllm_runs("text") / "drawn")


def test_two_processes_of_a_model(folder: Path, vllm_runs: Callable[[str], Path]) -> None:
    """Tests tensor parallelism. Each process has half of each matrix, so sums are rounded differently."""
    # vLLM binds its processes to NUMA nodes. On a machine with a single node, it needs an explicit list of cores.
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("vLLM on CPUs needs a core for each process, and this machine has one core")
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}"}
    out = folder / "parallel"
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    run_script("vllm", folder / "text", folder / "text.jsonl", out, environment=environment, **options)
    engine = TransformersEngine.from_pretrained(str(folder / "text"), dtype="float32")
    ours, theirs = generations(vllm_runs("text")), generations(out)
    requests = run_engine.requests_of(folder / "text.jsonl")
    require_equal_or_tied("tensor_parallel_size=2", engine, requests, ours[:-1], theirs[:-1])
