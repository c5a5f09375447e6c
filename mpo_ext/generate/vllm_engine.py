"""The engine that uses vLLM."""

from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.chat import ChatEncoder, Conversation
from mpo_ext.checks import install_hint
from mpo_ext.generate.engine import Generation, Request
from mpo_ext.generate.transformers_engine import make_generation
from mpo_ext.images import load_image
from mpo_ext.processors import load_without_weights
from mpo_ext.provenance import processor_parts


class VLLMEngine:
    """Runs a model in vLLM's offline engine, which batches the requests. Each request has a separate seed.

    vLLM gets the token ids of prompts, which are those of ``TransformersEngine``, and expands the image tokens.

    Args:
        model: Folder or name of the model.
        processor: Processor of the model, or the tokenizer of a text model; None: loaded with transformers.
        chat_options: Options of ``ChatEncoder``: ``chat_template``, ``chat_template_kwargs`` and ``date``.
        **options: Passed to ``vllm.LLM``, for example ``dtype``, ``tensor_parallel_size`` or ``limit_mm_per_prompt``.

    Raises:
        ChatError: If the chat template cannot be used.
        ImportError: If vllm is missing.
    """

    def __init__(
        self, model: str, *, processor: Any = None, chat_options: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ImportError(f"VLLMEngine needs vllm: {install_hint('vllm')} ({error})") from error
        self._sampling_params = vllm.SamplingParams
        self.name = model
        self.options = options
        # The template is checked before the weights are loaded.
        checks: dict[str, Any] = {}
        if processor is None:
            loaded = load_without_weights(model, **options)
            processor = loaded.processor
            checks = {"stop_ids": loaded.stop_ids, "embedding_rows": loaded.embedding_rows}
        self.chat = ChatEncoder(processor, **checks, **(chat_options or {}))
        self.llm = vllm.LLM(model=model, **options)

    def settings(self) -> dict[str, Any]:
        dtype = str(self.options.get("dtype", "auto"))
        parts = processor_parts(self.chat, self.chat.stop_ids)
        return {"engine": "vllm", "model": self.name, "dtype": dtype, "processor": parts}

    def encode_response(self, conversation: Conversation, response: str) -> list[int]:
        return self.chat.response_ids(conversation, response)[:-1]

    def decode_response(self, conversation: Conversation, token_ids: Sequence[int]) -> str:
        return self.chat.response_text(conversation, token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        prompts, params = [], []
        for request in requests:
            prompts.append(self._prompt(request))
            params.append(
                self._sampling_params(
                    temperature=request.sampling.temperature,
                    top_p=request.sampling.top_p,
                    top_k=request.sampling.top_k or -1,
                    max_tokens=request.sampling.max_new_tokens,
                    seed=request.seed,
                    stop_token_ids=sorted(self.chat.stop_ids),
                    skip_special_tokens=False,
                )
            )
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [
            self._generation(request, output.outputs[0]) for request, output in zip(requests, outputs, strict=True)
        ]

    def _prompt(self, request: Request) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": [*self.chat.prompt_ids(request), *request.prefix_ids]}
        if request.images:
            prompt["multi_modal_data"] = {"image": [load_image(image) for image in request.images]}
        return prompt

    def _generation(self, request: Request, completion: Any) -> Generation:
        """Converts a completion; vLLM may leave the token that ended it in the ids, or remove it."""
        generation = make_generation(self.chat, request, completion.token_ids)
        is_length = completion.finish_reason == "length"
        return Generation(generation.token_ids, generation.text, "length" if is_length else "stop")
