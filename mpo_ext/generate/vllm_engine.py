"""The engine that uses vLLM."""

from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.chat import ChatEncoder, Conversation
from mpo_ext.checks import install_hint
from mpo_ext.generate.engine import Generation, Request
from mpo_ext.generate.transformers_engine import make_generation
from mpo_ext.images import load_image
from mpo_ext.processors import load_processor


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
        ImportError: If vllm is missing, or the processor needs torchvision, which is missing.
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
        loaded, stop_ids = _load_processor(model, options) if processor is None else (processor, [])
        self.chat = ChatEncoder(loaded, stop_ids=stop_ids, **(chat_options or {}))
        self.llm = vllm.LLM(model=model, **options)

    def settings(self) -> dict[str, Any]:
        return {"engine": "vllm", "model": self.name, "dtype": str(self.options.get("dtype", "auto"))}

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
        finish = "length" if completion.finish_reason == "length" else "stop"
        return Generation(generation.token_ids, generation.text, finish)


def _load_processor(model: str, options: Mapping[str, Any]) -> tuple[Any, list[int]]:
    """Returns the processor of a model, or the tokenizer of a text model, and the ids at which the model stops."""
    import transformers

    hub = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    config = transformers.AutoConfig.from_pretrained(model, **hub)
    processor = load_processor(model, config, **hub)
    try:
        ids = transformers.GenerationConfig.from_pretrained(model, **hub).eos_token_id
    except OSError:  # the model has no generation_config.json
        ids = getattr(config.get_text_config(), "eos_token_id", None)
    return processor, [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
