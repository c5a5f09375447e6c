"""Everything that needs a GPU, in one command: ``make gpu-check``, or ``python -m benchmarks.gpu_check``.

Builds the CUDA kernels, runs all tests on every backend, runs a small program under compute-sanitizer, checks what
only hardware can show (streams, CUDA graphs, bits, the static CUDA runtime beside torch's), and measures. Leaves a
folder with report.md, results.json and one log per step; a step that fails does not keep the others from running.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import environment
from mpo_ext import linear_mpo_loss, mpo_loss, token_logp

STEPS = ("build", "tests", "sanitizer", "hardware", "measure", "linear")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PEERS = {  # distribution to what it computes from the same logits
    "liger-kernel": "mean cross entropy; writes the gradient over the logits in the forward",
    "trl": "log-prob of each label",
    "quack-kernels": "cross entropy of each row",
    "cut-cross-entropy": "mean cross entropy from hidden states of width 2048, so with the projection",
}
L2_BYTES = 256 << 20  # more than any GPU's second-level cache; written between runs to empty it


@dataclass
class Case:
    """One shape to measure: a pair of sequences, the last ``share`` of each labelled."""

    tokens: int = 4096  # of each of the two sequences
    vocab: int = 151_936
    dtype: str = "bfloat16"
    share: float = 1.0

    @property
    def labelled(self) -> int:
        return 2 * round(self.tokens * self.share)

    @property
    def row_bytes(self) -> int:
        return self.vocab * getattr(torch, self.dtype).itemsize

    def bytes_needed(self, what: str) -> int:
        """What any method must move: labelled logits read once forward, and once backward; each gradient written."""
        forward = self.labelled * self.row_bytes
        backward = forward + 2 * self.tokens * self.row_bytes
        return {"forward": forward, "backward": backward, "both": forward + backward}[what]

    def __str__(self) -> str:
        return f"[2, {self.tokens}, {self.vocab}] {self.dtype}, {self.share:.0%} labelled"


CASES = (
    Case(),
    Case(share=0.1),
    Case(dtype="float32"),
    Case(vocab=151_674),
    Case(vocab=92_553, tokens=2048),
    Case(tokens=512, share=0.05),
)


@dataclass
class Step:
    """What became of one step."""

    name: str
    passed: bool
    seconds: float
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------ steps to run


def commands(step: str, root: Path) -> dict[str, list[str]]:
    """The commands of a step, by the name of their log."""
    python = sys.executable
    if step == "build":
        return {"build": [python, "-m", "pip", "install", "-c", "constraints.txt", "-e", ".[dev]"]}
    if step == "tests":
        return {"tests": [python, "-m", "pytest", str(root / "tests")]}
    if step == "sanitizer":
        program = [python, "-m", "benchmarks.gpu_check", "--small-program"]
        return {f"sanitizer-{tool}": ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]
                for tool in SANITIZERS}  # fmt: skip
    if step == "linear":  # from hidden states: one pair of 4,096 tokens each, as one GPU of a training run sees it
        sizes = ["--tokens", "4096", "--depth", "4096", "--shares", "1.0", "0.1", "--dtypes", "bfloat16"]
        return {"linear": [python, "-m", "benchmarks.linear", "--device", "cuda", "--runs", "10", *sizes]}
    raise ValueError(f"step must be build, tests, sanitizer or linear, got {step!r}")


def step_environment(step: str) -> dict[str, str]:
    """The environment of a step's commands."""
    env = dict(os.environ)
    if step == "build":
        env |= {"MPO_CUDA": "ON", "MPO_WERROR": "ON"}
    if step == "tests":
        triton = ",triton" if importlib.util.find_spec("triton") else ""
        env |= {"MPO_TEST_BACKENDS": f"reference,cpu,cuda{triton}"}
    if step == "sanitizer":
        env |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else an overrun lands in the allocator's own block
    return env


