"""The preference pair, which all readers return and all writers take."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from mpo_ext.checks import check_json, check_text, type_and_value

# Key of `Pair.extra` under which a reader stores how its source wrote the pair; all other keys are unknown fields.
SOURCE = "$source"
# Keys of `Pair.source` for the turns of a prompt or response that has more than one turn.
PROMPT_TURNS, CHOSEN_TURNS, REJECTED_TURNS = "messages", "chosen_messages", "rejected_messages"
TURNS = (PROMPT_TURNS, CHOSEN_TURNS, REJECTED_TURNS)
_ENCODER = json.JSONEncoder(ensure_ascii=True, sort_keys=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A question with a chosen and a rejected response.

    Attributes:
        question: Whole prompt as the model sees it, with ``<image>`` at the position of each image. If a prompt with
            one image has no ``<image>``, the image comes first.
        chosen: The preferred response.
        rejected: The response to avoid.
        images: Paths of the images, in order.
        answer_gt: The true answer; None: the answer is unknown.
        provenance: Origin of the pair as any JSON object: pipeline, model, sampling settings, seed, verdicts.
            ``mpo-ext data view`` reads ``pipeline`` and ``cut``, the number of characters of ``chosen`` that
            DropoutNTP kept; ``cut`` may also be ``{"characters": 17, "tokens": 4}``.
        extra: Unknown fields of the source. The key ``"$source"`` holds the values that a lossless conversion back to
            the source's format needs, such as the subset, its settings and the form of ``image``. It also holds the
            turns ``{"role": ..., "content": ...}`` of a prompt or response of several turns. The turns of a prompt
            are in ``messages``; ``question`` is then only the last user turn. The turns of responses are in
            ``chosen_messages`` and ``rejected_messages``; ``chosen`` and ``rejected`` then join their contents. The
            content of a turn has ``<image>`` at the place of each image.

    Raises:
        TypeError: If a field has a wrong type. The message names the field, the rule and the value.
        ValueError: If a text cannot be written as UTF-8 or a number is not finite.
    """

    question: str
    chosen: str
    rejected: str
    images: tuple[str, ...] = ()
    answer_gt: str | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("question", "chosen", "rejected"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a str, got {type_and_value(value)}")
            check_text(name, value)
        if not isinstance(self.images, tuple):
            raise TypeError(f"images must be a tuple of paths, got {type_and_value(self.images)}")
        _check_paths(self.images)
        if self.answer_gt is not None:
            if not isinstance(self.answer_gt, str):
                raise TypeError(f"answer_gt must be a str or None, got {type_and_value(self.answer_gt)}")
            check_text("answer_gt", self.answer_gt)
        for name in ("provenance", "extra"):
            value = getattr(self, name)
            if not isinstance(value, dict):
                raise TypeError(f"{name} must be a dict, got {type_and_value(value)}")
            check_json(name, value)
        if not isinstance(self.extra.get(SOURCE, {}), dict):
            raise TypeError(f"extra.{SOURCE} must be a dict, got {type_and_value(self.extra[SOURCE])}")

    @property
    def source(self) -> dict[str, Any]:
        """The value of ``extra["$source"]``; empty if no reader set it."""
        return self.extra.get(SOURCE, {})

    def with_images(self, images: tuple[str, ...]) -> "Pair":
        """Returns the pair with other image paths; the other fields, which are checked already, are shared.

        Raises:
            TypeError: If a path is not a str.
            ValueError: If a path is empty, has a NUL character, or cannot be written as UTF-8.
        """
        _check_paths(images)
        pair = object.__new__(Pair)
        for name in ("question", "chosen", "rejected", "answer_gt", "provenance", "extra"):
            object.__setattr__(pair, name, getattr(self, name))
        object.__setattr__(pair, "images", images)
        return pair

    def to_dict(self) -> dict[str, Any]:
        """Returns the pair as a dict for JSON; ``provenance`` and ``extra`` are shared, not copied."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "images": list(self.images)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Pair":
        """Returns the pair that parsed JSON describes.

        Args:
            values: ``question``, ``chosen``, ``rejected`` and any of the other fields. A number ``answer_gt`` becomes
                text.

        Raises:
            TypeError: If a field has the wrong type.
            ValueError: If a field is missing or unknown.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a pair must be an object, got {type_and_value(values)}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown field {name!r}; known fields: {', '.join(known)}")
        for name in ("question", "chosen", "rejected"):
            if name not in values:
                raise ValueError(
                    f"{name} must be given, got an object with {', '.join(map(repr, values)) or 'nothing'}"
                )
        answer = values.get("answer_gt")
        if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
            values = {**values, "answer_gt": str(answer)}
        images = values.get("images", [])
        if not isinstance(images, (list, tuple)):
            raise TypeError(f"images must be a list of paths, got {type_and_value(images)}")
        return cls(**{**values, "images": tuple(images)})

    def key(self) -> str:
        """Returns a hash of the prompt, the responses and the image paths; it is the same in every run everywhere."""
        turns = {name: self.source[name] for name in TURNS if name in self.source}
        parts = [self.question, self.chosen, self.rejected, *self.images, *([turns] if turns else [])]
        text = _ENCODER.encode(parts)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_paths(images: tuple[str, ...]) -> None:
    for index, image in enumerate(images):
        if not isinstance(image, str):
            raise TypeError(f"images[{index}] must be a str, got {type_and_value(image)}")
        if not image or "\0" in image:
            raise ValueError(f"images[{index}] must be a path, got {type_and_value(image)}")
        check_text(f"images[{index}]", image)
