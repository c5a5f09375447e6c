"""``preserved`` restores a model's modules and all random states after an interruption of training, bit for bit."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from mpo_ext.train.checkpoint_state import random_state, restore_random_state


@contextlib.contextmanager
def preserved(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Restores the state of training at the end of the ``with`` block.

    Restored are the attributes of each module (its mode, the flags of gradient checkpointing, values that a forward
    pass caches), the buffers that a module has replaced, and the states of this rank's random generators. Parameters,
    gradients and the contents of buffers are not copied: the block must not write into them.
    """
    saved = [(vars(module), dict(vars(module)), dict(vars(module)["_buffers"])) for module in model.modules()]
    random = random_state(accelerator)
    try:
        yield
    finally:
        for attributes, values, buffers in saved:
            attributes.clear()
            attributes.update(values)
            attributes["_buffers"].clear()
            attributes["_buffers"].update(buffers)
        restore_random_state(accelerator, random)
