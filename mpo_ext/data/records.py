"""The preference pair: the one record that every reader yields and every writer takes."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from mpo_ext.checks import check_json, check_text, type_and_value

# Where `Pair.extra` keeps how the source wrote the pair; every other key is a field of the source.
SOURCE = "$source"
_URL = re.compile(r"(?:^|/)((?:(?:https?|ftp|s3|gs|hf)://|data:image/).+)", re.IGNORECASE | re.DOTALL)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A question with a response to prefer and one to avoid.

    Attributes:
        question: The whole prompt as the model sees it, with an ``<image>`` where each image belongs. A single image
            needs none: it then comes first.
        chosen: The response to prefer.
        rejected: The response to avoid.
        images: Paths of the images, in order.
        answer_gt: The true answer, None where there is none.
        provenance: How the pair was made, any JSON: pipeline, model, sampling settings, seed, verdicts. The page of
            ``mpo-ext data view`` reads ``pipeline`` and ``cut``, the number of characters of ``chosen`` that a
            DropoutNTP continuation kept; ``cut`` may also be ``{"characters": 17, "tokens": 4}``.
        extra: Fields of the source that the record does not know, and under ``"$source"`` what a faithful way back
            needs: the subset, its settings, how ``image`` was written.

    Raises:
        TypeError: If a field has another type. The message names the field, the rule and the value.
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
        for index, image in enumerate(self.images):
            if not isinstance(image, str):
                raise TypeError(f"images[{index}] must be a str, got {type_and_value(image)}")
            if not image or "\0" in image:
                raise ValueError(f"images[{index}] must be a path, got {type_and_value(image)}")
            check_text(f"images[{index}]", image)
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
        """How the source wrote the pair; empty for a pair that was made here."""
        return self.extra.get(SOURCE, {})

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as JSON has it. The dicts are shared with the record, not copied."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "images": list(self.images)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Pair":
        """Builds the record from parsed JSON.

        Args:
            values: ``question``, ``chosen`` and ``rejected``, and any of the other fields. An ``answer_gt`` that is a
                number becomes its text.

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
        """Returns a hash of question, responses and images: the same in every run and on every machine."""
        text = json.dumps([self.question, self.chosen, self.rejected, *self.images], ensure_ascii=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def find_url(path: str) -> str | None:
    """The URL that stands where the path of an image belongs, with or without a root before it; None in a path."""
    found = _URL.search(path)
    return None if found is None else found.group(1)
