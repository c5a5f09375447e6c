"""Tests the chat encoder on common forms of chat templates and tokenizers."""

# ruff: noqa: E402 - these packages come with an extra
import datetime
from typing import Any

import pytest

for package in ("transformers", "tokenizers"):
    pytest.importorskip(package, reason=f"needs {package}, which dev installs")

from tiny_processors import QWEN, SPECIAL, build_tokenizer
from tokenizers import processors

from mpo_ext.chat import ChatEncoder, ChatError, Conversation

QUESTION = Conversation(question="Why?")


def encoder_of(
    template: str | None, *, tokens: tuple[str, ...] = (), added: tuple[str, ...] = (), **options: Any
) -> Any:
    """Returns a chat encoder with ``tokens`` as special tokens and ``added`` as ordinary added tokens."""
    tokenizer = build_tokenizer([*SPECIAL[QWEN], *tokens], bos="<s>" if template and "bos_token" in template else None)
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer, **options)


def texts(chat: ChatEncoder, response: str = "Two.") -> tuple[str, str]:
    ids = chat.response_ids(QUESTION, response)
    assert chat.response_text(QUESTION, ids[:-1]) == response
    assert ids[-1] == chat.end_id
    return chat.decode(chat.prompt_ids(QUESTION)), chat.decode(ids)


@pytest.mark.parametrize(
    ("body", "prompt", "response"),
    [
        (
            "<|im_start|>{role}\n{text}<|im_end|>\n",
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            "Two.",
        ),
        ("{role}: {text}<|im_end|>\n", "user: Why?<|im_end|>\nassistant:", " Two."),
        ("[{role}]{text}<|im_end|>", "[user]Why?<|im_end|>[assistant]", "Two."),
    ],
)
def test_a_template_that_ignores_the_generation_prompt(body: str, prompt: str, response: str) -> None:
    turn = body.replace("{role}", "{{ m.role }}").replace("{text}", "{{ m.content }}")
    chat = encoder_of("{% for m in messages %}" + turn + "{% endfor %}")
    assert texts(chat) == (prompt, response + "<|im_end|>")
    (notice,) = chat.notices
    assert notice.startswith("the chat template ignores add_generation_prompt: prompts end with its header")


@pytest.mark.parametrize("template", [QWEN, "\n{{ bos_token }}" + QWEN, "{{ bos_token }}" + QWEN, None])
def test_special_tokens_of_the_tokenizer(template: str | None) -> None:
    """With a template, only the template writes special tokens. Without one, the tokenizer adds <s> and </s>."""
    chat = encoder_of(template)
    assert any(notice.startswith("the processor has none: ") for notice in chat.notices) == (template is None)
    begin, end = chat.tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    chat.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $0 </s>", None, [("<s>", begin), ("</s>", end)]
    )
    chat = ChatEncoder(chat.tokenizer)
    ids = [*chat.prompt_ids(QUESTION), *chat.response_ids(QUESTION, "Two.")]
    if template is None:
        assert chat.decode(ids) == "<s>Why?\nTwo.</s>"
        return
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Two."}]
    whole = chat.tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(ids)] == ids
    assert chat.decode(whole[len(ids) :]) == "\n"
    assert ids.count(begin) == template.count("bos_token")
    assert end not in ids


@pytest.mark.parametrize(
    ("closing", "end", "options"),
    [
        ("<|END_RESPONSE|><|im_end|>", "<|im_end|>", {"tokens": ("<|END_RESPONSE|>",)}),
        ("</answer><|im_end|>", "<|im_end|>", {"added": ("</answer>",)}),
        ("</answer>\n<|im_end|>", "<|im_end|>", {"added": ("</answer>",)}),
        (" <|im_end|>", "<|im_end|>", {}),
        ("</answer>", "</answer>", {"added": ("</answer>",)}),
    ],
)
def test_a_turn_ends_with_the_last_of_its_special_tokens(closing: str, end: str, options: dict[str, Any]) -> None:
    chat = encoder_of(QWEN.replace("<|im_end|>", closing), **options)
    assert texts(chat)[1] == "Two." + closing
    assert chat.end_id == chat.tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("after", ["\n</s>", "\n\n</s>", "\n"])
def test_what_a_template_writes_after_the_end_is_no_target(after: str) -> None:
    chat = encoder_of(QWEN.replace("<|im_end|>\n", f"<|im_end|>{after}"))
    assert texts(chat)[1] == "Two.<|im_end|>"


def test_ids_without_a_row_in_the_embedding() -> None:
    rows = len(build_tokenizer(SPECIAL[QWEN]))
    chat = encoder_of(QWEN, added=("<box>",), embedding_rows=rows)
    assert chat.notices == ("1 token(s) of the tokenizer have no row in the embedding: texts with them are refused",)
    rule = rf"must be below the {rows} rows of the model's embedding, got {rows} \('<box>'\)"
    with pytest.raises(ChatError, match=rule):
        chat.prompt(Conversation(question="<box> where?"))
    with pytest.raises(ChatError, match=rule):
        chat.response(QUESTION, "in the <box>")
    assert encoder_of(QWEN, embedding_rows=rows).notices == ()


def test_a_date_is_frozen() -> None:
    date = datetime.date(2024, 2, 29)
    for call in ('strftime_now("%d %b %Y")', "strftime_now( format='%d %b %Y' )"):
        chat = encoder_of("{{ " + call + " }}" + QWEN, date=date)
        assert texts(chat)[0].startswith("29 Feb 2024<|im_start|>")
        assert chat.notices == ("the chat template writes the date: frozen at 2024-02-29",)
    with pytest.raises(ChatError, match="must call strftime_now with a constant format, got"):
        encoder_of("{% set f = '%Y' %}{{ strftime_now(f) }}" + QWEN)
