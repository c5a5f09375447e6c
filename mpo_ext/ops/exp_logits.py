"""Computes exponentials of tiles of logits on a GPU, for the gradient of hidden states under a frozen head.

Forward sums ``exp(z - r) @ weight`` over the tiles of each row (token position). The number r is called the reference
of the row; it has nothing to do with the reference model. If a logit exceeds r by more than a slack, ``exp`` could
overflow. Therefore, r rises to the row's largest logit so far, and the sum is rescaled. The slack is usually 40, so r
rises rarely. The slack is 0 in the last tile, and in all tiles if the exponentials are float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpo_ext.ops import backends, cuda, native
from mpo_ext.ops.memory import Tile, addresses, device_guard, row_arguments, row_layout

#: By how much a row's largest logit may exceed the reference. exp(40) is 2e17; float32 numbers reach 3e38.
_SLACK = 40.0


def write_exp_logits(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    reference: Tensor | None,
    sums: Tensor,
    backend: str,
    exp_logits: Tensor,
    tile: Tile,
    *,
    is_last: bool,
) -> Tensor:
    """Writes ``exp(z - reference)`` for each logit z to ``exp_logits``, and 0 for the label's logit.

    Each row (token position) has a reference. If ``row_max`` exceeds the reference by more than the slack, ``row_max``
    becomes the new reference. The module's docstring explains the slack. With a new reference, the row of ``sums`` is
    multiplied by ``exp(old reference - new reference)``. After the last tile, the reference is the largest logit of
    the whole row. If a label is out of range, the values of its row are undefined.

    Args:
        logits: ``[n, columns]``, a tile of labelled rows, float32.
        labels: ``[n]`` int64.
        row_max: ``[n]`` float32, the largest logit of each row in this tile and all earlier tiles.
        reference: ``[n]`` float32, the result of the call for the previous tile; None for the first tile.
        sums: ``[n, D]`` float32, contiguous: the sums of ``exp(z - reference) @ weight`` over the earlier tiles.
        backend: "cuda" or "triton".
        exp_logits: Output, ``[n, columns]``, contiguous; float32, bfloat16 or float16. May be the tensor ``logits``.
        tile: The part of the vocabulary that the tile covers.
        is_last: Whether this is the last tile.

    Returns:
        The new reference of each row, ``[n]`` float32.
    """
    # Without slack, exp(z - reference) is at most 1. float16 needs that, because its largest number is 65,504.
    slack = 0.0 if is_last or exp_logits.dtype == torch.float16 else _SLACK
    new_reference = torch.empty_like(row_max)
    layout = row_layout(logits.float())
    if backend == "triton":
        with device_guard(logits):
            kernels = backends.triton_kernels()
            kernels.exp_logits(layout, labels, tile.first, row_max, reference, new_reference, slack, sums, exp_logits)
        return new_reference
    with device_guard(logits):
        native.compiled().exp_logits_cuda(
            **row_arguments(layout, labels, -1, tile) | {"dtype": str(exp_logits.dtype).removeprefix("torch.")},
            **addresses(
                row_max=row_max, reference=reference, new_reference=new_reference, sums=sums, exp_logits=exp_logits
            ),
            slack=slack,
            hidden_size=sums.shape[-1],
            multiprocessors=cuda.multiprocessors(logits.device),
            stream=cuda.current_stream(logits),
        )
    return new_reference
