"""Token ids from transformers' ``apply_chat_template``, and their comparison with the ids of mpo_ext.

The expected ids come from transformers alone, without the encoder's code.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpo_ext.chat import ChatEncoder, Conversation

Turn = tuple[str, str | list[Any]]  # a role, and a text or a list of texts and images


def is_processor(processor: Any) -> bool:
    return hasattr(processor, "tokenizer")


def messages_of(processor: Any, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Returns turns as chat messages. A content is a list of parts for a processor, and a text for a tokenizer."""
    messages = []
    for role, content in turns:
        if not is_processor(processor):
            assert isinstance(content, str)
            messages.append({"role": role, "content": content})
            continue
        parts = [content] if isinstance(content, str) else content
        typed = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ]
        messages.append({"role": role, "content": typed})
    return messages


def template_ids(
    processor: Any, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False, **kwargs: Any
) -> list[int]:
    """Returns the ids of ``apply_chat_template(..., tokenize=True)``, including all image tokens of each image."""
    out = processor.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, add_generation_prompt=generation_prompt, **kwargs
    )
    ids = out["input_ids"]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return list(ids[0] if isinstance(ids[0], (list, tuple)) else ids)


def conversation_of(messages: Sequence[Mapping[str, Any]], images: Sequence[Any] = ()) -> Conversation:
    """Returns the messages as a Conversation. Image parts become placeholders; the images are in a separate field."""
    bare = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{"type": "image"} if part["type"] == "image" else part for part in content]
        bare.append({"role": message["role"], "content": content})
    return Conversation(messages=tuple(bare), images=tuple(images))


def compare(
    encoder: ChatEncoder,
    messages: Sequence[Mapping[str, Any]],
    response: Mapping[str, Any],
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    *,
    is_split: bool = False,
    adds_header: bool = False,
    suffix: int = 0,
    **kwargs: Any,
) -> None:
    """Asserts that the encoder's ids equal the ids of the chat template, up to the token that ends the turn.

    Args:
        encoder: The encoder that made the ids.
        messages: The turns before the response.
        response: The assistant's message.
        prompt_ids: The encoder's ids of the prompt.
        response_ids: The encoder's ids of the response.
        is_split: Whether the response was tokenized separately. If so, texts are compared instead of ids. The
            template's ids must then not begin with ``prompt_ids``; otherwise the separation was unnecessary.
        adds_header: Whether the encoder adds the assistant's header, because the template's generation prompt lacks
            it. The encoder's prompt may then be longer than the template's prompt.
        suffix: Number of special tokens that the tokenizer adds at the end of a text; they are not compared.
        **kwargs: Options of ``apply_chat_template``.
    """
    processor, tokenizer = encoder.processor, encoder.tokenizer

    def words(ids: Sequence[int]) -> list[str]:
        return tokenizer.convert_ids_to_tokens(list(ids))

    def plain(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    prompt = template_ids(processor, messages, generation_prompt=True, **kwargs)
    whole = template_ids(processor, [*messages, response], **kwargs)
    if suffix and _adds_special_tokens(processor, _text(processor, messages, kwargs)):
        prompt, whole = prompt[:-suffix], whole[:-suffix]
    ours = [*prompt_ids, *response_ids]
    if adds_header:  # the ids are compared with those of the whole conversation below
        assert plain(prompt_ids).startswith(plain(prompt).rstrip())
        assert plain(whole).startswith(plain(prompt_ids)) or is_split
    else:
        assert words(prompt_ids) == words(prompt)
    assert response_ids[-1] == encoder.end_id
    assert encoder.end_id not in response_ids[:-1]
    body = ours[:-1]
    if is_split:
        assert whole[: len(prompt_ids)] != list(prompt_ids)
        assert plain(whole).startswith(plain(body))
        rest = tokenizer.encode(plain(whole)[len(plain(body)) :], add_special_tokens=False)
    else:
        if encoder.end_id not in whole[len(prompt) :]:  # the white space at the end may have merged with the response
            trimmed = _without_white_end(processor, [*messages, response], suffix, kwargs)
            whole = next((ids for ids in trimmed if ids == body), whole)
        assert words(whole[: len(body)]) == words(body)
        rest = whole[len(body) :]
    if encoder.end_id in rest:  # the template writes the end of the turn, and nothing else before it
        assert rest[0] == encoder.end_id
        special = {*tokenizer.all_special_ids}
        rest = [token for token in rest[1:] if token not in special]
    else:
        assert encoder.end_id == tokenizer.eos_token_id
    assert not plain(rest).strip()


def _text(processor: Any, messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any]) -> str:
    return processor.apply_chat_template(list(messages), tokenize=False, **kwargs)


def _adds_special_tokens(processor: Any, text: str) -> bool:
    """Returns whether ``apply_chat_template`` adds special tokens to the text of a conversation.

    A processor's method adds them, unless the text already starts with BOS. A tokenizer's method never adds them.
    """
    begin = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
    return is_processor(processor) and not (begin and text.startswith(begin))


def _without_white_end(
    processor: Any, messages: Sequence[Mapping[str, Any]], suffix: int, kwargs: Mapping[str, Any]
) -> Iterator[list[int]]:
    """Yields the token ids of the conversation's text. Then removes the white space at the end of the text.

    After each removed character, yields the token ids of the shorter text.
    """
    text = _text(processor, messages, kwargs)
    tokenizer = getattr(processor, "tokenizer", processor)
    special = _adds_special_tokens(processor, text)
    while True:
        ids = list(tokenizer.encode(text, add_special_tokens=special))
        yield ids[: len(ids) - suffix] if special else ids
        if not text[-1:].isspace():
            return
        text = text[:-1]
