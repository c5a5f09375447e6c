"""Prepares the images and videos of conversations for a processor.

A processor without a video processor gets the frames of each video as images.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from mpo_ext.chat.conversation import Conversation, chat_messages
from mpo_ext.videos import LoadedVideo, load_video

AnyConversation = TypeVar("AnyConversation", bound=Conversation)


def takes_videos(processor: Any) -> bool:
    """Returns whether a processor has a video processor."""
    return callable(getattr(processor, "video_processor", None))


def expanded(conversation: AnyConversation, processor: Any) -> AnyConversation:
    """Returns the conversation in a form that its processor accepts.

    If the processor has no video processor, each video becomes a list of numbered images (``with_frames``).
    """
    if not conversation.videos or takes_videos(processor) or not hasattr(processor, "tokenizer"):
        return conversation
    return with_frames(conversation)


def with_frames(conversation: AnyConversation) -> AnyConversation:
    """Returns a conversation in which each video is replaced by images of its frames.

    The frames are numbered as in InternVL. The text of a frame is a line such as ``Frame1: <image>``.
    """
    if not conversation.videos:
        return conversation
    images, videos = iter(conversation.images), iter(conversation.videos)
    placed: list[Any] = []
    turns = []
    for turn in chat_messages(conversation, as_parts=True):
        content: list[dict[str, Any]] = []
        for part in turn["content"]:
            if part["type"] == "video":
                frames = load_video(next(videos)).frames
                placed += frames
                for number in range(1, len(frames) + 1):
                    content += [{"type": "text", "text": f"Frame{number}: "}, {"type": "image"}]
                    content.append({"type": "text", "text": "\n"})
                continue
            if part["type"] == "image":
                placed.append(next(images))
            content.append(part)
        turns.append({**turn, "content": content})
    return dataclasses.replace(conversation, messages=tuple(turns), images=tuple(placed), videos=())


def media_arguments(images: Sequence[Sequence[Any]], videos: Sequence[Sequence[LoadedVideo]]) -> dict[str, Any]:
    """Returns the arguments ``images``, ``videos`` and ``videos_kwargs`` for a processor's call with several texts.

    Each parameter holds a list for each text. Without images, ``images`` is left out. Without videos, ``videos`` and
    ``videos_kwargs`` are left out. ``videos_kwargs`` makes the processor use all frames, because ``load_video`` has
    already chosen the frames.
    """
    arguments: dict[str, Any] = {"images": [list(part) for part in images]} if any(images) else {}
    flat = [video for part in videos for video in part]
    if flat:
        arguments["videos"] = [video.pixels() for video in flat]
        arguments["videos_kwargs"] = {
            "do_sample_frames": False,
            "video_metadata": [video.metadata() for video in flat],
        }
    return arguments
