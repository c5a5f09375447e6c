"""The engine that uses vLLM."""

from collections.abc import Sequence
from typing import Any

from mpo_ext.chat import chat_messages
from mpo_ext.checks import install_hint
from mpo_ext.generate.engine import Generation, Request
from mpo_ext.images import load_image


class VLLMEngine:
    """Runs a model in vLLM's offline engine, which batches the requests. Each request has a separate seed.

    Args:
        model: Folder or name of the model.
        **options: Passed to ``vllm.LLM``, for example ``dtype``, ``tensor_parallel_size`` or ``limit_mm_per_prompt``.

    Raises:
        ImportError: If vllm is missing.
    """

    def __init__(self, model: str, **options: Any) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ImportError(f"VLLMEngine needs vllm: {install_hint('vllm')} ({error})") from error
        self._sampling_params = vllm.SamplingParams
        self.name = model
        self.options = options
        self.llm = vllm.LLM(model=model, **options)
        self.tokenizer = self.llm.get_tokenizer()

    def settings(self) -> dict[str, Any]:
        return {"engine": "vllm", "model": self.name, "dtype": str(self.options.get("dtype", "auto"))}

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

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
                    skip_special_tokens=False,
                )
            )
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [self._generation(output.outputs[0]) for output in outputs]

    def _prompt(self, request: Request) -> dict[str, Any]:
        messages = chat_messages(request, as_parts=bool(request.images))
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt: dict[str, Any] = {"prompt_token_ids": [*self.encode(text), *request.prefix_ids]}
        if request.images:
            prompt["multi_modal_data"] = {"image": [load_image(image) for image in request.images]}
        return prompt

    def _generation(self, completion: Any) -> Generation:
        """Converts a completion and removes the end token that vLLM leaves in the ids."""
        ids = list(completion.token_ids)
        is_length = completion.finish_reason == "length"
        if not is_length and ids and ids[-1] in {self.tokenizer.eos_token_id, completion.stop_reason}:
            ids.pop()
        return Generation(tuple(ids), self.decode(ids), "length" if is_length else "stop")
