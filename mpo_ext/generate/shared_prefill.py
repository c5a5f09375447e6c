"""Samples several continuations of each prompt. The prompt and its images run through the model only once."""

import copy
import inspect
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpo_ext.generate.drawing import SeededDraw
from mpo_ext.generate.engine import SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor


class UnsharedError(Exception):
    """Raised if a model's state after the prefill cannot be copied for several samples."""


def sharing_problem(model: Any) -> str | None:
    """Returns the reason why several samples of a prompt cannot share one prefill, or None if no reason is known.

    The prefill is the forward pass of the prompt. ``SharedPrefill`` may find another reason later, and then raises
    ``UnsharedError``.
    """
    from transformers import GenerationMixin

    if getattr(model.generate, "__func__", None) is not GenerationMixin.generate:
        return "it overrides generate"
    if "next_sequence_length" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        return "this version of transformers is too old"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if not {"cache", "past_key_values"} & set(inspect.signature(type(model).forward).parameters):
        return "it takes no cache"
    return None


class SharedPrefill:
    """Samples each prompt several times after one prefill.

    Pass an instance to transformers' ``generate`` as ``custom_generate``. The inputs of ``generate`` hold each prompt
    once. The prompts run in one forward pass (the prefill). Then the cache and the inputs are copied for the samples.
    Apart from rounding, the samples have the same tokens as without sharing. When half of the samples in a batch have
    ended, the ended samples are removed from the batch.

    Args:
        prompts: For each sample, the index of its prompt in the inputs.
        seeds: Seed of each sample.
        sampling: Settings for drawing tokens.
        batch_size: Maximum number of samples that are decoded together.
    """

    def __init__(
        self, prompts: Sequence[int], seeds: Sequence[int], *, sampling: SamplingConfig, batch_size: int
    ) -> None:
        n_parts = -(-len(prompts) // batch_size)
        bounds = [len(prompts) * part // n_parts for part in range(n_parts + 1)]
        self._parts = [
            (prompts[start:stop], SeededDraw(seeds[start:stop], sampling))
            for start, stop in itertools.pairwise(bounds)
        ]

    def __call__(
        self,
        model: Any,
        input_ids: "Tensor",
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> list[list[int]]:
        """Samples from the prompts, and returns the new token ids of each sample.

        After the end token, padding follows. transformers' ``generate`` calls this method and passes all arguments.

        Raises:
            UnsharedError: If the state after the prefill cannot be copied.
        """
        import torch

        n_prompts = len(input_ids)
        states = _module_states(model, n_prompts)
        logits, inputs = _forward(model, input_ids, inputs, is_first_iteration=True)
        _check_cache(inputs)
        for name, state in _module_states(model, n_prompts).items():
            if states.get(name) is not state:
                raise UnsharedError(f"it keeps a state in {name}")
        inputs = {name: None if _is_image(name, value) else value for name, value in inputs.items()}
        decoded: list[list[int]] = []
        for number, (prompts, draw) in enumerate(self._parts, start=1):
            rows = torch.tensor(prompts, device=input_ids.device)
            is_last = number == len(self._parts)
            batch = _DecodingBatch(
                model, inputs if is_last else copy.deepcopy(inputs), input_ids, logits, draw, generation_config
            )
            batch.select(rows)
            decoded += batch.decode(logits_processor, stopping_criteria)
        return decoded


class _DecodingBatch:
    """A batch of samples that are decoded together. Each row is a sample.

    The batch also holds the inputs of the model's next step.
    """

    def __init__(
        self, model: Any, inputs: dict[str, Any], ids: "Tensor", logits: "Tensor", draw: SeededDraw, config: Any
    ) -> None:
        self.model, self.inputs, self.ids, self.logits, self.draw = model, inputs, ids, logits, draw
        self.pad_id = config.pad_token_id

    def select(self, rows: "Tensor") -> None:
        """Selects batch rows: the new row i is the old row ``rows[i]``. An index may occur several times."""
        n_rows = len(self.ids)
        for name, value in self.inputs.items():
            self.inputs[name] = _select_rows(name, value, rows, n_rows)
        self.ids, self.logits = self.ids.index_select(0, rows), self.logits.index_select(0, rows)

    def decode(self, logits_processor: Any, stopping_criteria: Any) -> list[list[int]]:
        """Decodes until all rows have ended. Returns the new token ids of each row, padded after the end token."""
        import torch

        width = self.ids.shape[1]
        places = torch.arange(len(self.ids), device=self.ids.device)  # place of each row in the result
        is_running = torch.ones_like(places, dtype=torch.bool)
        result: list[list[int]] = [[] for _ in places]
        while True:
            tokens = self.draw.draw(logits_processor(self.ids, self.logits))
            tokens = torch.where(is_running, tokens, self.pad_id)
            self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
            is_running &= ~stopping_criteria(self.ids, None)
            n_running = int(is_running.sum())
            if 2 * n_running <= len(places):
                ended = ~is_running
                for place, ids in zip(places[ended].tolist(), self.ids[ended, width:].tolist(), strict=True):
                    result[place] = ids
                if n_running == 0:
                    return result
                rows = is_running.nonzero().squeeze(1)
                self.draw.keep(rows.tolist())
                self.select(rows)
                places, is_running = places[rows], is_running[rows]
            self.logits, self.inputs = _forward(self.model, self.ids, self.inputs, next_sequence_length=1)


def _forward(model: Any, ids: "Tensor", inputs: dict[str, Any], **options: Any) -> tuple["Tensor", dict[str, Any]]:
    """Runs the model for one step, like the decoding loops of transformers.

    Returns the ``[B, V]`` float32 logits of the last position, and the inputs of the next step.
    """
    import torch

    outputs = model(**model.prepare_inputs_for_generation(ids, **options, **inputs), return_dict=True)
    # transformers has no public method that does this for a decoding loop.
    inputs = model._update_model_kwargs_for_generation(outputs, inputs, is_encoder_decoder=False)  # noqa: SLF001
    # A copy, because a view would keep the logits of all positions.
    return outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device), inputs


def _is_image(name: str, value: Any) -> bool:
    """Returns whether a model input holds images, which only the prefill reads.

    Every floating-point tensor counts as an image.
    """
    import torch

    return name == "mm_encoder_outputs" or (isinstance(value, torch.Tensor) and value.is_floating_point())


def _select_rows(name: str, value: Any, rows: "Tensor", n_rows: int) -> Any:
    """Selects batch rows of a model input: row i of the result is row ``rows[i]`` of ``value``.

    A cache is changed in place. Values without a batch dimension of size ``n_rows`` are returned unchanged.
    """
    import torch
    from transformers import DynamicCache

    from mpo_ext.generate.growing_cache import repeat_cache

    if isinstance(value, DynamicCache):
        repeat_cache(value, rows)
    elif isinstance(value, torch.Tensor):
        axis = 1 if name == "position_ids" and value.ndim == 3 else 0  # rotary positions with several axes
        if value.ndim > axis and value.shape[axis] == n_rows:
            return value.index_select(axis, rows.to(value.device))
    return value


def _check_cache(inputs: dict[str, Any]) -> None:
    """Raises ``UnsharedError`` if the inputs have no ``DynamicCache``, or a cache whose rows cannot be copied."""
    from transformers import DynamicCache

    cache = inputs.get("cache", inputs.get("past_key_values"))
    if cache is None or type(cache) is not DynamicCache:
        raise UnsharedError(f"its cache is a {type(cache).__name__}, not a DynamicCache")
    for kind in map(type, cache.layers):  # all layer classes of transformers can repeat their states
        if kind.__module__ != DynamicCache.__module__ and "reorder_cache" not in vars(kind):
            raise UnsharedError(f"its {kind.__name__} does not define reorder_cache")


def _module_states(model: Any, n_rows: int) -> dict[str, Any]:
    """Returns a dict from names to the tensors with ``n_rows`` rows (one per prompt) in the model's modules.

    Parameters and buffers are left out. If a prefill changes one of these tensors, the prefill cannot be shared,
    because the tensor is not copied. ``rope_deltas`` of Qwen-VL are left out, because decoding steps get their
    positions as inputs.
    """
    import torch

    return {
        f"{name}.{attribute}": value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Tensor)
        and value.ndim > 0
        and value.shape[0] == n_rows
        and attribute != "rope_deltas"
    }
