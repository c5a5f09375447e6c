"""The encoder of conversations for training, sampling and evaluation.

It produces the token ids of the model's processor, with the exceptions that ``ChatEncoder`` lists.
"""

import datetime
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mpo_ext.chat.conversation import IMAGE_PLACEHOLDER, Conversation, chat_messages
from mpo_ext.chat.decoding import possible_texts
from mpo_ext.chat.media import expanded
from mpo_ext.chat.template import (
    PROBE,
    ChatError,
    Renderer,
    Tools,
    TurnForm,
    common_length,
    find_chat_template,
    find_end,
    find_form,
    freeze_date,
    special_ids,
)
from mpo_ext.chat.turn_checks import (
    check_response_turn,
    check_tools,
    check_turns,
    check_written,
    renderings,
    response_turns,
)
from mpo_ext.chat.variables import check_variables, unused_notice

_CONTEXT = 16  # number of prompt tokens that are decoded with a response, so that the response keeps its spaces
_ANCHORS = ("", "\n", "a", ":")


class EncodedPrompt(NamedTuple):
    """The encoded prompt of a conversation.

    Attributes:
        messages: The turns before the response, in the form that the chat template takes; [] without a template.
        text: The rendered text up to the beginning of the response, with a single placeholder for each image.
        ids: Token ids of ``text``.
        tools: The tools of the conversation.
    """

    messages: list[dict[str, Any]]
    text: str
    ids: list[int]
    tools: Tools = ()


class EncodedResponse(NamedTuple):
    """The token ids that follow a prompt.

    Attributes:
        ids: Token ids of the response, up to and including the token that ends the turn.
        is_target: For each token, whether the assistant writes it. Tokens of other turns within the response are
            False.
        is_split: Whether the response was tokenized separately from the prompt. This happens if the tokenizer would
            merge the end of the prompt with the beginning of the response.
    """

    ids: list[int]
    is_target: list[bool]
    is_split: bool


