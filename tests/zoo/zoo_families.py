"""Model families: for each, a tokenizer or processor of the real class with the family's chat template.

The tests and the table in docs/families.md use the registry ``FAMILIES``.
"""

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
import zoo_processors as processors
import zoo_templates as templates
import zoo_tokenizers as tokenizers

DATE = datetime.date(2025, 2, 3)  # for templates that write the current date
THOUGHT = "<think>\nCount the squares: 3 and 4.\n</think>\n\nThe answer is 7."
BARE_THOUGHT = "Count the squares: 3 and 4.\n</think>\n\nThe answer is 7."  # after a prompt that ends with <think>


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
        models: Names of the models, for the table.
        build: Function that returns the tokenizer, or the processor of a multimodal family.
        config: Class of the model's config, without "Config". It determines the table's column "rows".
        end: The token that ends a response.
        image: Whether the tests use images with this family.
        system: Whether the template supports a system message. If not, the encoder must raise an error for it.
        responses: Responses besides those of ``test_families``, such as responses with thoughts.
        needs_thoughts: Whether the family refuses responses without thoughts.
        thinking: How the family thinks, for the table.
        separate_rows: Reason why the two responses of a pair need separate rows; "": they share a row.
        options: Options of the encoder.
        notices: A regular expression for each notice of the encoder.
        refused: Inputs for which the encoder must raise an error. A key is a response, "system" for system messages,
            or "family" for every input of the family. The value is a regular expression for the error message.
        rule: A rule of the family in addition to its template, for the table.
    """

    models: str
    build: Callable[[], Any]
    config: str
    end: str
    image: bool = False
    system: bool = True
    responses: tuple[str, ...] = ()
    needs_thoughts: bool = False
    thinking: str = "no"
    separate_rows: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notices: tuple[str, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rule: str = ""

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Additional variables for the chat template."""
        return dict(self.options.get("chat_template_kwargs", {}))


def with_template(build: Callable[[], Any], template: str) -> Any:
    tokenizer = build()
    tokenizer.chat_template = template
    return tokenizer


