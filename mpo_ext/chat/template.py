"""Finds a model's chat template, renders messages with it, and finds the text that it writes around a response."""

import dataclasses
import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.chat.time_limit import time_limit

#: Time limit in seconds for rendering a conversation: a template may loop forever. Rendering takes milliseconds.
RENDER_SECONDS = 60.0
PROBE = "Qz7 probe 7zQ"  # a response that does not occur in any template
OPEN_TAG = re.compile(r"<(\w+)>\s*$")
_OTHER_PROBE = "Xk3 other 3kX"

Tools = Sequence[Mapping[str, Any]]

_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")


def find_chat_template(processor: Any, chat_template: str | None = None) -> str | None:
    """Returns ``chat_template`` if given, otherwise the chat template of the processor or of its tokenizer.

    If there are several named templates, the template "default" is returned. Without any template, the result is None.

    Raises:
        ChatError: If ``chat_template`` is empty, or there are named templates without "default".
    """
    if chat_template is not None and not chat_template.strip():
        raise ChatError(f"chat_template must be the text of a chat template, got {chat_template[:80]!r}")
    tokenizer = getattr(processor, "tokenizer", processor)
    template = chat_template or getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping) and template and "default" not in template:
        raise ChatError(
            f"the processor must have a chat template named 'default', got {', '.join(map(repr, template))}: pass one "
            "of them as chat_template"
        )
    return template.get("default") if isinstance(template, Mapping) else template


def freeze_date(template: str, date: datetime.date) -> str:
    """Replaces each call ``strftime_now("...")`` in a template by its result at 00:00 on ``date``.

    Raises:
        ChatError: If the format in a call is not a constant string.
    """
    midnight = datetime.datetime.combine(date, datetime.time())
    frozen = _DATE_CALL.sub(lambda call: repr(midnight.strftime(call[2])), template)
    if re.search(r"strftime_now\(", frozen):
        call = frozen[frozen.index("strftime_now(") :][:80]
        raise ChatError(f"chat_template must call strftime_now with a constant format, got {call!r}")
    return frozen


class ChatError(ValueError):
    """Raised if a chat template cannot be used, or if a conversation does not fit the template."""


@dataclasses.dataclass(frozen=True, slots=True)
class TurnForm:
    """The text that a chat template writes around a response.

    Attributes:
        ignores_generation_prompt: Whether the template writes a header before a response, but ignores
            ``add_generation_prompt``.
        opened: Opening tag, such as ``<think>``, at the end of the generation prompt. In a whole conversation, the
            template does not write this tag before a response.
        lead: Text between the prompt and a response.
        tail: Text after a response at the end of a conversation.
        inner_tail: Text after a response in the middle of a conversation, including the user's next turn. "" if the
            template cannot render such a conversation.
    """

    ignores_generation_prompt: bool = False
    opened: str = ""
    lead: str = ""
    tail: str = ""
    inner_tail: str = ""