class ChatEncoder:
    """Turns conversations and responses into token ids, and token ids into responses. Instances can be pickled.

    The ids of a prompt are those of ``apply_chat_template(..., add_generation_prompt=True, tokenize=True)``, but each
    image or video is a single placeholder. The ids of a response are the next ids of the whole conversation. They end
    with the token that ends the turn.

    The encoder deviates from the template in five cases:

    - If the template ignores ``add_generation_prompt``, the encoder adds the header of a response to the prompt,
      without trailing spaces.
    - If the template writes no special token after a response, the encoder puts ``eos_token`` there, in place of any
      white space.
    - Some generation prompts open a block such as ``<think>``. If a response closes this block without opening it, the
      encoder puts the opening tag before the response.
    - If the tokenizer merges the end of the prompt with the beginning of the response, the encoder tokenizes the
      response separately.
    - If the tokenizer adds tokens at the end of every text, the encoder removes them.

    Args:
        processor: The model's processor, or the tokenizer of a text model.
        chat_template: Chat template to use instead of the processor's template. Without any template, a prompt is the
            question and a line break.
        chat_template_kwargs: Variables for the template, such as ``{"enable_thinking": False}``.
        date: Date for templates that write the current date; None: today.
        stop_ids: Ids at which the model stops, from its ``generation_config``.
        embedding_rows: Number of rows of the model's input embedding. An id without a row is an error. None: no check.

    Attributes:
        end_id: Id of the token that ends an assistant's turn in training.
        stop_ids: Ids at which sampling stops: the argument ``stop_ids``, ``end_id`` and the tokenizer's EOS id.
        notices: Messages to the user that concern all conversations, for example about a deviation.
        form: The text that the template writes around a response.
        ends_in_tail: How often the template writes ``end_id`` after a response; 0: never.

    Raises:
        ChatError: If the chat template cannot be used. For example, the template does not write responses, a
            conversation does not begin with its prompt, or the token that ends a turn is unknown.
        TypeError, ValueError: If ``check_variables`` rejects ``chat_template_kwargs``.
    """

    def __init__(
        self,
        processor: Any,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
        stop_ids: Iterable[int] = (),
        embedding_rows: int | None = None,
    ) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.is_multimodal = processor is not self.tokenizer
        self.chat_template = find_chat_template(processor, chat_template)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        check_variables(self.chat_template_kwargs)
        self.date = date or datetime.date.today()
        self.embedding_rows = embedding_rows
        self.notices: tuple[str, ...] = ()
        self._special_ids = special_ids(self.tokenizer)
        self._prefix_ids, self._suffix_ids = _added_tokens(self.tokenizer)
        self._last: tuple[Conversation, EncodedPrompt] | None = None
        self.form = TurnForm()
        if self.chat_template is not None:
            template = freeze_date(self.chat_template, self.date)
            if template != self.chat_template:
                self._say(f"the chat template writes the date: frozen at {self.date}")
            self._renderer = Renderer(processor, template, self.chat_template_kwargs)
            self.form, notice = find_form(self._renderer)
            self._say(notice)
        else:
            self._say("the processor has none: a prompt is the question and a line break, without roles")
        self._say(unused_notice(self.chat_template, self.chat_template_kwargs))
        self.end_id, self.ends_in_tail = find_end(self.form, self.tokenizer)
        if self.chat_template is not None and not self.ends_in_tail:
            self._say(f"the chat template writes no end of turn: {self.tokenizer.eos_token!r} ends each response")
        self.stop_ids = frozenset({*stop_ids, self.end_id, self.tokenizer.eos_token_id} - {None})
        self._check_probe()
        surplus = len(self.tokenizer) - (embedding_rows or len(self.tokenizer))
        if surplus > 0:
            self._say(f"{surplus} token(s) of the tokenizer have no row in the embedding: texts with them are refused")

    def prompt(self, conversation: Conversation) -> EncodedPrompt:
        """Returns the prompt of a conversation.

        Images are not opened. Videos are opened only if ``media.expanded`` needs their frames.

        Raises:
            ChatError: If the conversation does not fit the chat template, or an id has no row in the embedding.
        """
        if self._last is not None and self._last[0] is conversation:
            return self._last[1]
        try:
            if self.chat_template is None:
                messages = []
                text = _plain_prompt(
                    expanded(conversation, self.processor), getattr(self.processor, "image_token", IMAGE_PLACEHOLDER)
                )
            else:
                messages = chat_messages(expanded(conversation, self.processor), as_parts=self.is_multimodal)
                text = self._prompt_text(messages, conversation.tools)
                check_turns(messages, text)
                check_tools(conversation.tools, text)
        except ChatError:
            raise
        except ValueError as error:
            raise ChatError(str(error)) from error
        prompt = EncodedPrompt(messages, text, self._encode(text), conversation.tools)
        if not (conversation.images or conversation.videos):  # the processor replaces the tokens of media
            self.check_ids(prompt.ids)
        self._last = (conversation, prompt)
        return prompt

    def prompt_text(self, conversation: Conversation) -> str:
        """Returns the text of a conversation up to the beginning of the assistant's response."""
        return self.prompt(conversation).text

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Returns the token ids of a prompt. A single placeholder stands for each image."""
        return self.prompt(conversation).ids

    def adds_special_tokens(self, text: str) -> bool:
        """Returns whether the tokenizer may add its special tokens, such as BOS, to the text of a prompt."""
        if self.chat_template is not None and not self.is_multimodal:
            return False
        begin = getattr(self.tokenizer, "bos_token", None)
        return not (begin and text.startswith(begin))

    @property
    def added_suffix(self) -> int:
        """Number of tokens, such as EOS, that the tokenizer adds to the end of each text. Prompts must omit them."""
        return len(self._suffix_ids)

    def processor_ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Returns the token ids of ``apply_chat_template(..., tokenize=True)`` for messages with images and videos.

        ``options`` are the keyword arguments of ``Renderer.ids``.
        """
        return self._renderer.ids(messages, **options)

    def response_ids(self, conversation: Conversation, response: str) -> list[int]:
        """Returns the token ids of a response, up to and including the token that ends the turn."""
        return self.response(conversation, response).ids

    def response(self, conversation: Conversation, response: str | Sequence[Mapping[str, Any]]) -> EncodedResponse:
        """Returns the token ids that follow a conversation's prompt.

        Args:
            conversation: The turns before the response.
            response: The assistant's text, or several turns that begin and end with the assistant's.

        Raises:
            ChatError: If the template does not write the response after the prompt, or an id has no row in the
                embedding. Also raised if the response holds the token that ends the turn.
        """
        prompt = self.prompt(conversation)
        encoded = self._single(prompt, response) if isinstance(response, str) else self._several(prompt, response)
        self.check_ids(encoded.ids)
        return encoded

    def response_text(self, conversation: Conversation, ids: Sequence[int]) -> str:
        """Returns the text of a response from its token ids, without the white space that the template adds.

        ``ids`` are the token ids between the prompt and the token that ends the turn. The text keeps special tokens,
        because some models write bounding boxes with them.
        """
        ids, prompt = list(ids), self.prompt(conversation)
        texts = possible_texts(self.decode, self._special_ids, prompt.ids[-_CONTEXT:], ids)
        lead = self.form.lead if not self.form.lead.strip() else ""
        if not self.decode(prompt.ids[-_CONTEXT:]).endswith(prompt.text[-1:]):  # white space at the end was dropped
            lead = prompt.text[len(prompt.text.rstrip()) :] + lead
        closing = self.form.tail.partition(self.decode([self.end_id]))[0] if self.ends_in_tail else ""
        texts = list(dict.fromkeys(text.removeprefix(lead).removesuffix(closing) for text in texts))

        def score(text: str) -> tuple[int, bool]:
            try:
                encoded = self.response_ids(conversation, text)[:-1]
            except ChatError:
                return -1, False
            return common_length(encoded, ids), encoded == ids

        return texts[0] if len(texts) == 1 else max(texts, key=score)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, including special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises ``ChatError`` if an id has no row in the model's embedding."""
        if self.embedding_rows is not None and ids and (largest := max(ids)) >= self.embedding_rows:
            raise ChatError(
                f"token ids must be below the {self.embedding_rows} rows of the model's embedding, got {largest} "
                f"({self.tokenizer.convert_ids_to_tokens(largest)!r}): the tokenizer does not belong to this model"
            )

    def _say(self, notice: str | None) -> None:
        self.notices = (*self.notices, notice) if notice else self.notices

    def _prompt_text(self, messages: list[dict[str, Any]], tools: Tools) -> str:
        if not self.form.ignores_generation_prompt:
            return self._renderer.render(messages, generation_prompt=True, tools=tools)
        probe = self._renderer.turn("assistant", PROBE)
        whole = self._renderer.render([*messages, probe], generation_prompt=False, tools=tools)
        return whole.rpartition(PROBE)[0].rstrip(" ")

    def _check_probe(self) -> None:
        """Adds a notice if a test prompt has two BOS, or the tokenizer merges the prompt's end with the response."""
        if self.form.opened:
            return
        conversation = Conversation(question="question")
        if self.response(conversation, PROBE).is_split:
            end = self.prompt_text(conversation)[-20:]
            self._say(f"the tokenizer merges the end of the prompt, {end!r}, with the response: tokenized apart")
        begin, prompt = self.tokenizer.bos_token_id, self.prompt(conversation)
        added = self._prefix_ids if self.adds_special_tokens(prompt.text) else ()
        if begin in added and begin in prompt.ids[len(added) :]:
            self._say(
                f"prompts have {self.tokenizer.bos_token!r} twice: the template writes it, and the processor adds it"
            )

    def _encode(self, text: str) -> list[int]:
        """Returns the token ids of a conversation's text, with the special tokens that the processor prepends."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))
        return [*self._prefix_ids, *ids] if self.adds_special_tokens(text) else ids

    def _single(self, prompt: EncodedPrompt, response: str) -> EncodedResponse:
        whole = self._whole_text(prompt, response)
        rest = whole[len(prompt.text) :]
        if self.ends_in_tail == 0:
            rest = rest.removesuffix(self.form.tail) if self.chat_template is not None else rest
        ids, is_split = self._continue(prompt, rest)
        if self.ends_in_tail == 0:
            ids = [*ids, self.end_id]
        _check_single_end(self, ids, response)
        ids = ids[: ids.index(self.end_id) + 1]
        return EncodedResponse(ids, [True] * len(ids), is_split)

    def _whole_text(self, prompt: EncodedPrompt, response: str) -> str:
        """Returns the text that the template writes for the conversation with the response."""
        if self.chat_template is None:
            return prompt.text + response
        for text in renderings(response, self.form.opened):
            whole = self._renderer.render(
                [*prompt.messages, self._renderer.turn("assistant", text)],
                generation_prompt=False,
                tools=prompt.tools,
            )
            if whole.startswith(prompt.text):
                check_written(text, prompt.text, whole)
                return whole
        raise ChatError(
            f"the prompt must be the beginning of the whole conversation, got {prompt.text[-40:]!r} where the "
            f"conversation with the response {response[:80]!r} has "
            f"{whole[common_length(whole, prompt.text) :][:80]!r}"
            + (f": the response must close the block {self.form.opened!r}" if self.form.opened else "")
        )

    def _several(self, prompt: EncodedPrompt, turns: Sequence[Mapping[str, Any]]) -> EncodedResponse:
        """Encodes a response of several turns. Only the tokens of the assistant's turns are targets."""
        if self.chat_template is None or self.ends_in_tail == 0:
            raise ChatError(f"a response of {len(turns)} turns must have a chat template that ends turns, got none")
        parts = response_turns(turns, self.tokenizer, self.end_id)
        if not self.is_multimodal:
            parts = [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in parts]
        messages = [*prompt.messages, *parts]
        whole = self._renderer.render(messages, generation_prompt=False, tools=prompt.tools)
        ids = self._encode(whole)
        is_target, end = [False] * len(ids), len(ids)
        for number, part in enumerate(parts):
            if part["role"] != "assistant":
                check_response_turn(part, prompt.text, whole)
                continue
            text = self._prompt_text(messages[: len(prompt.messages) + number], prompt.tools)
            start = self._encode(text)
            if not whole.startswith(text) or ids[: len(start)] != start:
                raise ChatError(
                    f"the chat template must keep earlier turns as they are, got {text[-80:]!r} before turn "
                    f"{number + 1} of the response and other text in the whole conversation"
                )
            check_response_turn(part, text, whole)
            until = self._renderer.before(messages, len(prompt.messages) + number + 1, prompt.tools)
            _check_turn_end(self, self._encode(until)[len(start) :], number + 1)
            end = ids.index(self.end_id, len(start)) + 1
            is_target[len(start) : end] = [True] * (end - len(start))
        return EncodedResponse(ids[len(prompt.ids) : end], is_target[len(prompt.ids) : end], False)

    def _continue(self, prompt: EncodedPrompt, rest: str) -> tuple[list[int], bool]:
        """Returns (ids, is_apart): the ids of ``rest``, and whether ``rest`` was tokenized apart from the prompt."""
        whole = self._encode(prompt.text + rest)
        size = len(prompt.ids)
        if whole[:size] == prompt.ids:
            return whole[size:], False
        ids = _tokenize_apart(self.tokenizer, self.decode, prompt.ids[-_CONTEXT:], rest)
        if ids is None:
            raise ChatError(
                f"the tokenizer must be able to continue the prompt's end {prompt.text[-40:]!r} with {rest[:80]!r}, "
                "got other text from its tokens"
            )
        return ids, True


