"""From a question or a conversation to the prompt text, the same in training, sampling and evaluation."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

IMAGE_PLACEHOLDER = "<image>"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What comes before the assistant's turn.

    Attributes:
        key: Name of the conversation, for errors.
        question: The user's question; ``<image>`` marks the place of an image, images without a mark come first.
        messages: The turns as a chat template takes them, instead of ``question``; their images are in ``images``.
        images: PIL images or paths of images.
    """

    key: str = ""
    question: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    images: tuple[Any, ...] = ()


def load_image(image: Any) -> Any:
    """Opens an image where it is a path; as RGB, and wholly read."""
    if not isinstance(image, (str, os.PathLike)):
        return image
    from PIL import Image

    with Image.open(image) as opened:
        return opened.convert("RGB")


def chat_messages(conversation: Conversation, *, as_parts: bool) -> list[dict[str, Any]]:
    """The conversation of a conversation as chat templates take it.

    Args:
        request: The conversation.
        as_parts: Whether the content is a list of images and texts, as templates of multimodal models want it.
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
            piece = piece.removeprefix("\n")  # templates put one after an image themselves
        if piece:
            content.append({"type": "text", "text": piece})
    return [{"role": "user", "content": content}]


def find_chat_template(processor: Any, chat_template: str | None = None) -> str | None:
    """The template to take: the given one, else that of the processor, else that of its tokenizer; None without any.

    Where a processor has several by name it is the one called "default".
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    found = chat_template or getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    return found.get("default") if isinstance(found, Mapping) else found


def render_prompt(processor: Any, conversation: Conversation, chat_template: str | None) -> str:
    """The text of a conversation up to where the assistant's turn begins: the same in sampling and in training.

    Args:
        processor: A processor, or a tokenizer where the model takes text only.
        conversation: The conversation; its images are not opened.
        chat_template: From ``find_chat_template``. None puts the question on a line of its own.
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
    """Whether the tokenizer is to put its special tokens around a prompt: the template has not begun with one."""
    begin = getattr(tokenizer, "bos_token", None)
    return not (begin and prompt.startswith(begin))