def run_step(step: str, root: Path, out: Path) -> Step:
    """Runs the commands of a step, each into its log."""
    start = time.perf_counter()
    notes = []
    for name, command in commands(step, root).items():
        if shutil.which(command[0]) is None:
            notes.append(f"{name}: {command[0]} is not on PATH")
            continue
        with (out / f"{name}.log").open("w") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            status = subprocess.run(
                command, cwd=root, env=step_environment(step), stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        if status != 0:
            notes.append(f"{name}: exit status {status}, see {name}.log")
    return Step(step, not notes, time.perf_counter() - start, notes)


# ------------------------------------------------------------------------------------------------- what hardware shows


def small_batch(device: str, dtype: torch.dtype, vocab: int, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of two pairs, part of it ignored, whose rows start off the 16-byte grid if ``vocab`` is odd."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(4, tokens, vocab, generator=generator).to(dtype)
    labels = torch.randint(vocab, (4, tokens), generator=generator)
    labels[:, :3] = -100
    return logits.to(device), labels.to(device), torch.linspace(-60, -30, 4).to(device)


def loss_and_grad(batch: tuple[Tensor, Tensor, Tensor], backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss of a batch and the gradient of its logits."""
    logits = batch[0].detach().requires_grad_()
    loss = mpo_loss(logits, *batch[1:], backend=backend, **options).loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def small_program(device: str = "cuda", backend: str = "cuda") -> list[str]:
    """Every kernel on small shapes, compared with plain torch. Returns what is wrong. For compute-sanitizer too."""
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocab in (1, 7, 1003, 32_768, 92_553):
            batch = small_batch(device, dtype, vocab)
            for stats in ((), ("entropy", "mean_logit", "top1")):
                loss, grad = loss_and_grad(batch, backend, stats=stats)
                expected, expected_grad = loss_and_grad(batch, "reference", stats=stats)
                eps = torch.finfo(dtype).eps
                if not torch.allclose(loss, expected, rtol=1e-5, atol=1e-5):
                    wrong.append(f"{dtype}, V = {vocab}: loss {float(loss)}, expected {float(expected)}")
                if not torch.allclose(grad.float(), expected_grad.float(), rtol=2 * eps, atol=2e-6):
                    wrong.append(f"{dtype}, V = {vocab}: the gradient differs from plain torch")
            rows = token_logp(batch[0], batch[1], backend=backend)
            if not torch.allclose(rows, token_logp(batch[0], batch[1], backend="reference"), rtol=1e-5, atol=1e-5):
                wrong.append(f"{dtype}, V = {vocab}: token_logp differs from plain torch")
            wrong += [f"{dtype}, V = {vocab}: {problem}" for problem in linear_problems(device, dtype, vocab, backend)]
    return wrong


def linear_problems(device: str, dtype: torch.dtype, vocab: int, backend: str) -> list[str]:
    """The loss from hidden states in many tiles, in its three modes, compared with float64 on the same values."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(4, 9, 64, generator=generator).to(device, dtype)
    weight = (torch.randn(vocab, 64, generator=generator) / 8).to(device, dtype)
    labels = torch.randint(vocab, (4, 9), generator=generator)
    labels[:, :3] = -100
    ref_logp = torch.linspace(-60, -30, 4).to(device)

    def run(
        precision: torch.dtype, head_backend: str, is_frozen: bool, **options: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = [hidden.to(precision).requires_grad_(), weight.to(precision).requires_grad_(not is_frozen)]
        loss = linear_mpo_loss(*inputs, labels, ref_logp, backend=head_backend, **options).loss
        return loss.detach(), torch.autograd.grad(loss, [tensor for tensor in inputs if tensor.requires_grad])

    problems = []
    for is_frozen, recompute in ((False, True), (False, False), (True, True)):
        loss, gradients = run(dtype, backend, is_frozen, recompute=recompute, memory_budget=1 << 16)
        expected, expected_gradients = run(torch.float64, "reference", is_frozen)
        mode = "frozen head" if is_frozen else f"recompute={recompute}"
        if not torch.allclose(loss.double(), expected.double(), rtol=1e-5, atol=1e-5):
            problems.append(f"linear_mpo_loss, {mode}: loss {float(loss)}, expected {float(expected)}")
        for found, exact in zip(gradients, expected_gradients, strict=True):
            if (found.double() - exact).norm() > 2 * torch.finfo(dtype).eps * exact.norm() + 1e-6:
                problems.append(f"linear_mpo_loss, {mode}: a gradient is off by {(found.double() - exact).norm():.2e}")
    return problems


def check_bits() -> str | None:
    """The same bits each time, whatever the order of blocks."""
    batch = small_batch("cuda", torch.bfloat16, 151_674, 40)
    first = loss_and_grad(batch, "cuda")
    for _ in range(20):
        again = loss_and_grad(batch, "cuda")
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return "two runs gave different bits"
    return None


def check_side_stream() -> str | None:
    """A side stream that has to wait: a launch on any other stream would read logits that are not there yet."""
    batch = small_batch("cuda", torch.bfloat16, 32_768)
    expected = loss_and_grad(batch, "cuda")
    torch.cuda.synchronize()
    late = torch.full_like(batch[0], torch.nan)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(batch[0], non_blocking=True)
        found = loss_and_grad((late, *batch[1:]), "cuda")
    stream.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    return None if same else "on a side stream the result differs"


def check_second_device() -> str | None:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        return None
    batch = small_batch("cuda:1", torch.float32, 1003)
    loss, _ = loss_and_grad(batch, "cuda")
    expected, _ = loss_and_grad(batch, "reference")
    return None if torch.allclose(loss, expected) else "on a second device the result differs"


def check_graph() -> str | None:
    """Forward and backward captured in a CUDA graph, replayed on new logits."""
    batch = small_batch("cuda", torch.float32, 1003)
    static = batch[0].clone()
    loss_and_grad((static, *batch[1:]), "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_grad((static, *batch[1:]), "cuda")
    for factor in (1.0, 0.5, 2.0):
        static.copy_(batch[0] * factor)
        graph.replay()
        expected = loss_and_grad((batch[0] * factor, *batch[1:]), "cuda")
        if not all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True)):
            return f"a replayed graph gave another result at factor {factor}"
    return None


def check_launches() -> str | None:
    """One kernel of ours forward, and one backward."""
    from torch.profiler import ProfilerActivity, profile

    batch = small_batch("cuda", torch.bfloat16, 1003)
    loss_and_grad(batch, "cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        loss_and_grad(batch, "cuda")
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if "mpo" in event.name and "kernel" in event.name]
    expected = len(names) == 2 and "token_logp" in names[0] and "logits_grad" in names[1]
    return None if expected else f"expected token_logp_kernel and logits_grad_kernel, got {names}"


def run_hardware_checks() -> Step:
    """All of the above. That they pass at all shows that the static CUDA runtime works beside torch's."""
    start = time.perf_counter()
    notes = [f"small program: {problem}" for problem in small_program()]
    for check in (check_bits, check_side_stream, check_second_device, check_graph, check_launches):
        try:
            problem = check()
        except Exception as error:  # a report of the rest is worth more than a traceback
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            notes.append(f"{check.__name__}: {problem}")
    return Step("hardware", not notes, time.perf_counter() - start, notes)


# -------------------------------------------------------------------------------------------------------- measurement


@dataclass
class Timing:
    """Milliseconds of the counted runs, and the peak of memory beyond the logits."""

    ms: list[float]
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def spread(self) -> tuple[float, float]:
        """20th and 80th percentile."""
        ordered = sorted(self.ms)
        return ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]


class Clock:
    """Times calls on a device: with events on a GPU, and with a second-level cache that holds nothing of use."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.is_gpu = device.startswith("cuda")
        self.flush = torch.empty(L2_BYTES if self.is_gpu else 1, dtype=torch.uint8, device=device)

    def time(self, run: Callable[[], object]) -> float:
        if not self.is_gpu:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that a call allocates at most."""
        if not self.is_gpu:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def interleaved(self, cases: Mapping[str, tuple[Callable[[], object], Callable[[], object]]], runs: int) -> dict:
        """Times (prepare, run) of each case in turn, after two rounds that are not counted."""
        timings = {name: Timing([]) for name in cases}
        for number in range(runs + 2):
            for name, (prepare, run) in cases.items():
                prepare()
                elapsed = self.time(run)
                if number >= 2:
                    timings[name].ms.append(elapsed)
        for name, (prepare, run) in cases.items():
            prepare()
            timings[name].peak_bytes = self.peak(run)
        return timings


def copy_bandwidth(clock: Clock, nbytes: int = 1 << 30) -> float:
    """GB/s of reading and writing when one large tensor is copied into another."""
    source, target = (torch.empty(nbytes, dtype=torch.uint8, device=clock.device) for _ in range(2))
    timing = clock.interleaved({"copy": (lambda: None, lambda: target.copy_(source))}, 10)["copy"]
    return 2 * nbytes / timing.median / 1e6


def make_batch(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """One pair of the case's shape."""
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    logits = torch.randn(2, case.tokens, case.vocab, generator=generator, device=device, dtype=dtype)
    labels = torch.randint(case.vocab, (2, case.tokens), generator=generator, device=device)
    labels[:, : case.tokens - case.labelled // 2] = -100
    return logits, labels, torch.full((2,), -10.0 * case.tokens, device=device)


Loss = Callable[[Tensor], Tensor]  # logits that want a gradient to a loss


def rivals(batch: tuple[Tensor, Tensor, Tensor], backends: list[str]) -> dict[str, Loss]:
    """What gets measured on these logits: ours, plain torch, and the peers that are installed."""
    _, labels, ref_logp = batch

    def ours(backend: str) -> Loss:
        return lambda logits: mpo_loss(logits, labels, ref_logp, shift=False, backend=backend).loss

    found = {f"mpo_ext, {backend}": ours(backend) for backend in backends}
    found["eager"] = ours("reference")
    found["torch.compile"] = torch.compile(ours("reference"), dynamic=False)
    for name, make in (
        ("liger-kernel", _liger),
        ("trl", _trl),
        ("quack-kernels", _quack),
        ("cut-cross-entropy", _cce),
    ):
        try:
            found[name] = make(labels)
        except (ImportError, AttributeError):
            continue
    return found


def _liger(labels: Tensor) -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits: liger_cross_entropy(logits.flatten(0, 1), labels.flatten())


def _trl(labels: Tensor) -> Loss:
    from trl.trainer.utils import selective_log_softmax

    labelled = labels != -100
    index = labels.clamp(min=0)
    return lambda logits: -(selective_log_softmax(logits, index) * labelled).sum() / labelled.sum()


def _quack(labels: Tensor) -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda logits: cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="mean")


def _cce(labels: Tensor) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def run(logits: Tensor) -> Tensor:
        hidden, weight = run.inputs  # type: ignore[attr-defined]
        return linear_cross_entropy(hidden, weight, labels.flatten()) + 0 * logits.flatten()[0]

    def prepared(logits: Tensor) -> Tensor:
        if not hasattr(run, "inputs"):
            options = {"device": logits.device, "dtype": logits.dtype}
            hidden = torch.randn(labels.numel(), 2048, **options, requires_grad=True)
            run.inputs = hidden, torch.randn(logits.shape[-1], 2048, **options, requires_grad=True)  # type: ignore
        return run(logits)

    return prepared


def measure(case: Case, clock: Clock, backends: list[str], runs: int) -> dict[str, dict[str, Timing]]:
    """Forward, backward and both of each rival; a rival that fails is left out with a word on the terminal."""
    batch = make_batch(case, clock.device)
    leaf = batch[0].requires_grad_()
    graphs: dict[str, Tensor] = {}
    losses = rivals(batch, backends)
    pristine = batch[0].detach().clone() if "liger-kernel" in losses else None  # which it overwrites

    def restore() -> None:
        if pristine is not None:
            leaf.detach().copy_(pristine)

    found: dict[str, dict[str, tuple[Callable[[], object], Callable[[], object]]]] = {}
    for name, loss in losses.items():

        def forward(loss: Loss = loss) -> Tensor:
            with torch.no_grad():
                return loss(leaf)

        def prepare(name: str = name, loss: Loss = loss) -> None:
            restore()
            graphs[name] = loss(leaf)

        def backward(name: str = name) -> None:
            torch.autograd.grad(graphs.pop(name), leaf)

        def both(loss: Loss = loss) -> None:
            torch.autograd.grad(loss(leaf), leaf)

        try:
            both()
        except Exception as error:  # a rival that cannot do this shape
            print(f"  {name} fails on {case}: {type(error).__name__}: {str(error)[:200]}")
            continue
        found[name] = {
            "forward": (restore, forward),
            "backward": (prepare, backward),
            "both": (restore, both),
        }
    return {
        what: clock.interleaved({n: c[what] for n, c in found.items()}, runs)
        for what in ("forward", "backward", "both")
    }


# ------------------------------------------------------------------------------------------------------------- report


def render_table(case: Case, timings: Mapping[str, Mapping[str, Timing]], bandwidth: float) -> str:
    """A Markdown table of one case."""
    lines = [
        f"### {case}",
        "",
        "| what | who | ms, median (p20 .. p80) | GB/s | share of copy | peak memory, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for what, rows in timings.items():
        needed = case.bytes_needed(what)
        for name, timing in rows.items():
            rate = needed / timing.median / 1e6
            low, high = timing.spread
            lines.append(
                f"| {what} | {name} | {timing.median:.3f} ({low:.3f} .. {high:.3f}) | {rate:.0f} "
                f"| {rate / bandwidth:.0%} | {timing.peak_bytes / 2**20:.1f} |"
            )
    return "\n".join([*lines, ""])


def render_report(
    facts: Mapping[str, str], steps: list[Step], bandwidth: float | None, tables: list[str], peers: Mapping[str, str]
) -> str:
    """The whole report as Markdown."""
    lines = ["# mpo_ext on a GPU", "", "| fact | value |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    lines += ["", "## Steps", "", "| step | result | seconds |", "| --- | --- | --- |"]
    lines += [f"| {step.name} | {'passed' if step.passed else 'FAILED'} | {step.seconds:.0f} |" for step in steps]
    lines += ["", *[f"- {step.name}: {note}" for step in steps for note in step.notes]]
    if bandwidth is not None:
        lines += [
            "",
            "## Speed",
            "",
            f"Copy bandwidth of this run: {bandwidth:.0f} GB/s, read and written bytes together. GB/s below are "
            "the bytes that any method must move over the time taken; the caches are emptied between runs.",
            "",
            *[f"- {name}: {task}" for name, task in peers.items()],
            "",
            *tables,
        ]
    return "\n".join(lines) + "\n"


def gpu_facts() -> dict[str, str]:
    """What the figures must be quoted with."""
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    facts = {
        "gpu": f"{properties.name}, {properties.multi_processor_count} multiprocessors",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "driver": driver.stdout.strip().splitlines()[0] if driver.stdout.strip() else "unknown",
        "torch's CUDA": str(torch.version.cuda),
        **environment(),
    }
    for name in ("triton", *PEERS):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def main(argv: list[str] | None = None) -> int:
    """Runs the steps and returns 0 if all passed, 1 if not, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the report")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--runs", type=int, default=20, help="counted runs of each measurement")
    parser.add_argument("--small-program", action="store_true", help="run only what compute-sanitizer watches")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check needs an NVIDIA GPU and a torch that sees it; torch.cuda.is_available() is False")
        return 2
    if args.small_program:
        problems = small_program()
        print("\n".join(problems) or "the small program agrees with plain torch")
        return 1 if problems else 0

    root = Path(__file__).parents[1]
    args.out.mkdir(parents=True, exist_ok=True)
    steps: list[Step] = []
    for name in ("build", "tests", "sanitizer", "linear"):
        if name in args.steps:
            print(f"{name} ...", flush=True)
            steps.append(run_step(name, root, args.out))
    if "hardware" in args.steps:
        steps.append(run_hardware_checks())
    bandwidth, tables, results = None, [], []
    if "measure" in args.steps:
        start = time.perf_counter()
        clock = Clock("cuda")
        bandwidth = copy_bandwidth(clock)
        backends = ["cuda", *(["triton"] if importlib.util.find_spec("triton") else [])]
        for case in CASES:
            timings = measure(case, clock, backends, args.runs)
            tables.append(render_table(case, timings, bandwidth))
            results.append(
                {**asdict(case), "timings": {w: {n: asdict(t) for n, t in r.items()} for w, r in timings.items()}}
            )
            torch.cuda.empty_cache()
        steps.append(Step("measure", True, time.perf_counter() - start))
    facts = gpu_facts()
    (args.out / "report.md").write_text(render_report(facts, steps, bandwidth, tables, PEERS))
    (args.out / "results.json").write_text(
        json.dumps(
            {"facts": facts, "steps": [asdict(step) for step in steps], "copy_gb_per_s": bandwidth, "cases": results},
            indent=2,
        )
        + "\n"
    )
    print(f"{args.out / 'report.md'}: " + ", ".join(f"{s.name} {'passed' if s.passed else 'FAILED'}" for s in steps))
    return 0 if all(step.passed for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
