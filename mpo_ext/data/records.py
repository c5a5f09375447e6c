"""The class ``Pair``, a preference pair, which all readers return and all writers take."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from mpo_ext.checks import check_json, check_text, type_and_value
from mpo_ext.videos import Video

# Key of `Pair.extra` under which a reader stores how its source wrote the pair; all other keys are unknown fields.
SOURCE = "$source"
# Keys of `Pair.source` for the turns of a prompt or response that has more than one turn.
PROMPT_TURNS, CHOSEN_TURNS, REJECTED_TURNS = "messages", "chosen_messages", "rejected_messages"
TURNS = (PROMPT_TURNS, CHOSEN_TURNS, REJECTED_TURNS)
PROMPT_TOOLS = "tools"  # key of `Pair.source` for the functions that the assistant may call
_OPTIONAL = ("videos", "rejected_images")  # fields that ``to_dict`` leaves out if they are empty
_ENCODER = json.JSONEncoder(ensure_ascii=True, sort_keys=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A question with a chosen and a rejected response.

    Attributes:
        question: Prompt as the model sees it, with ``<image>`` at the position of each image. If a prompt with one
            image has no ``<image>``, the image comes before the text. If the prompt has several turns, ``question`` is
            only the last user turn; see ``extra``.
        chosen: The preferred response.
        rejected: The response to avoid.
        images: Paths of the images, in order.
        answer_gt: The true answer; None: the answer is unknown.
        provenance: Origin of the pair as any JSON object, such as pipeline, model, sampling settings, seed and
            verdicts. ``mpo-ext data view`` uses ``pipeline`` and ``cut``. ``cut`` is the number of characters of
            ``chosen`` that DropoutNTP kept, such as 17 or ``{"characters": 17, "tokens": 4}``.
        extra: Unknown fields of the source. ``extra["$source"]`` is a dict for a lossless conversion back to the
            source's format. For a pair from MMPR, this dict holds the name of the data set, for example.
            ``extra["$source"]`` also holds prompts and responses with several turns or tool calls, as lists of turns.
            The keys are ``messages`` (the prompt), ``chosen_messages`` and ``rejected_messages``. A turn is
            ``{"role": ..., "content": ...}``. An assistant's turn may have ``tool_calls``. A turn with the role "tool"
            holds the result of a tool call. If ``chosen_messages`` is stored, ``chosen`` is one text with the contents
            and tool calls of all these turns. The same holds for ``rejected``. The key ``tools`` describes the
            functions that the assistant may call, as in ``mpo_ext.chat.Conversation``.
        videos: Videos, in order. ``question`` and the turns have ``<video>`` at the position of each video. A single
            video without ``<video>`` comes before the text. A single image without ``<image>`` precedes this video.
        rejected_images: Images of the rejected response, as in mDPO: one path for each of ``images``. Empty: the
            rejected response has the same images.

    Raises:
        TypeError: If a field has a wrong type. The message names the field, the rule and the value.
        ValueError: If a text cannot be written as UTF-8, a number is not finite, a path is empty or has a NUL
            character, or the number of ``rejected_images`` is wrong.
    """

    question: str
    chosen: str
    rejected: str
    images: tuple[str, ...] = ()
    answer_gt: str | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    videos: tuple[Video, ...] = ()
    rejected_images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("question", "chosen", "rejected"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a str, got {type_and_value(value)}")
            check_text(name, value)
        _check_images("images", self.images)
        if self.rejected_images != ():
            _check_images("rejected_images", self.rejected_images)
        if self.rejected_images and len(self.rejected_images) != len(self.images):
            raise ValueError(
                f"rejected_images must be one for each of the {len(self.images)} images, got "
                f"{len(self.rejected_images)}"
            )
        if self.videos != ():
            _check_videos(self.videos)
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
        """Data for restoring the original format of the pair: ``extra["$source"]``, or an empty dict."""
        return self.extra.get(SOURCE, {})

    @property
    def has_equal_responses(self) -> bool:
        """True if the pair states no preference: both responses and their images are equal.

        Pairs of mDPO may have equal responses with different images. Such a pair states a preference: the response is
        right for ``images`` and wrong for ``rejected_images``.
        """
        if self.chosen != self.rejected:
            return False
        turns = [self.source.get(name) for name in (CHOSEN_TURNS, REJECTED_TURNS)]
        return turns[0] == turns[1] and not self.has_other_images

    @property
    def has_other_images(self) -> bool:
        """True if the images of the rejected response differ from those of the chosen response."""
        return bool(self.rejected_images) and self.rejected_images != self.images

    @property
    def media_paths(self) -> tuple[str, ...]:
        """Paths of all media files of the pair: images, rejected images, video files and video frames."""
        if not self.rejected_images and not self.videos:
            return self.images
        return (*self.images, *self.rejected_images, *(path for video in self.videos for path in video.paths))

    def map_paths(self, change: Callable[[str], str]) -> "Pair":
        """Returns a copy of the pair in which ``change`` is applied to each of ``media_paths``.

        The copy shares the values of all other fields with the pair.

        Raises:
            TypeError: If a changed path is not a str.
            ValueError: If a changed path is empty, has a NUL character, or cannot be written as UTF-8.
        """
        if self.rejected_images or self.videos:
            images, rejected = tuple(map(change, self.images)), tuple(map(change, self.rejected_images))
            videos = tuple(video.map_paths(change) for video in self.videos)
            return dataclasses.replace(self, images=images, rejected_images=rejected, videos=videos)
        images = tuple(map(change, self.images))
        _check_images("images", images)
        pair = object.__new__(Pair)  # the other fields are checked already
        for field in _FIELDS:
            object.__setattr__(pair, field, images if field == "images" else getattr(self, field))
        return pair

    def to_dict(self) -> dict[str, Any]:
        """Returns the pair as a dict that can be written as JSON.

        Empty ``videos`` and ``rejected_images`` are left out. The dict holds the same ``provenance`` and ``extra``
        objects as the pair, not copies.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"images": list(self.images), "videos": [video.to_value() for video in self.videos]}
        values["rejected_images"] = list(self.rejected_images)
        return {name: value for name, value in values.items() if value or name not in _OPTIONAL}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Pair":
        """Builds a pair from parsed JSON.

        Args:
            values: ``question``, ``chosen``, ``rejected`` and any of the other fields. A number in ``answer_gt``
                becomes text.

        Raises:
            TypeError: If a field has the wrong type.
            ValueError: If a field is missing, unknown or invalid.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a pair must be an object, got {type_and_value(values)}")
        for name in values:
            if name not in _FIELDS:
                raise ValueError(f"unknown field {name!r}; known fields: {', '.join(_FIELDS)}")
        for name in ("question", "chosen", "rejected"):
            if name not in values:
                raise ValueError(
                    f"{name} must be given, got an object with {', '.join(map(repr, values)) or 'nothing'}"
                )
        answer = values.get("answer_gt")
        if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
            values = {**values, "answer_gt": str(answer)}
        lists: dict[str, Any] = {name: values[name] for name in ("images", *_OPTIONAL) if name in values}
        for name, value in lists.items():
            if not isinstance(value, (list, tuple)):
                content = "videos" if name == "videos" else "paths"
                raise TypeError(f"{name} must be a list of {content}, got {type_and_value(value)}")
            is_video = name == "videos"
            lists[name] = tuple(
                Video.from_value(part, f"videos[{index}]") if is_video else part for index, part in enumerate(value)
            )
        return cls(**{**values, **lists})

    def key(self) -> str:
        """Returns a hash of the prompt, the responses and the media paths. The hash is the same on every machine."""
        source = self.source
        turns = {name: source[name] for name in (*TURNS, PROMPT_TOOLS) if name in source}
        parts = [self.question, self.chosen, self.rejected, *self.images, *([turns] if turns else [])]
        if self.videos or self.rejected_images:
            parts.append({"videos": [video.to_value() for video in self.videos], "rejected": self.rejected_images})
        text = _ENCODER.encode(parts)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_FIELDS = tuple(field.name for field in dataclasses.fields(Pair))


def _check_videos(videos: object) -> None:
    if not isinstance(videos, tuple) or not all(isinstance(video, Video) for video in videos):
        raise TypeError(f"videos must be a tuple of Video, got {type_and_value(videos)}")
    for index, video in enumerate(videos):
        for path in video.paths:
            check_text(f"videos[{index}]", path)


def _check_images(name: str, images: object) -> None:
    if not isinstance(images, tuple):
        raise TypeError(f"{name} must be a tuple of paths, got {type_and_value(images)}")
    for index, image in enumerate(images):
        if not isinstance(image, str):
            raise TypeError(f"{name}[{index}] must be a str, got {type_and_value(image)}")
        if not image or "\0" in image:
            raise ValueError(f"{name}[{index}] must be a path, got {type_and_value(image)}")
        check_text(f"{name}[{index}]", image)
