"""Renders questions and conversations as prompts, in the same way for training, sampling and evaluation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

IMAGE_PLACEHOLDER = "<image>"
_PROBE = "Qz7 probe 7zQ"  # a response that does not occur in any template


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The turns before the assistant's turn.

    Attributes:
        key: Name of the conversation in error messages.
        question: The user's question; ``<image>`` marks the place of an image. Without marks, the images come first.
        messages: Turns in the format of chat templates, used instead of ``question``; ``images`` holds their images.
        images: Images in any form that ``load_image`` takes.
    """

    key: str = ""
    question: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    images: tuple[Any, ...] = ()


def chat_messages(conversation: Conversation, *, as_parts: bool) -> list[dict[str, Any]]:
    """Returns a conversation as messages for a chat template.

    ``as_parts`` makes the content of a message a list of images and texts, the format of multimodal models.

    Raises:
        ValueError: If the number of ``<image>`` marks differs from the number of images.
    """
    if conversation.messages:
        return [dict(message) for message in conversation.messages]
    if not as_parts:
        return [{"role": "user", "content": conversation.question}]
    content: list[dict[str, Any]] = []
    pieces = conversation.question.split(IMAGE_PLACEHOLDER) if conversation.images else [conversation.question]
    if conversation.images and len(pieces) == 1:
        pieces = [""] * len(conversation.images) + pieces
    if conversation.images and len(pieces) - 1 != len(conversation.images):
        raise ValueError(
            f"question must have one {IMAGE_PLACEHOLDER} for each of the {len(conversation.images)} images, "
            f"got {len(pieces) - 1} in request {conversation.key!r}"
        )
    for number, piece in enumerate(pieces):
        if number > 0:
            content.append({"type": "image"})
            piece = piece.removeprefix("\n")  # chat templates add a newline after an image
        if piece:
            content.append({"type": "text", "text": piece})
    return [{"role": "user", "content": content}]


def find_chat_template(processor: Any, chat_template: str | None = None) -> str | None:
    """Returns ``chat_template``, or else the template of the processor or its tokenizer; None if no template exists.

    If the processor has several named templates, the template "default" is returned.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    template = chat_template or getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, Mapping) else template


def render_prompt(processor: Any, conversation: Conversation, chat_template: str | None) -> str:
    """Returns the text of a conversation up to the beginning of the assistant's turn.

    Args:
        processor: Processor, or the tokenizer of a text model.
        conversation: The conversation; its images are not opened.
        chat_template: Result of ``find_chat_template``. None: the prompt is the question and a newline.
    """
    if chat_template is None:
        image = getattr(processor, "image_token", IMAGE_PLACEHOLDER)
        missing = max(0, len(conversation.images) - conversation.question.count(IMAGE_PLACEHOLDER))
        return f"{image * missing}{conversation.question.replace(IMAGE_PLACEHOLDER, image)}\n"
    return processor.apply_chat_template(
        chat_messages(conversation, as_parts=hasattr(processor, "tokenizer")),
        chat_template=chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )


def lacks_special_tokens(tokenizer: Any, prompt: str) -> bool:
    """Returns whether the tokenizer must add special tokens to a prompt because the chat template added none."""
    begin = getattr(tokenizer, "bos_token", None)
    return not (begin and prompt.startswith(begin))


def end_of_turn_id(processor: Any, chat_template: str | None) -> int:
    """Returns the id of the token that ends an assistant's turn.

    This token is the first special token that the chat template writes after a response, or the tokenizer's end token
    if the template writes no special token. The arguments are those of ``render_prompt``.

    Raises:
        ValueError: If neither token exists, or if the template does not write the response.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    end: int | None = tokenizer.eos_token_id
    if chat_template is not None:
        texts = ["question", _PROBE]
        is_multimodal = processor is not tokenizer
        contents: list[Any] = [[{"type": "text", "text": text}] for text in texts] if is_multimodal else list(texts)
        turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), contents, strict=True)]
        text = processor.apply_chat_template(turns, chat_template=chat_template, tokenize=False)
        _, probe, rest = text.rpartition(_PROBE)
        if not probe:
            raise ValueError(f"chat_template must write the assistant's response, got {text[:200]!r}")
        special = {*tokenizer.all_special_ids, end}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special |= {token for token, content in added.items() if content.special}
        ids = tokenizer.encode(rest, add_special_tokens=False)
        end = next((token for token in ids if token in special), end)
    if end is None:
        raise ValueError("the end of a turn must be known: the chat template writes none, and eos_token is None")
    return end