def text(build: Callable[..., Any], template: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return partial(with_template, partial(build, *args, **kwargs), template)


QWEN3_TOKENIZER = partial(tokenizers.qwen, plain=("<think>", "</think>"))
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
MISTRAL_V3_TOKENS = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
DEEPSEEK_TOKENS = ("<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_BOS, DEEPSEEK_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
GLM_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
COMMAND_R_TOKENS = (
    "<|START_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)
NO_END = "writes no end of turn"
IGNORES = "ignores add_generation_prompt"
FROZEN = "writes the date"
APART = "tokenized apart"
OPENED = "each response must close this block"

TEXT_FAMILIES: dict[str, Family] = {
    "ChatML": Family(
        models="SmolLM2, OpenHermes",
        build=text(tokenizers.gpt2, templates.SMOLLM2),
        config="Llama",
        end="<|im_end|>",
    ),
    "Llama 2": Family(
        models="Llama 2 chat",
        build=text(tokenizers.sentencepiece, templates.LLAMA2, scheme="legacy"),
        config="Llama",
        end="</s>",
    ),
    "Llama 3": Family(
        models="Llama 3 instruct",
        build=text(tokenizers.llama3, templates.LLAMA3, *LLAMA3_TOKENS),
        config="Llama",
        end="<|eot_id|>",
    ),
    "Llama 3.1": Family(
        models="Llama 3.1 instruct, which writes a fixed date",
        build=text(tokenizers.llama3, templates.LLAMA31, *LLAMA3_TOKENS),
        config="Llama",
        end="<|eot_id|>",
        options={"date": DATE},
        notices=(FROZEN,),
    ),
    "Llama 3.2": Family(
        models="Llama 3.2 instruct, which writes the current date",
        build=text(tokenizers.llama3, templates.LLAMA32, *LLAMA3_TOKENS),
        config="Llama",
        end="<|eot_id|>",
        options={"date": DATE},
        notices=(FROZEN,),
        rule="the date is frozen at the start of a run",
    ),
    "Mistral v1": Family(
        models="Mistral 7B v0.1 and v0.2, Mixtral",
        build=text(tokenizers.sentencepiece, templates.MISTRAL_V1, scheme="legacy"),
        config="Mistral",
        end="</s>",
    ),
    "Mistral v3": Family(
        models="Mistral 7B v0.3, Mistral Large 2407",
        build=text(tokenizers.sentencepiece, templates.MISTRAL_V3, *MISTRAL_V3_TOKENS, scheme="always"),
        config="Mistral",
        end="</s>",
        refused={"system": "beginning of the whole conversation"},
    ),
    "Mistral v7": Family(
        models="Mistral Large 2411",
        build=text(tokenizers.sentencepiece, templates.MISTRAL_V7, *MISTRAL_V3_TOKENS, scheme="first"),
        config="Mistral",
        end="</s>",
    ),
    "Mistral v7 Tekken": Family(
        models="Mistral Small 3.1",
        build=text(tokenizers.llama3, templates.MISTRAL_SMALL_31, *MISTRAL_V3_TOKENS, "[IMG]", bos="<s>", eos="</s>"),
        config="Mistral",
        end="</s>",
        options={"date": DATE},
        notices=(FROZEN,),
        rule="the date is frozen at the start of a run",
    ),
    "Gemma 2": Family(
        models="Gemma, Gemma 2",
        build=text(tokenizers.gemma, templates.GEMMA2, "<start_of_turn>", "<end_of_turn>"),
        config="Gemma2",
        end="<end_of_turn>",
        system=False,
    ),
    "Phi-3": Family(
        models="Phi-3 mini and medium, Phi-3.5",
        build=text(
            tokenizers.sentencepiece,
            templates.PHI3,
            *PHI3_TOKENS,
            scheme="legacy",
            rstrip=True,
            add_bos=False,
            eos_token="<|endoftext|>",
        ),
        config="Phi3",
        end="<|end|>",
    ),
    "Phi-3 first": Family(
        models="Phi-3 as first published",
        build=text(
            tokenizers.sentencepiece,
            templates.PHI3_FIRST,
            *PHI3_TOKENS,
            scheme="legacy",
            rstrip=True,
            eos_token="<|endoftext|>",
        ),
        config="Phi3",
        end="<|end|>",
        system=False,
    ),
    "Phi-4": Family(
        models="Phi-4",
        build=text(tokenizers.gpt2, templates.PHI4, "<|im_sep|>", bos_token="<|endoftext|>"),
        config="Phi3",
        end="<|im_end|>",
    ),
    "InternLM2": Family(
        models="InternLM2 chat, InternLM2.5 chat",
        build=text(tokenizers.sentencepiece, templates.INTERNLM2, "<|im_start|>", "<|im_end|>", scheme="never"),
        config="Llama",
        end="<|im_end|>",
    ),
    "Qwen2.5": Family(
        models="Qwen2, Qwen2.5 instruct",
        build=text(tokenizers.qwen, templates.QWEN25),
        config="Qwen2",
        end="<|im_end|>",
    ),
    "Qwen3": Family(
        models="Qwen3",
        build=text(QWEN3_TOKENIZER, templates.QWEN3),
        config="Qwen3",
        end="<|im_end|>",
        responses=(THOUGHT,),
        thinking="in the response; an empty block without thoughts",
    ),
    "Qwen3 without thinking": Family(
        models="Qwen3 with enable_thinking=false",
        build=text(QWEN3_TOKENIZER, templates.QWEN3),
        config="Qwen3",
        end="<|im_end|>",
        options={"chat_template_kwargs": {"enable_thinking": False}},
        thinking="off; the prompt ends with an empty block",
        refused={THOUGHT: "beginning of the whole conversation"},
    ),
    "Qwen3 2507 thinking": Family(
        models="Qwen3 Thinking 2507",
        build=text(QWEN3_TOKENIZER, templates.QWEN3_THINKING_2507),
        config="Qwen3",
        end="<|im_end|>",
        responses=(BARE_THOUGHT, THOUGHT),
        thinking="the prompt ends with `<think>`; a response closes it",
        notices=(APART,),
        rule="a response without thoughts is tokenized apart",
    ),
    "DeepSeek V2": Family(
        models="DeepSeek V2 chat",
        build=text(tokenizers.llama3, templates.DEEPSEEK_V2, bos=DEEPSEEK_BOS, eos=DEEPSEEK_EOS),
        config="DeepseekV2",
        end=DEEPSEEK_EOS,
    ),
    "DeepSeek R1": Family(
        models="DeepSeek R1 and its distillates",
        build=text(tokenizers.llama3, templates.DEEPSEEK_R1, *DEEPSEEK_TOKENS, bos=DEEPSEEK_BOS, eos=DEEPSEEK_EOS),
        config="Qwen2",
        end=DEEPSEEK_EOS,
        thinking="refused: the template drops thoughts",
        rule="refused: conversations lack the `<think>` of the prompt; pass another template",
        refused={"family": "beginning of the whole conversation"},
    ),
    "DeepSeek R1 first": Family(
        models="DeepSeek R1 as first published",
        build=text(
            tokenizers.llama3, templates.DEEPSEEK_R1_FIRST, *DEEPSEEK_TOKENS, bos=DEEPSEEK_BOS, eos=DEEPSEEK_EOS
        ),
        config="Qwen2",
        end=DEEPSEEK_EOS,
        thinking="refused: the template drops thoughts",
        refused={THOUGHT: "write the response unchanged"},
    ),
    "GLM-4": Family(
        models="GLM-4 chat",
        build=text(
            tokenizers.qwen, templates.GLM4, additional_special_tokens=list(GLM_TOKENS), eos_token="<|endoftext|>"
        ),
        config="Glm4",
        end="<|endoftext|>",
        notices=(NO_END,),
        rule="`eos_token` ends a response",
    ),
    "Vicuna": Family(
        models="Vicuna 1.1 and 1.5",
        build=text(tokenizers.sentencepiece, templates.VICUNA, scheme="legacy"),
        config="Llama",
        end="</s>",
    ),
    "Zephyr": Family(
        models="Zephyr, TinyLlama chat",
        build=text(tokenizers.sentencepiece, templates.ZEPHYR, scheme="legacy"),
        config="Mistral",
        end="</s>",
    ),
    "Command R": Family(
        models="Command R, Aya",
        build=text(
            tokenizers.llama3,
            templates.COMMAND_R,
            *COMMAND_R_TOKENS,
            bos="<BOS_TOKEN>",
            eos="<|END_OF_TURN_TOKEN|>",
        ),
        config="Cohere",
        end="<|END_OF_TURN_TOKEN|>",
    ),
    "Granite": Family(
        models="Granite 3 instruct",
        build=text(
            tokenizers.gpt2,
            templates.GRANITE,
            "<|start_of_role|>",
            "<|end_of_role|>",
            "<|end_of_text|>",
            bos_token="<|end_of_text|>",
            eos_token="<|end_of_text|>",
        ),
        config="Granite",
        end="<|end_of_text|>",
    ),
}

IMAGE_FAMILIES: dict[str, Family] = {
    "InternVL2.5": Family(
        models="InternVL2.5 2B, 8B, 26B (InternLM2)",
        build=processors.internvl25,
        config="InternVL",
        end="<|im_end|>",
        image=True,
    ),
    "InternVL3": Family(
        models="InternVL3, InternVL2.5 1B and 4B (Qwen2.5)",
        build=processors.internvl3,
        config="InternVL",
        end="<|im_end|>",
        image=True,
    ),
    "InternVL3.5": Family(
        models="InternVL3.5 (Qwen3)",
        build=processors.internvl35,
        config="InternVL",
        end="<|im_end|>",
        image=True,
        responses=(THOUGHT,),
        thinking="in the response",
    ),
    "Qwen2.5-VL": Family(
        models="Qwen2-VL, Qwen2.5-VL",
        build=processors.qwen25_vl,
        config="Qwen2_5_VL",
        end="<|im_end|>",
        image=True,
    ),
    "Qwen3-VL": Family(
        models="Qwen3-VL",
        build=processors.qwen3_vl,
        config="Qwen3VL",
        end="<|im_end|>",
        image=True,
        responses=(THOUGHT,),
        thinking="in the response",
    ),
    "SmolVLM": Family(
        models="SmolVLM, SmolVLM2",
        build=processors.smolvlm,
        config="SmolVLM",
        end="<end_of_utterance>",
        image=True,
    ),
    "Idefics3": Family(
        models="Idefics3",
        build=processors.idefics3,
        config="Idefics3",
        end="<end_of_utterance>",
        image=True,
    ),
    "LLaVA 1.5": Family(
        models="LLaVA 1.5",
        build=processors.llava15,
        config="Llava",
        end="</s>",
        image=True,
        notices=(NO_END,),
        rule="`eos_token` ends a response",
    ),
    "LLaVA-NeXT": Family(
        models="LLaVA-NeXT (Mistral)",
        build=processors.llava_next,
        config="LlavaNext",
        end="</s>",
        image=True,
    ),
    "LLaVA-OneVision": Family(
        models="LLaVA-OneVision",
        build=processors.llava_onevision,
        config="LlavaOnevision",
        end="<|im_end|>",
        image=True,
    ),
    "Gemma 3": Family(
        models="Gemma 3",
        build=processors.gemma3,
        config="Gemma3",
        end="<end_of_turn>",
        image=True,
    ),
    "GLM-4V": Family(
        models="GLM-4.1V Thinking",
        build=processors.glm4v,
        config="Glm4v",
        end="<|endoftext|>",
        image=True,
        responses=(BARE_THOUGHT, THOUGHT),
        needs_thoughts=True,
        thinking="the prompt ends with `<think>`; each response closes it",
        notices=(OPENED, NO_END),
        rule="`eos_token` ends a response; a response without thoughts is refused",
        refused={"The answer is 12.": "must close the block"},
    ),
    "MiniCPM-V": Family(
        models="MiniCPM-V 4.6",
        build=processors.minicpm_v,
        config="MiniCPMV4_6",
        end="<|im_end|>",
        image=True,
    ),
    "PaliGemma": Family(
        models="PaliGemma",
        build=processors.paligemma,
        config="PaliGemma",
        separate_rows="attention that is not causal",
        end="<eos>",
        image=True,
        refused={"family": "attends to its prompt in both directions"},
        rule="refused: it attends to its prompt in both directions",
    ),
}
FAMILIES = {**TEXT_FAMILIES, **IMAGE_FAMILIES}


def meta_model(family: Family) -> Any:
    """Returns a model of the family with few layers. It is on the meta device, so it has no weights."""
    config = getattr(transformers, f"{family.config}Config")()
    for part in (config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))):
        for name in ("num_hidden_layers", "depth"):
            if getattr(part, name, None):
                setattr(part, name, 2)
    auto = transformers.AutoModelForImageTextToText if family.image else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def table() -> str:
    """Returns the table of docs/families.md."""
    lines = ["| family | models | text | image | thinking | rows | rule beyond the template |", "| --- " * 7 + "|"]
    for name, family in FAMILIES.items():
        state = "refused" if "family" in family.refused else "exact"
        image = state if family.image else "no"
        rows = f"separate: {family.separate_rows}" if family.separate_rows else "shared"
        no_system = not family.system or "system" in family.refused
        rule = "; ".join(filter(None, [family.rule, "a system turn is refused" if no_system else ""])) or "none"
        lines.append(f"| {name} | {family.models} | {state} | {image} | {family.thinking} | {rows} | {rule} |")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    print(table(), end="")
