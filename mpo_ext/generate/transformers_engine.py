"""The engine that uses transformers. The tokens of each row of a batch are drawn with a separate seed."""

import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpo_ext.chat import ChatEncoder, Conversation
from mpo_ext.chat.encoder import EncodedPrompt, embedding_rows_of, stop_ids_of
from mpo_ext.checks import check_integer
from mpo_ext.generate.engine import Generation, Request, SamplingConfig
from mpo_ext.images import load_image
from mpo_ext.processors import load_processor, takes_images
from mpo_ext.provenance import processor_parts

if TYPE_CHECKING:
    from torch import Tensor


def sample_token(scores: "Tensor", uniforms: "Tensor", sampling: SamplingConfig) -> "Tensor":
    """Draws a token for each row by inverting the cumulative distribution at the row's uniform number.

    ``scores`` are ``[B, V]`` logits, and ``uniforms`` are ``[B]`` float64 random numbers in [0, 1).

    Raises:
        FloatingPointError: If the distribution of a row is not finite.
    """
    import torch

    if sampling.temperature == 0:
        return scores.argmax(dim=-1)
    scores = scores.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -math.inf)
    probs = torch.softmax(scores, dim=-1)
    if sampling.top_p < 1:
        largest_first = probs.sort(dim=-1, descending=True).values
        before = largest_first.cumsum(dim=-1) - largest_first
        smallest = largest_first.masked_fill(before >= sampling.top_p, math.inf).amin(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < smallest, 0)
    cumulative = probs.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise FloatingPointError("logits must have a finite maximum and no NaN, got a row that violates this")
    drawn = torch.searchsorted(cumulative, uniforms[:, None].to(cumulative.device) * total, right=True)
    return drawn.squeeze(-1).clamp_max(scores.shape[-1] - 1)


class SeededDraw:
    """A logits processor that draws each row's token with the row's random generator and masks all other tokens."""

    def __init__(self, seeds: Sequence[int], sampling: SamplingConfig) -> None:
        self.generators = [random.Random(seed) for seed in seeds]
        self.sampling = sampling

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        import torch

        uniforms = torch.tensor([generator.random() for generator in self.generators], dtype=torch.float64)
        drawn = sample_token(scores, uniforms, self.sampling)
        return torch.full_like(scores, -math.inf).scatter_(1, drawn[:, None], 0.0)