def with_date(chat: ChatEncoder, date: datetime.date) -> ChatEncoder:
    """Returns a copy of the encoder with another date."""
    return with_template(chat, chat.chat_template, date=date)


def with_template(chat: ChatEncoder, chat_template: str | None, *, date: datetime.date | None = None) -> ChatEncoder:
    """Returns a copy of the encoder with another chat template. ``date`` replaces the encoder's date, if given."""
    date = date or chat.date
    return ChatEncoder(
        chat.processor,
        chat_template=chat_template,
        chat_template_kwargs=chat.chat_template_kwargs,
        date=date,
        stop_ids=chat.stop_ids,
        embedding_rows=chat.embedding_rows,
    )


def stop_ids_of(model: Any) -> list[int]:
    """Returns the ids at which a model stops: ``eos_token_id`` of its ``generation_config``."""
    return as_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def as_ids(ids: int | Iterable[int] | None) -> list[int]:
    """Converts a setting such as ``eos_token_id`` to a list of ids. The setting is an id, several ids or None."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def embedding_rows_of(model: Any) -> int | None:
    """Returns the number of rows of a model's input embedding; None if the model has none."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return getattr(embedding, "num_embeddings", None)


def _plain_prompt(conversation: Conversation, image: str) -> str:
    """Returns the prompt for a model without a chat template. ``image`` is the model's image token as text."""
    if conversation.tools:
        raise ChatError("a conversation with tools must have a chat template, got none")
    if conversation.messages:
        raise ChatError(f"a conversation of {len(conversation.messages)} messages must have a chat template, got none")
    if conversation.videos:
        raise ChatError(f"a conversation with {len(conversation.videos)} videos must have a chat template, got none")
    missing = max(0, len(conversation.images) - conversation.question.count(IMAGE_PLACEHOLDER))
    return f"{image * missing}{conversation.question.replace(IMAGE_PLACEHOLDER, image)}\n"


