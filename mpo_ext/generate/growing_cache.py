"""A KV cache layer for transformers that does not copy all keys and values for each new token."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64  # minimum number of tokens that can be appended without a copy


class GrowingLayer(DynamicLayer):
    """A KV cache layer with preallocated room, so that appending a token seldom copies the whole layer.

    Args:
        layer: Layer whose keys and values ``[B, heads, T, D]`` are copied.
        rows: Batch rows to copy, as int64 indices: row i of the new layer is row ``rows[i]`` of ``layer``.
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor) -> None:
        super().__init__()
        self.device, self.is_initialized = layer.device, True
        self.keys, self.values = layer.keys, layer.values
        self._all_keys: Tensor
        self._all_values: Tensor
        self.reorder_cache(rows)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of new tokens, and returns all keys and all values, as views."""
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        if stop > self._all_keys.shape[-2]:
            self._all_keys = _with_room(self.keys, stop)
            self._all_values = _with_room(self.values, stop)
        self._all_keys[:, :, start:stop] = key_states
        self._all_values[:, :, start:stop] = value_states
        self.keys, self.values = self._all_keys[:, :, :stop], self._all_values[:, :, :stop]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces each batch row i by the row ``beam_idx[i]``."""
        length, rows = self.keys.shape[-2], beam_idx.to(self.keys.device)
        self._all_keys = _with_room(self.keys.index_select(0, rows), length)
        self._all_values = _with_room(self.values.index_select(0, rows), length)
        self.keys, self.values = self._all_keys[:, :, :length], self._all_values[:, :, :length]


def repeat_cache(cache: DynamicCache, rows: Tensor) -> None:
    """Selects batch rows of a KV cache in place: the new row i is the old row ``rows[i]``.

    ``rows`` may hold the same index several times. The new batch may therefore be larger than the old batch. Each
    plain ``DynamicLayer`` that holds tokens is replaced by a ``GrowingLayer``.
    """
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            cache.layers[place] = GrowingLayer(layer, rows)
        else:
            layer.reorder_cache(rows)


def _with_room(states: Tensor, length: int) -> Tensor:
    """Copies ``states`` ``[B, heads, T, D]`` into a new tensor, which has room for more than ``length`` tokens."""
    n_rows, n_heads, n_tokens, size = states.shape
    result = states.new_empty(n_rows, n_heads, length + max(_LEAST_ROOM, length // 8), size)
    result[:, :, :n_tokens] = states
    return result