class TransformersEngine:
    """Runs a Hugging Face causal or image-text-to-text model, in left-padded batches, with a KV cache.

    Args:
        model: The model, which is put into evaluation mode.
        processor: Processor of the model, or the tokenizer of a text model. Without a chat template, a prompt is the
            question and a newline.
        name: Name of the model in the records; None: the name in the model's config.
        batch_size: Number of prompts per batch. Prompts of similar lengths are batched together.
        **chat_options: Options of ``ChatEncoder``: ``chat_template``, ``chat_template_kwargs`` and ``date``.

    Attributes:
        chat: Encoder of prompts and responses, the same as in training.

    Raises:
        ChatError: If the chat template cannot be used.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str | None = None,
        batch_size: int = 16,
        **chat_options: Any,
    ) -> None:
        check_integer("batch_size", batch_size, least=1)
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.chat = ChatEncoder(
            processor, stop_ids=stop_ids_of(model), embedding_rows=embedding_rows_of(model), **chat_options
        )
        pad = self.chat.tokenizer.pad_token_id
        self._pad_id = pad if pad is not None else min(self.chat.stop_ids)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int = 16,
        chat_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "TransformersEngine":
        """Loads a model and its processor.

        Args:
            name: Folder or name of the model. A model with images must be in the transformers format (for InternVL the
                ``-hf`` checkpoints).
            dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
            device: Device of the model; None: the GPU of this process, or the CPU without a GPU.
            batch_size: See the class.
            chat_options: See the class.
            **options: Passed to ``from_pretrained``, for example ``revision`` or ``gguf_file``.

        Raises:
            ImportError: If the processor needs torchvision, which is missing.
            ValueError: If the model is not a causal language model (``mpo_ext.processors.check_supported``).
        """
        import torch
        import transformers

        if device is None:
            local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
            device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        config = transformers.AutoConfig.from_pretrained(name, **options)
        processor = load_processor(name, config, **options)  # fails in seconds, unlike the weights
        has_images = takes_images(config)
        loader = transformers.AutoModelForImageTextToText if has_images else transformers.AutoModelForCausalLM
        model = loader.from_pretrained(name, dtype=dtype, **options).to(device)
        return cls(model, processor, name=name, batch_size=batch_size, **(chat_options or {}))

    def settings(self) -> dict[str, Any]:
        """Returns all settings that the generations depend on. Batch size and device only change rounding."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        parts = processor_parts(self.chat, self.chat.stop_ids)
        return {"engine": "transformers", "model": self.name, "dtype": dtype, "processor": parts}

    def encode_response(self, conversation: Conversation, response: str) -> list[int]:
        return self.chat.response_ids(conversation, response)[:-1]

    def decode_response(self, conversation: Conversation, token_ids: Sequence[int]) -> str:
        return self.chat.response_text(conversation, token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        prompts = [self.chat.prompt(request) for request in requests]
        results: dict[int, Generation] = {}
        for rows in self._batches(requests, prompts):
            outputs = self._generate_batch([requests[row] for row in rows], [prompts[row] for row in rows])
            results.update(zip(rows, outputs, strict=True))
        return [results[row] for row in range(len(requests))]

    def _generate_batch(self, requests: Sequence[Request], prompts: Sequence[EncodedPrompt]) -> list[Generation]:
        import torch

        inputs = self._inputs(requests, prompts)
        sampling = requests[0].sampling
        config = self._generation_config(sampling)
        draw = [SeededDraw([request.seed for request in requests], sampling)] if sampling.temperature > 0 else []
        with torch.inference_mode():
            output = self.model.generate(**inputs, generation_config=config, logits_processor=draw)
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [make_generation(self.chat, request, ids) for request, ids in zip(requests, rows, strict=True)]

    def _generation_config(self, sampling: SamplingConfig) -> Any:
        """Returns a greedy config with the model's end and suppressed tokens; ``SeededDraw`` draws the tokens."""
        from transformers import GenerationConfig

        model_config = self.model.generation_config
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.chat.stop_ids),
            pad_token_id=self._pad_id,
            bos_token_id=model_config.bos_token_id,
            suppress_tokens=model_config.suppress_tokens,
            bad_words_ids=model_config.bad_words_ids,
            use_cache=True,
        )

    def _inputs(self, requests: Sequence[Request], prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        """Returns the inputs of the model. Each row is a prompt and its prefix, padded on the left."""
        import torch

        inputs: dict[str, Any]
        if requests[0].images:
            images = [[load_image(image) for image in request.images] for request in requests]
            special = self.chat.adds_special_tokens(prompts[0].text)
            texts = [prompt.text for prompt in prompts]
            inputs = dict(
                self.processor(
                    text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=special
                )
            )
            suffix = self.chat.added_suffix if special else 0
            shape, mask = inputs["input_ids"].shape, inputs.pop("attention_mask").bool()
            per_token = {name for name, value in inputs.items() if getattr(value, "shape", None) == shape}
            rows = {
                name: [
                    row[is_real][: len(row[is_real]) - suffix] for row, is_real in zip(inputs[name], mask, strict=True)
                ]
                for name in per_token
            }
        else:
            inputs = {}
            rows = {"input_ids": [torch.tensor(prompt.ids) for prompt in prompts]}
        prefixes = [torch.tensor(request.prefix_ids, dtype=torch.int64) for request in requests]
        for name, values in rows.items():
            is_ids = name == "input_ids"
            joined = [
                torch.cat([row.to(torch.int64), prefix if is_ids else torch.zeros_like(prefix)])
                for row, prefix in zip(values, prefixes, strict=True)
            ]
            inputs[name] = _pad_left(joined, self._pad_id if is_ids else 0)
            if is_ids:
                inputs["attention_mask"] = _pad_left([torch.ones_like(row) for row in joined], 0)
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }

    def _batches(self, requests: Sequence[Request], prompts: Sequence[EncodedPrompt]) -> Iterator[list[int]]:
        """Yields the rows of each batch, which have equal settings, equal numbers of images and similar lengths."""
        groups: dict[tuple[SamplingConfig, int, bool], list[int]] = {}
        for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            key = (request.sampling, len(request.images), self.chat.adds_special_tokens(prompt.text))
            groups.setdefault(key, []).append(row)
        for rows in groups.values():
            rows.sort(key=lambda row: len(prompts[row].ids) + len(requests[row].prefix_ids))
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]


def make_generation(chat: ChatEncoder, request: Request, ids: Sequence[int]) -> Generation:
    """Returns the generation for sampled ids, with the text that follows the request's prefix."""
    end = next((place for place, token in enumerate(ids) if token in chat.stop_ids), None)
    kept = list(ids[:end])
    head = chat.response_text(request, request.prefix_ids) if request.prefix_ids else ""
    text = chat.response_text(request, [*request.prefix_ids, *kept])
    text = text[len(head) :] if text.startswith(head) else chat.response_text(request, kept)
    return Generation(tuple(kept), text, "length" if end is None else "stop")


def _pad_left(rows: "Sequence[Tensor]", value: int) -> "Tensor":
    import torch

    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")
