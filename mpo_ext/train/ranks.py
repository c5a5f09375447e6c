"""Communication between the ranks of a run, and the start of runs with FSDP or DeepSpeed on CPUs."""

import os
from typing import Any


class EvaluationPairError(ValueError):
    """Raised on all ranks if a pair of ``data.eval`` is bad."""


class EvaluationAnswerError(RuntimeError):
    """Raised on all ranks if the generation of answers fails."""


def gather(accelerator: Any, value: Any) -> list[Any]:
    """Returns the values that all ranks pass, in rank order. All ranks must call this function."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def join_cpu_ranks() -> None:
    """Makes accelerate use FSDP or DeepSpeed on CPUs, and starts the process group.

    By default, accelerate uses FSDP and DeepSpeed only on GPUs. With this function, the config file of a cluster can
    be tried on a machine without GPUs. The function has an effect only if two conditions hold: the environment
    variable ``ACCELERATE_USE_CPU`` is true, and a launcher has started the run with FSDP or DeepSpeed.
    """
    uses_deepspeed, uses_fsdp = _is_set("ACCELERATE_USE_DEEPSPEED"), _is_set("ACCELERATE_USE_FSDP")
    if "LOCAL_RANK" not in os.environ or not _is_set("ACCELERATE_USE_CPU") or not (uses_deepspeed or uses_fsdp):
        return
    from accelerate import DistributedType, PartialState

    PartialState(cpu=True)  # starts gloo
    kind = DistributedType.DEEPSPEED if uses_deepspeed else DistributedType.MULTI_GPU
    PartialState._shared_state["distributed_type"] = kind  # noqa: SLF001  # accelerate has no public way
    if uses_deepspeed:
        del os.environ["ACCELERATE_USE_CPU"]  # otherwise accelerate ignores ACCELERATE_USE_DEEPSPEED
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first; gloo suffices
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")
