"""An inference engine that uses vLLM."""

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.chat import ChatEncoder, Conversation
from mpo_ext.checks import check_integer, environment_integer, install_hint
from mpo_ext.generate.choices import choice_tokens, measured
from mpo_ext.generate.engine import Generation, Request, rank_and_world_size, refused, refused_videos
from mpo_ext.generate.orphans import ended_with_this_process
from mpo_ext.generate.transformers_engine import make_generation
from mpo_ext.generate.vllm_adapter import adapter_options, adapter_request
from mpo_ext.images import load_image
from mpo_ext.processors import load_without_weights
from mpo_ext.provenance import processor_parts

_LOGPROBS = 20  # vLLM's default limit of log-probs per token
_NEVER = -100.0  # the lowest bias of a logit that vLLM takes
# Variables in which launchers give the rank of a process among the processes of its machine.
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


class VLLMEngine:
    """Runs a model in vLLM's offline engine, which batches the requests. Each request has a separate seed.

    Requests can be added while others are running. Prompts are token ids, the same as in ``TransformersEngine``; vLLM
    expands the image tokens. On Linux, vLLM's processes end with this process, even if it is killed.

    Args:
        model: Folder or name of the model.
        processor: Processor of the model, or the tokenizer of a text model; None: loaded with transformers.
        chat_options: Options of ``ChatEncoder``: ``chat_template``, ``chat_template_kwargs`` and ``date``.
        adapter: Folder of LoRA adapters for this model; None: no adapters.
        concurrency: Number of requests to run at the same time. It should be at least vLLM's ``max_num_seqs``.
        **options: Passed to ``vllm.LLM``, for example ``dtype``, ``tensor_parallel_size`` or ``limit_mm_per_prompt``.

    Raises:
        ChatError: If the chat template cannot be used.
        FileNotFoundError: If ``adapter`` is not a folder with adapters.
        ImportError: If vllm is missing.
        ValueError: If vLLM cannot run the adapters, if it cannot suppress the tokens in ``generation_config.json``, or
            if this machine has too few GPUs for its processes.
    """

    def __init__(
        self,
        model: str,
        *,
        processor: Any = None,
        chat_options: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        concurrency: int = 1024,
        **options: Any,
    ) -> None:
        check_integer("concurrency", concurrency, least=1)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # otherwise vLLM writes about 40 lines at the start
        if adapter is not None:
            options = {**adapter_options(adapter), **options}
        try:
            import vllm
        except ImportError as error:
            raise ImportError(f"VLLMEngine needs vllm: {install_hint('vllm')} ({error})") from error
        self._vllm = vllm
        self._names = itertools.count()
        self._running: dict[str, Request] = {}
        self._choice_tokens: dict[str, list[list[int]]] = {}
        self._refused: list[tuple[str, Generation]] = []
        self._refusals = _refusals()
        self.name, self.model, self.adapter, self.concurrency = adapter or model, model, adapter, concurrency
        self.options = options
        # The template is checked before the weights are loaded.
        checks: dict[str, Any] = {}
        self.suppressed: list[int] = []
        if processor is None:
            loaded = load_without_weights(model, **options)
            processor = loaded.processor
            checks = {"stop_ids": loaded.stop_ids, "embedding_rows": loaded.embedding_rows}
            self.suppressed = _single_ids(loaded.suppressed)
        self.chat = ChatEncoder(processor, **checks, **(chat_options or {}))
        if (devices := devices_of_rank(int(options.get("tensor_parallel_size", 1)))) is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
        with ended_with_this_process():
            self.llm = vllm.LLM(model=model, **options)
        self._lora = {} if adapter is None else {"lora_request": adapter_request(adapter)}

    def settings(self) -> dict[str, Any]:
        dtype = str(self.options.get("dtype", "auto"))
        parts = processor_parts(self.chat, self.chat.stop_ids)
        settings = {"engine": "vllm", "model": self.model, "dtype": dtype, "processor": parts}
        if self.adapter is not None:
            settings["adapter"] = self.adapter
        return {**settings, "suppressed": self.suppressed} if self.suppressed else settings

    def encode_response(self, conversation: Conversation, response: str) -> list[int]:
        return self.chat.response_ids(conversation, response)[:-1]

    def decode_response(self, conversation: Conversation, token_ids: Sequence[int]) -> str:
        return self.chat.response_text(conversation, token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        names = [self.submit(request) for request in requests]
        results: dict[str, Generation] = {}
        while len(results) < len(names):
            results.update(self.finished())
        return [results[name] for name in names]

    def submit(self, request: Request) -> str:
        """Starts a request, and returns a name that identifies it.

        A request with videos, or a request that vLLM rejects, is refused. ``finished`` then returns the refusal.
        """
        name = str(next(self._names))
        if request.videos:
            self._refused.append((name, refused_videos("vllm", request)))
            return name
        sampling = request.sampling
        limits: dict[str, Any] = {"max_tokens": sampling.max_new_tokens}
        if (tokens := choice_tokens(self.chat, request)) is not None:
            limits = {"max_tokens": 1, "logprobs": _LOGPROBS}
        params = self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            **limits,
            seed=request.seed,
            stop_token_ids=sorted(self.chat.stop_ids),
            skip_special_tokens=False,
            logit_bias=dict.fromkeys(self.suppressed, _NEVER) or None,
        )
        try:
            self.llm.llm_engine.add_request(name, self._prompt(request), params, **self._lora)
        except self._refusals as error:
            self._refused.append((name, refused(error)))
        else:
            self._running[name] = request
            if tokens is not None:
                self._choice_tokens[name] = tokens
        return name

    def finished(self) -> list[tuple[str, Generation]]:
        """Returns the name and the generation of each request that has ended since the last call.

        If requests are running, waits until at least one of them has ended.
        """
        ended, self._refused = self._refused, []
        while self._running and not ended:
            for output in self.llm.llm_engine.step():
                if output.finished:
                    request = self._running.pop(output.request_id)
                    generation = self._generation(request, output.outputs[0])
                    if tokens := self._choice_tokens.pop(output.request_id, None):
                        probs = _first_probs(output.outputs[0])
                        generation = dataclasses.replace(generation, choice_probs=measured(tokens, probs))
                    ended.append((output.request_id, generation))
        return ended

    def cancel(self, names: Sequence[str]) -> None:
        """Stops the requests with these names."""
        running = [name for name in names if self._running.pop(name, None)]
        for name in running:
            self._choice_tokens.pop(name, None)
        if running:
            self.llm.llm_engine.abort_request(running)

    def _prompt(self, request: Request) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": [*self.chat.prompt_ids(request), *request.prefix_ids]}
        if request.images:
            prompt["multi_modal_data"] = {"image": [load_image(image) for image in request.images]}
        return prompt

    def _generation(self, request: Request, completion: Any) -> Generation:
        """Converts vLLM's completion of a request into a ``Generation``, without the end-of-turn token.

        Raises:
            RuntimeError: If vLLM's finish reason is neither "stop" nor "length".
        """
        reason = completion.finish_reason
        if reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM must end request {request.key!r} with 'stop' or 'length', got {reason!r}")
        generation = make_generation(self.chat, request, completion.token_ids)
        return Generation(generation.token_ids, generation.text, reason)


