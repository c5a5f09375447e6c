"""Classes that the GPU stages share: a stage with its result file, and a batch of random inputs."""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, schema
from benchmarks.losses import reason_of
from benchmarks.measure import Timing
from mpo_ext.plan.roofline import LossShape

_NO_NUMBERS = (
    "median_s",
    "p20_s",
    "p80_s",
    "peak_bytes",
    "floor_s",
    "share_of_floor",
    "predicted_s",
    "predicted_bytes",
)


class GpuStage:
    """A stage of ``benchmarks.gpu``. It collects results, and rewrites its result file after every case.

    Args:
        name: Name of the stage, such as "correct".
        out: Folder of the result files and logs.
        dry: Whether the stage runs on a CPU with small sizes, to test the stage itself.
        command: Command line to record in the result file.
    """

    def __init__(self, name: str, out: Path, *, dry: bool, command: str) -> None:
        self.name, self.out, self.dry, self.command = name, out, dry, command
        self.device = "cpu" if dry else "cuda"
        self.backends = ["cpu"] if dry else ["cuda", "triton"]
        self.path = out / f"gpu_{name}.json"
        self.settings: dict[str, Any] = {} if dry else gpu_facts()
        self.points: list[dict[str, Any]] = []
        self._began = time.perf_counter()
        self._start = measure.now()

    @property
    def failed(self) -> list[str]:
        """The failed cases, as texts "CASE: REASON"."""
        return [f"{point['id']}: {point['reason']}" for point in self.points if point["status"] == "failed"]

    def note(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._began:6.1f} s] {self.name}: {text}", flush=True)

    def check(self, case: str, run: Callable[[], list[str] | None]) -> bool:
        """Runs a check, records the result, and returns whether it passed.

        The check fails if ``run`` returns problems, such as ["loss differs"], or raises an exception.
        """
        begin = time.perf_counter()
        self.note(f"{case} ...")  # the last line then names a check that hangs
        try:
            wrong = run() or []
            self.synchronize()
        except Exception as error:  # whatever a check raises is a result
            traceback.print_exc()
            wrong = [reason_of(error)]
        self.add(case, "passed" if not wrong else "failed", "; ".join(wrong[:20]), took_s=time.perf_counter() - begin)
        return not wrong

    def add(
        self,
        case: str,
        status: str,
        reason: str = "",
        *,
        provider: str = "mpo_ext",
        loss: LossShape | None = None,
        timing: Timing | None = None,
        **values: Any,
    ) -> None:
        """Adds the result of a case, and rewrites the result file.

        Args:
            case: Name of the case, such as "forward and backward".
            status: "passed", "failed", "measured" or "not run".
            reason: The cause, if the case failed or was not run.
            provider: Name of the checked or measured implementation.
            loss: Shape of the inputs.
            timing: Measured times.
            **values: Further fields of the result.
        """
        shape = dict.fromkeys(("dtype", "pairs", "tokens", "vocab", "hidden", "share"))
        if loss is not None:
            shape |= {name: getattr(loss, name) for name in shape}
        point = {"id": f"{case}, {provider}", "sweep": case, "provider": provider, "status": status, "reason": reason}
        point |= {**shape, **dict.fromkeys(_NO_NUMBERS)}
        if timing is not None:
            low, high = timing.spread_s
            point |= {"median_s": timing.median_s, "p20_s": low, "p80_s": high, "seconds": timing.seconds}
        self.points.append(point | values)
        time_of = "" if timing is None else f" {1e3 * timing.median_s:.3f} ms"
        self.note(f"{case}, {provider}: {status}{time_of}{': ' + reason if reason else ''}")
        self.write()

    def write(self) -> None:
        document = {
            "schema": schema.VERSION,
            "benchmark": f"gpu_{self.name}",
            "quick": self.dry,
            "environment": measure.provenance(self.command, *self._start),
            "settings": self.settings,
            "missing": {},
            "points": self.points,
        }
        schema.check(document, self.path.name)
        self.out.mkdir(parents=True, exist_ok=True)
        measure.write_text(self.path, json.dumps(document, indent=1, allow_nan=False) + "\n")

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Frees memory cached by torch, so that every case starts with the same free memory."""
        if not self.dry:
            torch.cuda.empty_cache()


def gpu_facts() -> dict[str, Any]:
    """Returns the properties of GPU 0 and of the software that runs on it."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "torch_cuda": str(torch.version.cuda),
        "driver": measure.output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    }


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Inputs of ``mpo_loss`` for B pairs: logits ``[2B, T, V]``, labels ``[2B, T]`` and ref_logp ``[2B]``.

    The labels are not shifted: ``labels[i, t]`` belongs to ``logits[i, t]``.
    """

    logits: Tensor
    labels: Tensor
    ref_logp: Tensor

    @classmethod
    def random(
        cls, device: str, pairs: int, tokens: int, vocab: int, dtype: torch.dtype, share: float = 1.0, seed: int = 0
    ) -> PairBatch:
        """Returns a batch of random logits: normally distributed, with a standard deviation of 3.

        In each sequence, only the last tokens have labels. ``share`` is the fraction of tokens with labels. All other
        labels are -100.
        """
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.empty(2 * pairs, tokens, vocab, dtype=dtype, device=device)
        for rows in logits.flatten(0, 1).split(1024):  # a float32 copy of all logits would be twice as large
            rows.copy_(3 * torch.randn(rows.shape, generator=generator, device=device))
        labels = torch.randint(vocab, (2 * pairs, tokens), generator=generator, device=device)
        labelled = max(round(tokens * share), 1)
        labels[:, : tokens - labelled] = -100
        return cls(logits, labels, torch.full((2 * pairs,), -11.0 * labelled, device=device))

    def replaced(self, logits: Tensor) -> PairBatch:
        return dataclasses.replace(self, logits=logits)