class Renderer:
    """Renders messages with the chat template of a processor, or of the tokenizer of a text model."""

    def __init__(self, processor: Any, chat_template: str, chat_template_kwargs: Mapping[str, Any]) -> None:
        self._processor = processor
        self._template = chat_template
        self._kwargs = dict(chat_template_kwargs)
        self._as_parts = hasattr(processor, "tokenizer")

    def turn(self, role: str, text: str) -> dict[str, Any]:
        """Returns a message with a role and a text.

        The content is a string for a tokenizer, and a list with one text part for a processor.
        """
        return {"role": role, "content": [{"type": "text", "text": text}] if self._as_parts else text}

    def render(self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool, tools: Tools = ()) -> str:
        """Returns the text of messages, and raises ``ChatError`` if the template fails.

        ``generation_prompt``: whether the text ends with the header of the assistant's response. ``tools``: as in
        ``Conversation``.
        """
        try:
            return self._apply(messages, tools, add_generation_prompt=generation_prompt, tokenize=False)
        except Exception as error:  # a template may raise any exception
            raise ChatError(f"the conversation must fit the chat template, got {str(error)[:300]}") from error

    def before(self, messages: Sequence[Mapping[str, Any]], index: int, tools: Tools = ()) -> str:
        """Returns the text of messages up to the content of ``messages[index]``, with a part of this content.

        If ``messages`` end before ``index``, returns the whole text.

        The result ends where the text changes if the content has other text in its middle. The beginning and the end
        of the content stay, because a template may look at them.
        """
        if index == len(messages):
            return self.render(messages, generation_prompt=False, tools=tools)
        content = messages[index]["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        text = f"{text[: len(text) // 2]}{PROBE}{text[len(text) // 2 :]}"
        other = {**messages[index], "content": [{"type": "text", "text": text}] if self._as_parts else text}
        whole, changed = (
            self.render(turns, generation_prompt=False, tools=tools)
            for turns in (messages, [*messages[:index], other, *messages[index + 1 :]])
        )
        return whole[: common_length(whole, changed)]

    def ids(
        self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool, tools: Tools = (), **options: Any
    ) -> list[int]:
        """Returns the token ids of messages. The messages may contain images and videos.

        ``generation_prompt`` and ``tools`` are as in ``render``. ``options`` are passed to ``apply_chat_template``.
        """
        ids = self._apply(
            messages, tools, add_generation_prompt=generation_prompt, tokenize=True, return_dict=False, **options
        )
        while len(ids) and not isinstance(ids[0], int):  # some processors return a batch of one
            ids = ids[0].tolist() if hasattr(ids[0], "tolist") else ids[0]
            ids = [ids] if isinstance(ids, int) else ids
        return list(ids)

    def _apply(self, messages: Sequence[Mapping[str, Any]], tools: Tools, **options: Any) -> Any:
        if tools:
            options["tools"] = list(tools)
        with time_limit(RENDER_SECONDS, "the chat template"):
            return self._processor.apply_chat_template(
                list(messages), chat_template=self._template, **options, **self._kwargs
            )


def common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Returns the length of the common prefix of two texts or two lists of ids."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def find_form(renderer: Renderer) -> tuple[TurnForm, str | None]:
    """Finds the text that the template writes around a response, by rendering two test responses.

    Returns:
        A tuple: the text around a response, and a message for the user. The message describes a deviation of the
        template; it is None without a deviation.

    Raises:
        ChatError: If the template does not write responses, or writes different text around the two test responses.
            Also if a rendered conversation does not begin with the rendered prompt and its generation prompt.
    """
    question = renderer.turn("user", "question")
    prompt = renderer.render([question], generation_prompt=True)
    plain = renderer.render([question], generation_prompt=False)
    sides = []
    for probe in (PROBE, _OTHER_PROBE):
        whole = renderer.render([question, renderer.turn("assistant", probe)], generation_prompt=False)
        before, found, after = whole.rpartition(probe)
        if not found:
            raise ChatError(f"chat_template must write the assistant's response, got {whole[:200]!r}")
        sides.append((before, after))
    if sides[0] != sides[1]:
        raise ChatError("chat_template must write the same text around every response, got two different texts")
    before, tail = sides[0]
    inner = _inner_tail(renderer, question)
    if prompt == plain and before.startswith(plain) and before[len(plain) :].strip():
        header = before[len(plain) :]
        form = TurnForm(True, lead=header[len(header.rstrip(" ")) :], tail=tail, inner_tail=inner)
        return form, f"the chat template ignores add_generation_prompt: prompts end with its header {header!r}"
    if before.startswith(prompt):
        return TurnForm(lead=before[len(prompt) :], tail=tail, inner_tail=inner), None
    opened = prompt[common_length(prompt, before) :]
    if tag := OPEN_TAG.search(opened):
        response = f"{opened}reason\n</{tag[1]}>\n\n{PROBE}"
        whole = renderer.render([question, renderer.turn("assistant", response)], generation_prompt=False)
        if whole.startswith(prompt):
            notice = f"the generation prompt ends with {opened!r}: each response must close this block"
            return TurnForm(opened=opened, tail=tail, inner_tail=inner), notice
    raise ChatError(
        f"the generation prompt must be the beginning of the whole conversation, got {prompt[-80:]!r} where the "
        f"conversation with a response has {before[-80:]!r}: pass template variables such as "
        "enable_thinking=false, or another chat_template"
    )


def _inner_tail(renderer: Renderer, question: dict[str, Any]) -> str:
    try:
        whole = renderer.render([question, renderer.turn("assistant", PROBE), question], generation_prompt=False)
    except ChatError:  # some templates accept only a single turn
        return ""
    return whole.rpartition(PROBE)[2]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Returns the ids of all special and added tokens."""
    return frozenset({*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})})


def find_end(form: TurnForm, tokenizer: Any) -> tuple[int, int]:
    """Returns (token id, count). The token ends a turn, and the template writes it ``count`` times after a response.

    If the template writes no such token, returns (``eos_token_id``, 0).

    Raises:
        ChatError: If the template ends a turn with ordinary text. Also raised if the template writes only white space
            or nothing after a turn, and the tokenizer has no ``eos_token``.
    """
    tail = form.tail
    ids = tokenizer.encode(tail, add_special_tokens=False) if tail else []
    known = {token for token in special_ids(tokenizer) if tokenizer.decode([token]).strip()}
    # A closing tag such as </answer> is often an added token, but not a special one.
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {*tokenizer.all_special_ids, *(token for token, value in added.items() if value.special)}
    special = known & marked if known & marked & set(ids) else known
    start = next((place for place, token in enumerate(ids) if token in special), None)
    if start is not None:
        run = list(itertools.takewhile(special.__contains__, ids[start:]))
        # Several tokens may end a turn together. Others, such as Phi-3's <|endoftext|>, end the whole conversation.
        inner = tokenizer.encode(form.inner_tail, add_special_tokens=False)[start:] if form.inner_tail else []
        shared = [token for token, other in zip(run, inner, strict=False) if token == other]
        end = shared[-1] if shared else run[0]
        return end, ids.count(end)
    if tail.strip():
        raise ChatError(
            f"the chat template must end a turn with a special token or white space, got {tail[:80]!r}, which is "
            "ordinary text for this tokenizer: add the token to the tokenizer, or pass another chat_template"
        )
    if tokenizer.eos_token_id is None:
        raise ChatError("the end of a turn must be known: the chat template writes none, and eos_token is None")
    return tokenizer.eos_token_id, 0