def _first_probs(completion: Any) -> dict[int, float]:
    """Returns the probability of each token id that vLLM reports for the first generated token."""
    return {token: math.exp(entry.logprob) for token, entry in completion.logprobs[0].items()}


def devices_of_rank(count: int) -> str | None:
    """Returns the value of ``CUDA_VISIBLE_DEVICES`` for this process, such as "2,3" for a process with two GPUs.

    Each process on this machine gets ``count`` GPUs that no other process gets. Without this value, the vLLM engines
    of all processes would start on the first GPUs. With a single process or without GPUs, returns None: the variable
    must not change. Also returns None if the variable already names exactly ``count`` GPUs.

    Raises:
        ValueError: If this machine has too few GPUs for its processes.
    """
    local = next((environment_integer(name, 0) for name in _LOCAL_RANKS if os.environ.get(name)), None)
    if local is None or rank_and_world_size()[1] == 1:
        return None
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    if not visible:
        import torch

        visible = [str(device) for device in range(torch.cuda.device_count())]
    elif len(visible) == count:
        return None
    devices = visible[local * count : (local + 1) * count]
    if visible and len(devices) < count:
        raise ValueError(
            f"processes must have {count} GPU(s) each (tensor_parallel_size), got {len(visible)} GPU(s) for process "
            f"{local} on this machine: start fewer processes"
        )
    return ",".join(devices) or None


def _single_ids(suppressed: Sequence[Sequence[int]]) -> list[int]:
    """Returns the suppressed token ids as a sorted list: ``[[7], [3]]`` becomes ``[3, 7]``.

    Raises:
        ValueError: If a sequence does not have exactly one id.
    """
    for ids in suppressed:
        if len(ids) != 1:
            raise ValueError(
                "bad_words_ids in generation_config.json must be single tokens for vLLM, got "
                f"{list(ids)}: remove it, or use the engine transformers"
            )
    return sorted({token for ids in suppressed for token in ids})


def _refusals() -> tuple[type[Exception], ...]:
    """Returns the exception types that vLLM raises for invalid prompts."""
    try:
        from vllm.exceptions import VLLMValidationError
    except ImportError:  # older versions of vLLM do not have this class
        return (ValueError,)
    return (ValueError, VLLMValidationError)
