"""Communication between the ranks of a run."""

from typing import Any


def gather(accelerator: Any, value: Any) -> list[Any]:
    """Returns the values of all ranks in rank order. All ranks must call this function."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
