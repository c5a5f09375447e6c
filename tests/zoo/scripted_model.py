"""A transformers model and a fake vLLM. Both generate prescribed tokens."""

import types
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ScriptedConfig(PretrainedConfig):
    model_type = "scripted"


class ScriptedModel(PreTrainedModel, GenerationMixin):
    """A model that generates the same token ids (a script) after any prompt. Each step generates one id.

    Attributes:
        script: Ids to generate; the last id is repeated.
        prompts: Token ids of all prompts so far.
        scripts: Scripts for the next prompts. The first of them becomes ``script`` when a new prompt arrives.
    """

    config_class = ScriptedConfig
    main_input_name = "input_ids"

    def __init__(self, vocab_size: int) -> None:
        super().__init__(ScriptedConfig(vocab_size=vocab_size, num_hidden_layers=1))
        self.embedding = torch.nn.Embedding(vocab_size, 1)
        self.script: list[int] = []
        self.scripts: list[list[int]] = []
        self.prompts: list[list[int]] = []
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Accepts the inputs of every family; the model ignores images."""

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **inputs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> CausalLMOutput:
        (row,) = input_ids.tolist()  # a batch of one has no padding
        if not self.prompts or len(row) <= len(self.prompts[-1]) or row[: len(self.prompts[-1])] != self.prompts[-1]:
            self.prompts.append(row)
            self.script = self.scripts.pop(0) if self.scripts else self.script
        done = len(row) - len(self.prompts[-1])
        token = self.script[min(done, len(self.script) - 1)]
        logits = torch.full((1, len(row), self.config.vocab_size), -1e4)
        logits[:, -1, token] = 1e4
        return CausalLMOutput(logits=logits)


class FakeVLLM(types.ModuleType):
    """A fake ``vllm`` module. It records the prompts, and answers each prompt with the token ids in ``script``."""

    def __init__(self, script: Sequence[int] = ()) -> None:
        super().__init__("vllm")
        self.script = list(script)
        self.prompts: list[dict[str, Any]] = []
        self.params: list[Any] = []
        module = self

        class SamplingParams:
            def __init__(self, **options: Any) -> None:
                self.options = options

        class LLM:
            def __init__(self, **options: Any) -> None:
                self.llm_engine = self
                self.done: list[Any] = []

            def add_request(self, request_id: str, prompt: dict[str, Any], params: Any) -> None:
                module.prompts.append(prompt)
                module.params.append(params)
                stops = params.options["stop_token_ids"]
                end = next((place for place, token in enumerate(module.script) if token in stops), None)
                ids = module.script if end is None else module.script[: end + 1]
                reason = "length" if end is None else "stop"
                stop = None if end is None else ids[-1]
                completion = types.SimpleNamespace(token_ids=ids, finish_reason=reason, stop_reason=stop)
                self.done.append(types.SimpleNamespace(request_id=request_id, finished=True, outputs=[completion]))

            def step(self) -> list[Any]:
                done, self.done = self.done, []
                return done

        self.LLM, self.SamplingParams = LLM, SamplingParams
