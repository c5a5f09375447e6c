"""An inference engine that uses transformers. Each row of a batch has a separate seed."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpo_ext.chat import ChatEncoder, ChatError, Conversation
from mpo_ext.chat.encoder import EncodedPrompt, embedding_rows_of, stop_ids_of
from mpo_ext.chat.media import expanded, media_arguments
from mpo_ext.checks import check_integer, environment_integer
from mpo_ext.generate.choices import FirstTokenProbs, choice_tokens, measured
from mpo_ext.generate.drawing import SeededDraw
from mpo_ext.generate.engine import Generation, Request, SamplingConfig, refused
from mpo_ext.generate.shared_prefill import SharedPrefill, UnsharedError, sharing_problem
from mpo_ext.images import load_image
from mpo_ext.processors import check_on_hub, load_config, load_processor, takes_images
from mpo_ext.provenance import processor_parts
from mpo_ext.videos import load_video, video_settings

if TYPE_CHECKING:
    from torch import Tensor

#: Settings of a checkpoint's ``generation_config`` that change the distribution of the tokens, with neutral values.
#: The engine ignores them, as vLLM does: a sample depends on ``SamplingConfig`` alone.
_IGNORED = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "sequence_bias": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
}
#: Settings that change memory and speed.
_TECHNICAL = ("cache_implementation", "cache_config", "prefill_chunk_size", "compile_config", "disable_compile")


class TransformersEngine:
    """Runs a Hugging Face causal or image-text-to-text model, in left-padded batches, with a KV cache.

    Requests with the same prompt and images share one prefill: the prompt and the images run through the model once,
    and the cache is copied for the samples. If a model's cache cannot be copied, a warning gives the reason, and the
    prompt runs once per sample.

    Args:
        model: The model, which is put into evaluation mode.
        processor: Processor of the model, or the tokenizer of a text model. Without a chat template, a prompt is the
            question and a newline.
        name: Name of the model, which is stored with each pair; None: the name in the model's config.
        batch_size: Maximum number of samples per batch. Prompts of similar lengths are batched together.
        **chat_options: Options of ``ChatEncoder``: ``chat_template``, ``chat_template_kwargs`` and ``date``.

    Attributes:
        chat: Encoder of prompts and responses, the same as in training.
        shares_prefill: Whether requests with the same prompt and images share one prefill.
        inference_mode: Whether the model runs in ``torch.inference_mode``. Must be False if the parameters are trained
            later and gathered in each forward pass (FSDP2, ZeRO-3).
        weights: Hash of the model's weights for ``settings``; None: the settings do not name the weights.

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
        self.shares_prefill = self.inference_mode = True
        self.weights: str | None = None
        for name, value in _ignored_settings(self.model).items():
            warnings.warn(
                f"generation_config.json asks for {name}={value}, which sampling ignores: it would change the "
                "distribution that the samples are drawn from",
                stacklevel=2,
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
        """Loads a model and its processor, and returns an engine.

        Args:
            name: Folder or name of the model. A model with images must be in the transformers format (for InternVL the
                ``-hf`` checkpoints).
            dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
            device: Device of the model; None: the GPU of this process, or the CPU if there is no GPU.
            batch_size: As in the class.
            chat_options: Options of ``ChatEncoder``, as in the class.
            **options: Passed to ``from_pretrained``, for example ``revision`` or ``gguf_file``.

        Raises:
            ImportError: If the processor needs torchvision, which is missing.
            ValueError: If the kind of model is not supported, such as an encoder-decoder
                (``mpo_ext.processors.check_supported``). Also raised if this machine does not have the device.
        """
        import torch
        import transformers

        check_on_hub("model", name, **options)
        if device is None:
            local = environment_integer("LOCAL_RANK", environment_integer("SLURM_LOCALID", 0))
            device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        _check_device(device)
        config = load_config(name, **options)
        processor = load_processor(name, config, **options)  # fails in seconds, unlike the weights
        has_images = takes_images(config)
        loader = transformers.AutoModelForImageTextToText if has_images else transformers.AutoModelForCausalLM
        model = loader.from_pretrained(name, dtype=dtype, **options).to(device)
        return cls(model, processor, name=name, batch_size=batch_size, **(chat_options or {}))

    def settings(self) -> dict[str, Any]:
        """Returns the settings that determine the generations.

        Batch size and device are left out, because they only change rounding.
        """
        dtype = str(self.model.dtype).removeprefix("torch.")
        parts = processor_parts(self.chat, self.chat.stop_ids)
        settings = {"engine": "transformers", "model": self.name, "dtype": dtype, "processor": parts}
        optional = {"videos": video_settings(), "ignored": _ignored_settings(self.model), "weights": self.weights}
        return {**settings, **{name: value for name, value in optional.items() if value}}

    def encode_response(self, conversation: Conversation, response: str) -> list[int]:
        return self.chat.response_ids(conversation, response)[:-1]

    def decode_response(self, conversation: Conversation, token_ids: Sequence[int]) -> str:
        return self.chat.response_text(conversation, token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Returns the generation of each request.

        Requests that do not fit the chat template or the model's context are refused. A response ends at the end of
        the context.
        """
        results: dict[int, Generation] = {}
        prompts: dict[int, EncodedPrompt] = {}
        fitting: list[Request] = []
        for row, request in enumerate(requests):
            try:
                prompt = self.chat.prompt(request)
                fitting.append(_within_context(self.model, request, len(prompt.ids) + len(request.prefix_ids)))
            except ChatError as error:
                results[row] = refused(error)
            else:
                prompts[row] = prompt
        rest = self._generate(fitting, list(prompts.values()))
        results.update(zip(prompts, rest, strict=True))
        return [results[row] for row in range(len(requests))]

    def _generate(self, requests: Sequence[Request], prompts: Sequence[EncodedPrompt]) -> list[Generation]:
        results: dict[int, Generation] = {}
        for questions in _batches(
            requests, prompts, self.batch_size,
            shares_prefill=self.shares_prefill, adds_special=self.chat.adds_special_tokens,
        ):  # fmt: skip
            rows = [row for question in questions for row in question]
            if (tokens := choice_tokens(self.chat, requests[rows[0]])) is not None:
                results.update(zip(rows, self._measure(rows, requests, prompts, tokens), strict=True))
                continue
            try:
                outputs = self._continue(questions, requests, prompts)
            except UnsharedError as error:
                self._stop_sharing(str(error))
                return self._generate(requests, prompts)
            for row, ids in zip(rows, outputs, strict=True):
                results[row] = make_generation(self.chat, requests[row], ids)
        return [results[row] for row in range(len(requests))]

    def _continue(
        self, questions: Sequence[Sequence[int]], requests: Sequence[Request], prompts: Sequence[EncodedPrompt]
    ) -> list[list[int]]:
        """Samples a batch. Returns the new token ids of each request, with padding after the end token.

        Args:
            questions: The batch, as groups of indices into ``requests``. Requests in a group have the same prompt.
            requests: All requests.
            prompts: Prompt of each request.
        """
        import torch

        inputs = self._inputs(*zip(*((requests[rows[0]], prompts[rows[0]]) for rows in questions), strict=True))
        seeds = [requests[row].seed for rows in questions for row in rows]
        sampling = requests[questions[0][0]].sampling
        options = {**inputs, "generation_config": self._generation_config(sampling)}
        with torch.inference_mode(self.inference_mode), torch.no_grad(), self._without_defaults():
            if len(seeds) > len(questions):
                if problem := sharing_problem(self.model):
                    raise UnsharedError(problem)
                places = [place for place, rows in enumerate(questions) for _ in rows]
                shared = SharedPrefill(places, seeds, sampling=sampling, batch_size=self.batch_size)
                return self.model.generate(**options, custom_generate=shared)
            draw = [SeededDraw(seeds, sampling)] if sampling.temperature > 0 else []
            output = self.model.generate(**options, logits_processor=draw)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def _measure(
        self,
        rows: Sequence[int],
        requests: Sequence[Request],
        prompts: Sequence[EncodedPrompt],
        tokens: Sequence[Sequence[int]],
    ) -> list[Generation]:
        """Generates one greedy token per request of a batch, and measures the probabilities of the choices.

        Args:
            rows: The batch, as indices into ``requests``.
            requests: All requests.
            prompts: Prompt of each request.
            tokens: Token ids of each choice (possible answer). All requests of the batch have the same choices.
        """
        import torch

        inputs = self._inputs([requests[row] for row in rows], [prompts[row] for row in rows])
        config = self._generation_config(SamplingConfig(temperature=0.0, max_new_tokens=1))
        first = FirstTokenProbs()
        with torch.inference_mode(self.inference_mode), torch.no_grad(), self._without_defaults():
            output = self.model.generate(**inputs, generation_config=config, logits_processor=[first])
        assert first.probs is not None
        generations = []
        for row, ids, probs in zip(rows, output[:, -1:].tolist(), first.probs, strict=True):
            known = {token: float(probs[token]) for choice in tokens for token in choice}
            generation = make_generation(self.chat, requests[row], ids)
            generations.append(dataclasses.replace(generation, choice_probs=measured(tokens, known)))
        return generations

    def _stop_sharing(self, reason: str) -> None:
        self.shares_prefill = False
        name = type(self.model).__name__
        warnings.warn(f"{name} runs the prompt for each sample, because {reason}", stacklevel=4)

    def _generation_config(self, sampling: SamplingConfig) -> Any:
        """Returns a config for greedy decoding, with the model's end tokens and suppressed tokens.

        Greedy decoding returns the tokens that ``SeededDraw`` draws, because ``SeededDraw`` sets all other logits to
        -inf.
        """
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

    @contextlib.contextmanager
    def _without_defaults(self) -> Iterator[None]:
        """Clears the model's ``generation_config`` inside the ``with`` block, except settings of memory and speed.

        Otherwise, ``generate`` of transformers would use settings such as the model's ``repetition_penalty``.
        """
        from transformers import GenerationConfig

        stored = self.model.generation_config
        self.model.generation_config = GenerationConfig(**{name: getattr(stored, name, None) for name in _TECHNICAL})
        try:
            yield
        finally:
            self.model.generation_config = stored

    def _inputs(self, requests: Sequence[Request], prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        """Returns the model inputs of a batch. A row is a prompt and its ``prefix_ids``, padded on the left."""
        import torch

        inputs: dict[str, Any]
        media = [expanded(request, self.processor) for request in requests]
        if media[0].images or media[0].videos:
            images = [[load_image(image) for image in request.images] for request in media]
            videos = [[load_video(video) for video in request.videos] for request in media]
            special = self.chat.adds_special_tokens(prompts[0].text)
            texts = [prompt.text for prompt in prompts]
            inputs = dict(
                self.processor(
                    text=texts,
                    padding=True,
                    return_tensors="pt",
                    add_special_tokens=special,
                    **media_arguments(images, videos),
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


def _check_device(device: str) -> None:
    """Raises ValueError if this machine does not have a device, such as "cuda:7"."""
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device must be a device of this machine, got {device!r}: {error}") from None


def _ignored_settings(model: Any) -> dict[str, Any]:
    """Returns the settings in the model's ``generation_config`` that the engine ignores.

    These settings, such as ``repetition_penalty``, would change the distribution of the tokens.
    """
    values = {name: getattr(model.generation_config, name, None) for name in _IGNORED}
    return {name: value for name, value in values.items() if value not in (None, _IGNORED[name])}


def _context_limit(config: Any) -> int | None:
    """Returns the maximum number of tokens of a model's context; None if the config does not name it."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(rope, Mapping) and isinstance(original := rope.get("original_max_position_embeddings"), int):
        limit = max(limit, int(original * (rope.get("factor") or 1)))  # YaRN extends the context
    return limit


def _within_context(model: Any, request: Request, length: int) -> Request:
    """Returns a request whose ``max_new_tokens`` ends the response at the end of the model's context.

    ``length`` is the number of tokens of the prompt and the prefix, with one token for each image.

    Raises:
        ChatError: If the context has no place for a response.
    """
    limit = _context_limit(model.config.get_text_config())
    if limit is None:
        return request
    if length >= limit:
        raise ChatError(f"the prompt must be shorter than the model's context of {limit} tokens, got {length}")
    if request.sampling.max_new_tokens <= limit - length:
        return request
    sampling = dataclasses.replace(request.sampling, max_new_tokens=limit - length)
    return dataclasses.replace(request, sampling=sampling)


def _batches(
    requests: Sequence[Request],
    prompts: Sequence[EncodedPrompt],
    batch_size: int,
    *,
    shares_prefill: bool,
    adds_special: Callable[[str], bool],
) -> Iterator[list[list[int]]]:
    """Yields batches of requests. A batch is a list of groups. A group is a list of indices into ``requests``.

    The requests in a group have the same prompt. The requests in a batch have equal settings, equal numbers of images,
    equal video shapes, and prompts of similar length. A batch has at most ``batch_size`` requests. A larger group is a
    batch by itself.

    Args:
        requests: The requests.
        prompts: Prompt of each request.
        batch_size: Maximum number of requests in a batch.
        shares_prefill: Whether requests with the same prompt form one group. False: each request is a group.
        adds_special: Function that returns whether special tokens are added to a prompt text.
    """
    groups: dict[Any, dict[Any, list[int]]] = {}
    for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        special = adds_special(prompt.text)
        # Some processors stack the videos of a batch.
        shapes = tuple((len(video.frames), video.frames[0].size) for video in map(load_video, request.videos))
        key = (request.sampling, request.choices, len(request.images), shapes, special)
        images = tuple(image if isinstance(image, str) else id(image) for image in (*request.images, *request.videos))
        is_shared = shares_prefill and not request.choices
        question = (prompt.text, request.prefix_ids, images) if is_shared else row
        groups.setdefault(key, {}).setdefault(question, []).append(row)
    for questions in groups.values():
        by_length = sorted(
            questions.values(), key=lambda rows: len(prompts[rows[0]].ids) + len(requests[rows[0]].prefix_ids)
        )
        batch: list[list[int]] = []
        for rows in by_length:
            if batch and sum(map(len, batch)) + len(rows) > batch_size:
                yield batch
                batch = []
            batch.append(rows)
        yield batch


def make_generation(chat: ChatEncoder, request: Request, ids: Sequence[int]) -> Generation:
    """Returns the ``Generation`` of a request from the sampled token ids before the first end token."""
    end = next((place for place, token in enumerate(ids) if token in chat.stop_ids), None)
    kept = list(ids[:end])
    head = chat.response_text(request, request.prefix_ids) if request.prefix_ids else ""
    text = chat.response_text(request, [*request.prefix_ids, *kept])
    text = text[len(head) :] if text.startswith(head) else chat.response_text(request, kept)
    return Generation(tuple(kept), text, "length" if end is None else "stop")


def _pad_left(rows: "Sequence[Tensor]", value: int) -> "Tensor":
    import torch

    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")
