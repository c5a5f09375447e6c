"""Runs recipes in child processes, one process per rank. Tests can kill or signal a process at a chosen moment.

To save time, the processes are forked from a server that has already imported the trainer. For tests of the command
line, ``write_text_run`` writes a small text model, its tokenizer, and pairs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

LIMIT_S = float(os.environ.get("MPO_RUN_LIMIT_S", "120"))  # seconds of a run; a busy machine needs more
#: Keys of the log that depend on the clock and the machine.
TIMING = ("step_s", "tokens_per_s", "pairs_per_s", "memory_mib")
HERE = Path(__file__).parent
# One thread: sums are in one order then. No GPU: other tests have it.
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "MPO_CPU_MATMUL": "float32",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run with the tiny model from ``digits_run``, or with a model in a folder.

    Attributes:
        out: Folder of the run. The files beside the folder have the same name and a suffix. ``.text`` is the printed
            output, ``.rank0`` ... are the final parameters of each rank, and ``.events`` is the number of events (see
            ``die_at_event``).
        pairs: File to train on.
        settings: Overrides of the recipe, as in ``digits_run.recipe``.
        hook: Called in each process with its rank, before the run.
        world_size: Number of processes.
        sharded: Whether the processes shard the model (FSDP2) instead of copying it (DDP).
        zero: Settings of DeepSpeed's ZeRO, such as its stage; None: no DeepSpeed.
        model: Folder of the model; None: each process makes the tiny model of ``digits_run``.
    """

    out: Path
    pairs: Path
    settings: dict[str, Any]
    hook: Callable[[int], None] | None = None
    world_size: int = 1
    sharded: bool = False
    zero: dict[str, Any] | None = None
    model: Path | None = None

    def beside(self, suffix: str) -> Path:
        return self.out.with_name(f"{self.out.name}.{suffix}")


@functools.lru_cache(None)
def server() -> Any:
    """Returns a multiprocessing context. Its processes are forked from a server that has imported the trainer."""
    # Unlike the test process, the server has no threads: a fork could wait forever for a lock of another thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_recipe_preload", "run_recipe"])
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), before.get("PYTHONPATH"))))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def start(job: Job) -> list[Any]:
    """Starts the processes of a run and returns them."""
    context = server()
    job.out.parent.mkdir(parents=True, exist_ok=True)
    for name in ("store", "begun"):
        job.beside(name).unlink(missing_ok=True)
    for rank in range(job.world_size):
        job.beside(f"rank{rank}").unlink(missing_ok=True)
    processes = [context.Process(target=_work, args=(job, rank)) for rank in range(job.world_size)]
    for process in processes:
        process.start()
    return processes


def finish(processes: Sequence[Any], limit_s: float = LIMIT_S) -> list[int]:
    """Waits for processes and returns their exit codes. If they need over ``limit_s`` seconds, kills all and fails."""
    end_s = time.monotonic() + limit_s
    for process in processes:
        process.join(max(end_s - time.monotonic(), 0.01))
    late = [number for number, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    assert not late, f"processes {late} of {len(processes)} must end within {limit_s} s"
    return [process.exitcode for process in processes]


def run(job: Job, limit_s: float = LIMIT_S) -> list[int]:
    """Runs a job to its end. Returns the exit code of each process."""
    return finish(start(job), limit_s)


def text_of(job: Job) -> str:
    """Returns the printed output of all runs of this job."""
    path = job.beside("text")
    return path.read_text() if path.exists() else ""


def log_of(job: Job) -> list[dict[str, Any]]:
    """Returns the log's lines, without values that depend on the clock or the machine."""
    lines = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in TIMING} for line in lines]


def result_of(job: Job, rank: int = 0) -> dict[str, Any]:
    """Returns the final state of a rank: "weights" (parameters by name) and "reward_shift" (the shift's state)."""
    import torch

    return torch.load(job.beside(f"rank{rank}"))


