"""Communication between the ranks of a run."""

from typing import Any


def gather(accelerator: Any, value: Any) -> list[Any]:
    """Returns the value of each rank, in the order of the ranks. All ranks call it."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
