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


def test_variables_that_the_template_does_not_read_are_named() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% break %}"
    template = QWEN + "{% if false %}" + template + "{% endfor %}{{ date | default('') }}{% endif %}"
    template += "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}"
    rule = "the chat template does not read these names of chat_template_kwargs: "
    for names, expected in (
        ({"enable_thinking": True, "date": "x", "eos_token": ""}, rule + "'eos_token'"),
        ({"enable_thinkng": True, "other": 1}, rule + "'enable_thinkng', 'other'; did you mean 'enable_thinking'?"),
        ({"enable_thinking": True}, None),
    ):
        notices = encoder_of(template, chat_template_kwargs=names).notices
        assert notices == (() if expected is None else (expected,))
    assert rule + "'x'" in encoder_of(None, chat_template_kwargs={"x": 1}).notices


def test_settings_of_the_template_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ChatError, match="chat_template must be the text of a chat template, got ''"):
        encoder_of(QWEN, chat_template="")
    with pytest.raises(ValueError, match="must have names of Jinja variables, got 'enable-thinking'"):
        encoder_of(QWEN, chat_template_kwargs={"enable-thinking": False})
    with pytest.raises(TypeError, match=r"chat_template_kwargs\.x must have keys of type str, got int 1"):
        encoder_of(QWEN, chat_template_kwargs={"x": {1: 2}})
    tokenizer = build_tokenizer(SPECIAL[QWEN])
    tokenizer.chat_template = {"tool_use": QWEN, "rag": QWEN}
    with pytest.raises(ChatError, match="must have a chat template named 'default', got 'tool_use', 'rag'"):
        ChatEncoder(tokenizer)
    assert ChatEncoder(tokenizer, chat_template=QWEN).chat_template == QWEN


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
IS_LAST = "loop.last and m.role == 'assistant'"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Bern"}}]}


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (TURN + CALLS + "<|im_end|>\n{% endfor %}" + ASK, None),
        # Other templates end the turn of a call, or each turn but the last, with another token or with no token.
        (TURN + CALLS + "{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}" + ASK, "call"),
        (
            TURN + CALLS + "{{ '</s>' if " + IS_LAST + " else '<|im_end|>' }}\n{% endfor %}" + ASK,
            "call answer",
        ),
        (
            TURN + CALLS + "{{ '</s>' if " + IS_LAST + " else '' }}\n{% endfor %}" + ASK,
            "call answer",
        ),
        # The template removes earlier thoughts, and looks at both ends of a user's turn.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
            "</think>\n{% endif %}{% if m.content.startswith('<r>') and m.content.endswith('</r>') %}!{% endif %}"
            "{{ m.content }}" + CALLS + "<|im_end|>\n{% endfor %}" + ASK,
            None,
        ),
    ],
)
def test_only_the_turns_of_the_assistant_are_targets(template: str, problem: str | None) -> None:
    chat = encoder_of(template, tokens=("<|eom|>",))
    last = {"role": "assistant", "content": "Two."}
    for name, turns in (
        ("call", [CALL, {"role": "tool", "content": "18 degrees"}, last]),
        ("call", [CALL, {"role": "tool", "content": ""}, last]),
        ("answer", [{"role": "assistant", "content": "One."}, {"role": "user", "content": "<r>More?</r>"}, last]),
        ("answer", [{"role": "assistant", "content": "One."}, {"role": "user", "content": "More?"}, last]),
    ):
        if problem is not None and name in problem:
            with pytest.raises(ChatError, match=r"must end turn 1 of the response with '(<\|im_end\|>|</s>)', got '"):
                chat.response(QUESTION, turns)
            continue
        encoded = chat.response(QUESTION, turns)
        targets = chat.decode([token for token, target in zip(encoded.ids, encoded.is_target, strict=True) if target])
        assert targets.count("<|im_end|>") == targets.count(chat.decode([chat.end_id])) == 2
        assert targets.startswith("One.<|im_end|>" if name == "answer" else '{"')
        assert targets.endswith("Two.<|im_end|>")
        assert not any(text in targets for text in ("18", "More", "user", "tool\n"))


def test_each_field_of_a_response_turn_must_be_written() -> None:
    thoughts = {"role": "assistant", "reasoning_content": "One and one.", "content": "Two.", "refusal": None}
    turns = [thoughts, {"role": "user", "name": "Ann", "content": "More?"}, {"role": "assistant", "content": "3"}]
    with pytest.raises(ChatError, match=r"write the field 'reasoning_content' .* got no 'One and one\.'"):
        encoder_of(QWEN).response(QUESTION, [thoughts])
    with pytest.raises(ChatError, match="write the field 'function_call' of the assistant's turn, got no 'name'"):
        encoder_of(QWEN).response(QUESTION, [{**turns[2], "function_call": {"name": "weather"}}])
    chat = encoder_of(TURN.replace("{{ m.content", "{{ m.reasoning_content }}{{ m.content") + "<|im_end|>{% endfor %}")
    for response in ([thoughts], turns):
        assert chat.decode(chat.response(QUESTION, response).ids).startswith("One and one.Two.<|im_end|>")


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