def _work(job: Job, rank: int) -> None:
    """Trains in this process, and exits with the trainer's status."""
    with open(job.beside("text"), "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(ENVIRONMENT)
    try:
        code = _train(job, rank)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(code)


def _train(job: Job, rank: int) -> int:
    import digits_run
    import torch

    from mpo_ext.train import loop, model_card, zero

    torch.set_num_threads(1)
    model_card.write_card = lambda *args, **kwargs: None  # drawing takes longer than the run
    if job.world_size > 1 or job.zero is not None:
        _join_ranks(job, rank)
    if job.hook is not None:
        job.hook(rank)
    model, processor = digits_run.tiny() if job.model is None else (None, None)
    settings = job.settings if job.model is None else {**job.settings, "model__path": str(job.model)}
    recipe = digits_run.recipe(job.out.with_name(f"{job.out.name}.{rank}") / job.out.name, job.pairs, **settings)
    recipe = dataclasses.replace(recipe, output=dataclasses.replace(recipe.output, dir=str(job.out)))
    job.beside("begun").touch()
    trainer = loop.Trainer(recipe, model=model, processor=processor)
    end_training = trainer.accelerator.end_training

    def keep_and_end() -> None:
        # As the last to hold its process group, DDP may wait for ever for the group's threads.
        assert not [value for value in gc.get_objects() if type(value) is torch.nn.parallel.DistributedDataParallel]
        weights = {}
        for name, value in trainer.model.named_parameters():
            with zero.gathered(value):
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                weights[name] = whole.detach().clone()
        torch.save(
            {"weights": weights, "reward_shift": trainer.state.reward_shift.state_dict()}, job.beside(f"rank{rank}")
        )
        trainer.accelerator.wait_for_everyone()
        end_training()

    trainer.accelerator.end_training = keep_and_end
    return trainer.run()


def _join_ranks(job: Job, rank: int) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.world_size, "LOCAL_WORLD_SIZE": job.world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.beside('store')}",
        rank=rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=60),
    )
    if job.sharded:
        os.environ.update(_FSDP2)
    if job.zero is not None:
        config = job.beside(f"zero{rank}.json")
        # Otherwise ZeRO-3 leaves parameters of less than 100,000 elements whole.
        zero = {"stage3_param_persistence_threshold": 0, **job.zero}
        config.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero}))
        os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(config))


# Hooks


def _count_calls(owner: Any, name: str, before: Callable[[], None]) -> None:
    call = getattr(owner, name)

    @functools.wraps(call)
    def counted(*args: Any, **kwargs: Any) -> Any:
        before()
        return call(*args, **kwargs)

    setattr(owner, name, counted)


def die_at_event(number: int | None, events: Path, rank: int) -> None:
    """Makes this process kill itself right before an event.

    Events are policy losses, reference forwards, optimizer updates, lines of the log, and changes on disk.

    Args:
        number: Number of the event, from 0; None: kill nothing, but count all events.
        events: File into which the count is written if ``number`` is None.
        rank: Rank of the process.
    """
    import torch

    from mpo_ext.train import batch_loss, metrics, reference_file, reference_model

    done = 0

    def count() -> None:
        nonlocal done
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        if number is None:
            events.write_text(str(done))

    for name in ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir", "truncate"):
        _count_calls(os, name, count)
    for name in ("linear_mpo_loss", "mpo_loss"):
        _count_calls(batch_loss, name, count)
    _count_calls(reference_model, "linear_token_logp", count)
    _count_calls(torch.optim.AdamW, "step", count)
    _count_calls(metrics.Log, "append", count)
    _count_calls(reference_file.Journal, "append", count)


def signal_at_forward(number: int, signals: Sequence[int], only: int | None, rank: int) -> None:
    """Makes the process send signals to itself in a forward pass of the policy.

    Args:
        number: Number of the forward pass, from 0.
        signals: Signals to send, in order.
        only: Rank that sends the signals; None: all ranks send them.
        rank: Rank of the process.
    """
    from mpo_ext.train import batch_loss

    passes = 0

    def count() -> None:
        nonlocal passes
        if passes == number and only in (None, rank):
            for number_of_signal in signals:
                os.kill(os.getpid(), number_of_signal)
        passes += 1

    _count_calls(batch_loss, "linear_mpo_loss", count)


def count_reference_pairs(path: Path, rank: int) -> None:
    """Makes this process write a line to the file ``path`` for each pair that the reference model scores."""
    from mpo_ext.train import reference_file

    original = reference_file.sequence_logp

    def counted(model: Any, batch: Any, recipe: Any) -> Any:
        with open(path, "a") as file:
            file.writelines(f"{digest}\n" for digest in batch.digests)
        return original(model, batch, recipe)

    reference_file.sequence_logp = counted


def all_of(hooks: Sequence[Callable[[int], None]], rank: int) -> None:
    """Calls each hook with the rank."""
    for hook in hooks:
        hook(rank)


# A text model on the disk, for the command line


def write_text_run(folder: Path) -> Path:
    """Writes a text model, its tokenizer, pairs and a recipe. Returns the path of the recipe."""
    import torch
    import transformers

    from mpo_ext.demo.model import build_processor

    tokenizer = build_processor().tokenizer
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [
        {"question": f"Read row {number % 8 + 1} .", "chosen": f"{number % 10} , 3", "rejected": f"{number % 7}"}
        for number in range(10)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "optim": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
        "output": {"dir": str(folder / "out"), "save_every": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


@contextlib.contextmanager
def program(command: Sequence[str], text: Path) -> Iterator[Any]:
    """Starts a program, and ends it at the end of the ``with`` block. Its output goes to the file ``text``."""
    import subprocess

    with open(text, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT}, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # a launcher then ends its workers, which may have other sessions
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
