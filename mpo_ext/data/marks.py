"""Checks the image placeholders in prompts, and replaces numbered placeholders such as ``<image 1>`` by ``<image>``.

Placeholders of other programs, such as ``<|image_pad|>``, are errors. HTML such as ``<img src="a.png">`` is ordinary
text.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER
from mpo_ext.checks import shorten
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import PROMPT_TURNS, SOURCE, Pair

#: Kinds of bad lines.
NO_IMAGE, IMAGE_MARK = "no image", "image mark"

#: <image 1> (MMMU), <img1>, <image_1>, <image1> (MathVision), <image-1>, <|image_1|> (Phi-3-vision)
NUMBERED_MARK = re.compile(r"<(\|?)(?:image|img)[ _-]?([0-9]{1,3})\1>", re.IGNORECASE)
#: Image placeholders of other programs, which are not replaced.
FOREIGN_MARK = re.compile(
    r"<(?!image>)(?i:image)>"  # <Image>, <IMAGE>
    r"|<\|(?:image|image_pad|vision_start|image_start|begin_of_image|media_placeholder)\|>"
    r"|<(?:start_of_image|image_soft_token|image_placeholder|image_pad|ImageHere|IMG_CONTEXT)>"
    r"|<\|media_(?:begin|start|pad)\|>"  # Kimi-VL
    r"|<image>(?:\./)?</image>"  # MiniCPM-V
    r"|\[IMG\]"
    r"|<img>[^<>\n]*(?:\.\w{3,4}|://[^<>\s]+)\s*</img>"  # Qwen-VL, with the path or URL of the image
)


def has_mark(text: str) -> bool:
    """Returns whether a text has ``<image>`` or a numbered placeholder such as ``<image 1>``."""
    return IMAGE_PLACEHOLDER in text or NUMBERED_MARK.search(text) is not None


def check_marks(pair: Pair) -> Pair:
    """Checks the image placeholders in a prompt, and replaces numbered placeholders by ``<image>``.

    ``<image 2>`` stands for the second image. ``<image_2>``, ``<image2>`` and ``<|image_2|>`` mean the same. The
    images of the returned pair are in the order of these placeholders, and so are its rejected images. Responses are
    not changed.

    Raises:
        FieldError: In each of these cases:

            - The prompt has a placeholder of another program, such as ``<|image_pad|>``.
            - The numbered placeholders do not name each image exactly once.
            - The prompt has numbered placeholders, and also ``<image>`` or image parts of messages.
    """
    texts = [text for text in _texts(pair) if "<" in text or "[" in text]  # every mark has one of these characters
    if not texts:
        return pair
    numbers = [int(match[2]) for text in texts for match in NUMBERED_MARK.finditer(text)]
    for text in texts:
        mark = FOREIGN_MARK.search(text) or (None if pair.images else NUMBERED_MARK.search(text))
        if mark is None:
            continue
        if not pair.images:
            raise FieldError(
                f"question must hold no mark of an image without its image: {shorten(mark[0])} names an image, but "
                f"the pair has none, got {shorten(text)}",
                kind=NO_IMAGE,
            )
        raise FieldError(
            f"question must mark images by {IMAGE_PLACEHOLDER} or <image 1>, got {shorten(mark[0])} in "
            f"{shorten(text)}: replace it by {IMAGE_PLACEHOLDER}",
            kind=IMAGE_MARK,
        )
    if not numbers:
        return pair
    expected = list(range(1, len(pair.images) + 1))
    if sorted(numbers) != expected or any(IMAGE_PLACEHOLDER in text for text in texts):
        beside = f" beside {IMAGE_PLACEHOLDER}" if any(IMAGE_PLACEHOLDER in text for text in texts) else ""
        raise FieldError(
            f"question must hold each of the numbered marks <image 1> to <image {len(expected)}> once for its images, "
            f"and no {IMAGE_PLACEHOLDER}, got the numbers {shorten(numbers)}{beside}",
            kind=IMAGE_MARK,
        )
    return _replaced(pair, numbers)


def _replaced(pair: Pair, numbers: Sequence[int]) -> Pair:
    """Returns a copy of a pair with ``<image>`` in place of the numbered placeholders.

    ``numbers`` are the numbers in these placeholders, in the order of the prompt.
    """

    def place(text: str) -> str:
        return NUMBERED_MARK.sub(IMAGE_PLACEHOLDER, text)

    extra = pair.extra
    if isinstance(messages := pair.source.get(PROMPT_TURNS), list):
        turns = [_mapped(message, place) for message in messages]
        extra = {**extra, SOURCE: {**pair.source, PROMPT_TURNS: turns}}
    images, rejected_images = (
        tuple(paths[number - 1] for number in numbers) if paths else ()
        for paths in (pair.images, pair.rejected_images)
    )
    return dataclasses.replace(
        pair, question=place(pair.question), images=images, rejected_images=rejected_images, extra=extra
    )


def _mapped(message: Any, change: Callable[[str], str]) -> Any:
    """Returns a copy of a message in which ``change`` is applied to each text."""
    if not isinstance(message, Mapping):
        return message
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": change(content)}
    if not isinstance(content, list):
        return message
    parts = [
        {**part, "text": change(part["text"])}
        if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        else part
        for part in content
    ]
    return {**message, "content": parts}


def _texts(pair: Pair) -> list[str]:
    """Returns the texts of the prompt. Each message with image parts adds a text ``<image>``."""
    messages = pair.source.get(PROMPT_TURNS)
    if not isinstance(messages, list):
        return [pair.question]
    texts: list[str] = []
    for message in messages:
        _mapped(message, lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list) and any(isinstance(p, Mapping) and p.get("type") == "image" for p in content):
            texts.append(IMAGE_PLACEHOLDER)
    return texts