def _check_single_end(chat: ChatEncoder, ids: Sequence[int], response: str) -> None:
    if list(ids).count(chat.end_id) != max(1, chat.ends_in_tail):
        token = chat.tokenizer.convert_ids_to_tokens(chat.end_id)
        raise ChatError(f"a response must not hold an end of the turn, got {token!r} in {response[:80]!r}")


def _check_turn_end(chat: ChatEncoder, ids: Sequence[int], number: int) -> None:
    """Raises ``ChatError`` if turn ``number`` of a response does not end. ``ids`` reach to the next turn's content."""
    if chat.end_id not in ids:
        raise ChatError(
            f"the chat template must end turn {number} of the response with {chat.decode([chat.end_id])!r}, got "
            f"{chat.decode(ids)[-80:]!r}"
        )


def _tokenize_apart(
    tokenizer: Any, decode: Callable[[Sequence[int]], str], context: list[int], text: str
) -> list[int] | None:
    """Returns token ids of ``text`` that can follow the ids ``context``. Returns None if no such ids are found.

    The joined ids decode to the text of ``context`` followed by ``text``.
    """
    expected = unicodedata.normalize("NFC", decode(context) + text)
    # SentencePiece prepends a space to a text, but not after an anchor such as a line break.
    for anchor in _ANCHORS:
        begin = list(tokenizer.encode(anchor, add_special_tokens=False)) if anchor else []
        ids = list(tokenizer.encode(anchor + text, add_special_tokens=False, verbose=False))
        rest = ids[len(begin) :]
        if ids[: len(begin)] == begin and unicodedata.normalize("NFC", decode([*context, *rest])) == expected:
            return rest
    return None


def _added_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns two tuples: the ids that the tokenizer adds at the beginning of each text, and at the end."""
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    ids = list(tokenizer.encode("a"))
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            return tuple(ids[:start]), tuple(ids[start + len(plain) :])
    return (), ()
