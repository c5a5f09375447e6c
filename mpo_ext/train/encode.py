"""Encodes a pair as a ``Sample``: token ids of the prompt and of both responses, and inputs of images and videos."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mpo_ext.chat import ChatEncoder, ChatError, Conversation, EncodedResponse
from mpo_ext.chat.media import expanded, media_arguments
from mpo_ext.checks import DefectError, check_integer, type_and_value
from mpo_ext.data.records import CHOSEN_TURNS, Pair
from mpo_ext.images import describe_source, load_image
from mpo_ext.videos import Video, describe_video, load_video

TOO_LONG = "longer than max_length"
NO_ROOM = "prompt leaves no room for a response"
EMPTY = "chosen is empty"
EQUAL = "chosen and rejected are equal"
EQUAL_CUT = "chosen and rejected are equal once cut"
BAD_PAIR = "bad pair"
# Tokens that represent or enclose media: names of attributes of tokenizers and processors, without "_token".
_MEDIA_TOKENS = ("image", "video", "audio", "boi", "eoi", "start_image", "end_image", "vision_start", "vision_end")
# Beginnings of the names of inputs per image or video, whose shape may equal that of the prompt by chance.
_PER_IMAGE = ("image_", "pixel_", "num_", "batch_", "video_", "second_")


class BadPairError(DefectError):
    """Raised for a pair that cannot be encoded.

    The message names the pair, the rule and the value, as in "a.jsonl:3: images must be none for a text model, got 2".
    """


class MissingImageError(BadPairError):
    """Raised for a pair with an image or video file that does not exist. The message names the path."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """An encoded pair.

    Attributes:
        key: Identifier of the pair, as returned by ``Pair.key()``.
        name: File and line number of the pair, for errors and warnings.
        prompt_key: Hash of the prompt; see the function ``prompt_key`` of this module.
        prompt_ids: ``[P]`` int64, the tokens before the response, image tokens included.
        chosen_ids: ``[C]`` int64, the chosen response and the token that ends the turn.
        rejected_ids: ``[R]`` int64, the rejected response and the token that ends the turn.
        token_inputs: Other per-token inputs of the prompt, ``[P]`` each, such as ``mm_token_type_ids``.
        image_inputs: The processor's outputs for the images and videos, such as ``pixel_values``. The first axis
            counts images, tiles, videos or patches; batches concatenate along this axis.
        digest: Hash of all token ids, targets, ``token_inputs`` and ``image_inputs``, including ``rejected_prompt``.
        is_cut: Whether a response was cut and lacks the token that ends the turn.
        is_split: Whether a response was tokenized separately from the prompt; see ``mpo_ext.chat.ChatEncoder``.
        chosen_targets: ``[C]`` bool, whether the loss scores each token of ``chosen_ids``. False for the user's turns
            in a response of several turns. None: all tokens are scored.
        rejected_targets: ``[R]`` bool or None, the same for ``rejected_ids``.
        rejected_prompt: The prompt with the images of the rejected response, as a sample with empty responses. None:
            both responses have the same images.
    """

    key: str
    name: str
    prompt_key: str
    prompt_ids: Tensor
    chosen_ids: Tensor
    rejected_ids: Tensor
    token_inputs: Mapping[str, Tensor]
    image_inputs: Mapping[str, Tensor]
    digest: str
    is_cut: bool = False
    is_split: bool = False
    chosen_targets: Tensor | None = None
    rejected_targets: Tensor | None = None
    rejected_prompt: "Sample | None" = None

    @property
    def n_chosen_targets(self) -> int:
        """Number of tokens in ``chosen_ids`` that the loss scores."""
        return len(self.chosen_ids) if self.chosen_targets is None else int(self.chosen_targets.sum())


@dataclasses.dataclass(frozen=True, slots=True)
class SkippedPair:
    """A valid pair that training does not use, for example because it is too long.

    Attributes:
        name: File and line number of the pair.
        reason: Why the pair is skipped: a constant of this module, such as ``TOO_LONG``.
        detail: Explanation for messages, such as the numbers of tokens.
    """

    name: str
    reason: str
    detail: str


def prompt_key(pair: Pair) -> str:
    """Returns a hash of the prompt: the question or conversation, its tools, and the paths of images and videos.

    Pairs with equal hashes have the same prompt tokens and media if the same ``Encoder`` encodes them.
    """
    parts = [pair.question, pair.source.get("messages"), *pair.images]
    if tools := pair.source.get("tools"):
        parts.append({"tools": tools})
    if pair.videos:
        parts.append({"videos": [video.to_value() for video in pair.videos]})
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Encoder:
    """Encodes pairs as samples. An encoder can be pickled for the workers of a DataLoader.

    ``mpo_ext.chat.ChatEncoder`` makes the token ids; sampling and evaluation use the same class. Each response ends
    with the token that ends the turn. Text that the template writes after this token, such as the line break after
    ``<|im_end|>``, is not a training target.

    These entries of ``pair.source`` are optional:

    - ``messages``: a prompt of several turns, instead of ``question``; see ``mpo_ext.chat.Conversation``.
    - ``tools``: descriptions of the functions that the model may call.
    - ``chosen_messages``, ``rejected_messages``: responses of several turns, instead of ``chosen`` and ``rejected``.
      The loss scores only the assistant's turns.

    Some processors (Idefics3, SmolVLM) return N images as ``[1, N, ...]``. The encoder swaps these two axes, so that
    batches can concatenate the first axis. Models accept this order, because they flatten both axes. Models with
    cross-attention to images (Mllama) are not supported.

    A processor without a video processor gets the frames of videos as images; see ``mpo_ext.chat.media.with_frames``.

    Args:
        processor: The model's processor, or the tokenizer of a text model.
        max_length: Maximum number of tokens of a prompt plus its longer response; None: no limit.
        too_long: "drop" skips longer pairs; "truncate" cuts the ends of the responses, never the prompt.
        image_token_id: Id of the token that stands for an image in the prompt, from the model's config. None: the
            attribute ``image_token_id`` or ``image_token`` of the tokenizer gives the id. If the tokenizer has neither
            attribute, the attributes of the processor are used.
        **chat_options: Options of ``ChatEncoder``, such as ``chat_template``, ``date`` and ``stop_ids``.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        too_long: Literal["drop", "truncate"] = "drop",
        image_token_id: int | None = None,
        **chat_options: Any,
    ) -> None:
        if max_length is not None:
            check_integer("max_length", max_length, least=2)
        if too_long not in ("drop", "truncate"):
            raise ValueError(f"too_long must be 'drop' or 'truncate', got {too_long!r}")
        self.chat = ChatEncoder(processor, **chat_options)
        self.processor, self.tokenizer = processor, self.chat.tokenizer
        self.max_length, self.too_long = max_length, too_long
        self.image_token_id = image_token_id
        self.video_token_id: int | None = None
        for owner in (self.tokenizer, processor):
            if self.image_token_id is None:
                self.image_token_id = _token_id(self.tokenizer, owner, "image")
            if self.video_token_id is None:
                self.video_token_id = _token_id(self.tokenizer, owner, "video")
        owners = (self.tokenizer, processor)
        media_ids = {_token_id(self.tokenizer, owner, kind) for owner in owners for kind in _MEDIA_TOKENS}
        self._media_ids = frozenset((media_ids | {self.image_token_id}) - {None})

    @property
    def end_id(self) -> int:
        """Id of the token that ends a turn."""
        return self.chat.end_id

    def encode(self, pair: Pair, name: str) -> Sample | SkippedPair:
        """Returns the sample of a pair, or the reason why the pair is skipped.

        Args:
            pair: A pair with absolute image paths.
            name: File and line number of the pair, for errors and warnings.

        Raises:
            BadPairError: If the pair cannot be used, for example:
                - An image or video cannot be read.
                - A pair for a text model has images or videos.
                - The prompt or a response does not fit the chat template.
                - The prompt has too few or too many tokens for its images and videos.
                - A response contains an image, video or audio token.
            TypeError: If the processor returns values that cannot be batched.
        """
        if not pair.chosen.strip() and CHOSEN_TURNS not in pair.source:
            return SkippedPair(name, EMPTY, "it would teach the model to end its turn at once")
        conversation = conversation_of(pair, name)
        for kind, media in (("images", pair.images), ("videos", pair.videos)):
            if media and not self.chat.is_multimodal:
                raise BadPairError(f"{name}: {kind} must be none for a text model, got {len(media)}")
        if pair.videos:
            videos = tuple(_open(load_video, video, f"videos[{k}]", name) for k, video in enumerate(pair.videos))
            conversation = dataclasses.replace(conversation, videos=videos)
        try:
            self.chat.prompt(conversation)
        except ChatError as error:
            raise BadPairError(f"{name}: the prompt must fit the chat template, got {error}") from error
        chosen = self._response("chosen", pair, conversation, name)
        rejected = self._response("rejected", pair, conversation, name)
        if chosen.ids == rejected.ids and not pair.has_other_images:
            return SkippedPair(name, EQUAL, f"both responses are the same {len(chosen.ids)} tokens")
        prompt_ids, token_inputs, image_inputs = self._prompt(conversation, name)
        rejected_prompt = self._rejected_prompt(pair, conversation, name)
        size, longest = len(prompt_ids), max(len(chosen.ids), len(rejected.ids))
        if rejected_prompt is not None:
            size = max(size, len(rejected_prompt.prompt_ids))
        room = longest if self.max_length is None else self.max_length - size
        if room < longest:
            detail = f"{size} tokens of prompt and {longest} of the longer response, max_length is {self.max_length}"
            if room < 1:
                return SkippedPair(name, NO_ROOM, detail)
            if self.too_long == "drop":
                return SkippedPair(name, TOO_LONG, detail)
            if chosen.ids[:room] == rejected.ids[:room] and not pair.has_other_images:
                return SkippedPair(name, EQUAL_CUT, detail)
        chosen_ids, rejected_ids = torch.tensor(chosen.ids[:room]), torch.tensor(rejected.ids[:room])
        targets = {"chosen_targets": _targets(chosen, room), "rejected_targets": _targets(rejected, room)}
        responses = {"prompt": prompt_ids, "chosen": chosen_ids, "rejected": rejected_ids}
        responses |= {key: value for key, value in targets.items() if value is not None}
        digest = _digest(responses, token_inputs, image_inputs)
        if rejected_prompt is not None:
            digest = hashlib.blake2b(f"{digest} {rejected_prompt.digest}".encode(), digest_size=16).hexdigest()
        return Sample(
            key=pair.key(),
            name=name,
            prompt_key=prompt_key(pair),
            prompt_ids=prompt_ids,
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            token_inputs=token_inputs,
            image_inputs=image_inputs,
            digest=digest,
            is_cut=room < longest,
            is_split=chosen.is_split or rejected.is_split,
            chosen_targets=targets["chosen_targets"],
            rejected_targets=targets["rejected_targets"],
            rejected_prompt=rejected_prompt,
        )

    def _rejected_prompt(self, pair: Pair, conversation: Conversation, name: str) -> Sample | None:
        """Returns the prompt of the rejected response, as a sample without responses.

        Only pairs with ``rejected_images`` have such a prompt. Returns None for all other pairs.
        """
        if not pair.has_other_images:
            return None
        ids, token_inputs, image_inputs = self._prompt(
            dataclasses.replace(conversation, images=pair.rejected_images), name, "rejected_images"
        )
        prompt = dataclasses.replace(pair, images=pair.rejected_images, rejected_images=())
        digest = _digest({"prompt": ids}, token_inputs, image_inputs)
        key, empty = prompt_key(prompt), torch.empty(0, dtype=torch.int64)
        return Sample(pair.key(), name, key, ids, empty, empty, token_inputs, image_inputs, digest)

    def _response(self, side: str, pair: Pair, conversation: Conversation, name: str) -> EncodedResponse:
        field = f"{side}_messages"
        response = pair.source.get(field, getattr(pair, side))
        if field in pair.source and not isinstance(response, (list, tuple)):
            raise BadPairError(f"{name}: {field} must be a list of messages, got {type_and_value(response)}")
        try:
            encoded = self.chat.response(conversation, response)
        except ChatError as error:
            raise BadPairError(f"{name}: {side} must fit the chat template, got {error}") from error
        for token in encoded.ids:
            if token in self._media_ids:
                token_text = self.tokenizer.convert_ids_to_tokens(token)
                text = getattr(pair, side)[:80]
                raise BadPairError(
                    f"{name}: {side} must not hold an image, video or audio token, got {token_text!r} in {text!r}"
                )
        return encoded

    def _prompt(
        self, conversation: Conversation, name: str, field: str = "images"
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Returns ``(ids, token_inputs, image_inputs)`` of a prompt.

        ``ids`` are the token ids, ``[P]``. ``token_inputs`` are other inputs for each token. ``image_inputs`` are the
        inputs for images and videos. Error messages contain ``name``, the pair, and ``field``, its field of images.
        """
        prompt, conversation = self.chat.prompt(conversation), expanded(conversation, self.processor)
        if not conversation.images and not conversation.videos:
            ids = torch.tensor(prompt.ids, dtype=torch.int64)
            self._check_media_tokens(ids, {}, conversation, name)
            return ids, {}, {}
        images = [_open(load_image, image, f"{field}[{k}]", name) for k, image in enumerate(conversation.images)]
        try:
            special = self.chat.adds_special_tokens(prompt.text)
            options = {"padding": True, "return_tensors": "pt", "add_special_tokens": special}
            media = media_arguments([images], [conversation.videos])
            inputs = dict(self.processor(text=[prompt.text], **media, **options))
        except Exception as error:  # processors report a wrong number of images in many ways
            raise BadPairError(
                f"{name}: the prompt with its {_media(conversation)} must be valid for the processor, "
                f"got {type(error).__name__}: {error}"
            ) from error
        ids, token_inputs, image_inputs = _split_inputs(inputs)
        if special and self.chat.added_suffix:
            ids = ids[: -self.chat.added_suffix]
            token_inputs = {key: value[: len(ids)] for key, value in token_inputs.items()}
        try:
            self.chat.check_ids(ids.tolist())
        except ChatError as error:
            raise BadPairError(f"{name}: {error}") from error
        self._check_media_tokens(ids, image_inputs, conversation, name)
        return ids, token_inputs, image_inputs

    def _check_media_tokens(
        self, ids: Tensor, inputs: Mapping[str, Tensor], conversation: Conversation, name: str
    ) -> None:
        """Raises ``BadPairError`` if the prompt has a wrong number of image tokens or video tokens.

        Args:
            ids: Token ids of the prompt.
            inputs: Image and video inputs of the prompt.
            conversation: Conversation with the images and videos of the prompt.
            name: File and line number of the pair, for the message.
        """
        token = next((token for token in ids.tolist() if token in self._media_ids), None)
        if not conversation.images and not conversation.videos and token is not None:
            raise BadPairError(
                f"{name}: the prompt must have 0 image tokens for its 0 images, got "
                f"{self.tokenizer.decode([token])!r} in its text"
            )
        for kind, token_id, media in (
            ("image", self.image_token_id, conversation.images),
            ("video", self.video_token_id, conversation.videos),
        ):
            if token_id is None:
                continue
            # InternVL represents the frames of videos by the tokens and pixels of images.
            is_shared = bool(conversation.videos) and "pixel_values" in inputs
            if is_shared and (kind == "video" or not conversation.images):
                continue
            count = int((ids == token_id).sum())
            expected = self._expected_tokens(kind, inputs) if media else 0
            if count != expected if expected is not None else count < len(media):
                rule = f"at least {len(media)}" if expected is None else str(expected)
                raise BadPairError(
                    f"{name}: the prompt must have {rule} {kind} tokens ({self.tokenizer.decode([token_id])!r}) "
                    f"for its {len(media)} {kind}s, got {count}"
                )

    def _expected_tokens(self, kind: str, inputs: Mapping[str, Tensor]) -> int | None:
        """Returns the number of prompt tokens that the images or videos in ``inputs`` need; None if unknown.

        ``kind`` is "image" or "video".
        """
        grid = inputs.get(f"{kind}_grid_thw")
        merge = getattr(getattr(self.processor, f"{kind}_processor", None), "merge_size", None)
        if grid is not None and isinstance(merge, int):
            return int((grid.prod(dim=-1) // merge**2).sum())
        pixels = inputs.get("pixel_values") if kind == "image" else None
        for attribute in ("image_seq_length", "image_seq_len"):
            tokens = getattr(self.processor, attribute, None)
            if isinstance(tokens, int) and pixels is not None:
                return len(pixels) * tokens
        return None


def conversation_of(pair: Pair, name: str) -> Conversation:
    """Returns the prompt of a pair as a conversation, with its tools and media.

    The entry ``pair.source["messages"]`` has the turns. Without this entry, the question is the only turn. ``name`` is
    the file and line number of the pair. Raises ``BadPairError`` if messages or tools are invalid.
    """
    messages = pair.source.get("messages", ())
    if "messages" in pair.source and not (isinstance(messages, (list, tuple)) and messages):
        raise BadPairError(
            f"{name}: the prompt must fit the chat template, got messages must be a list of messages, got "
            f"{str(messages)[:80]!r}"
        )
    tools = pair.source.get("tools") or ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadPairError(f"{name}: tools must be a list of objects, got {str(tools)[:80]!r}")
    media = {"images": pair.images, "videos": pair.videos}
    return Conversation(key=name, question=pair.question, messages=tuple(messages), tools=tuple(tools), **media)


def _targets(response: EncodedResponse, room: int) -> Tensor | None:
    """Returns for each of the first ``room`` tokens whether the loss scores it (bool). None: all tokens are scored."""
    return None if all(response.is_target) else torch.tensor(response.is_target[:room])


def _token_id(tokenizer: Any, owner: Any, kind: str) -> int | None:
    """Returns the id of the token that represents media of ``kind`` ("image", "video" ...), or None.

    The id is read from the attributes of ``owner`` (a tokenizer or a processor), such as ``image_token_id``.
    """
    token_id = getattr(owner, f"{kind}_token_id", None)
    token = getattr(owner, f"{kind}_token", None)
    if token_id is None and isinstance(token, str):
        token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id if isinstance(token_id, int) and token_id != tokenizer.unk_token_id else None


def _open(load: Callable[[Any], Any], source: Any, place: str, name: str) -> Any:
    """Returns ``load(source)``, an image or a video. Raises ``BadPairError`` if the file cannot be read.

    The error message contains ``place`` (such as ``images[0]``) and ``name`` (file and line number of the pair).
    """
    try:
        return load(source)
    except ImportError:
        raise
    except Exception as error:  # Pillow raises many kinds of exceptions for a broken file
        kind = MissingImageError if isinstance(error, FileNotFoundError) else BadPairError
        is_video = isinstance(source, Video)
        shown = describe_video(source) if is_video else describe_source(source)
        raise kind(
            f"{name}: {place} must be {'a video' if is_video else 'an image'} that can be read, got {shown}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _media(conversation: Conversation) -> str:
    """Returns the numbers of images and videos of a conversation as a text, such as "2 images"."""
    counts = {"images": len(conversation.images), "videos": len(conversation.videos)}
    return " and ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "0 images"


def _split_inputs(inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Splits the output of the processor for a prompt into three parts.

    Returns:
        The token ids, a dict of inputs with a value per token, and a dict of image and video inputs.
    """
    for input_name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the processor must return tensors, got {type(value).__name__} for {input_name!r}")
    ids = inputs.pop("input_ids")
    is_token = inputs.pop("attention_mask", torch.ones_like(ids))[0].bool()
    token_inputs, image_inputs = {}, {}
    is_nested = "pixel_attention_mask" in inputs and inputs["pixel_values"].ndim == 5
    for input_name, value in inputs.items():
        if value.shape == ids.shape and not input_name.startswith(_PER_IMAGE):
            token_inputs[input_name] = value[0][is_token]
        elif value.ndim > 2 and value.shape[:2] == ids.shape and not input_name.startswith(_PER_IMAGE):
            raise TypeError(
                "the processor must represent images by tokens in the prompt, not by cross-attention to them, "
                f"got {input_name!r} of shape {tuple(value.shape)}"
            )
        elif is_nested and input_name in ("pixel_values", "pixel_attention_mask"):
            image_inputs[input_name] = value.transpose(0, 1).contiguous()
        else:
            image_inputs[input_name] = value
    return ids[0][is_token].to(torch.int64), token_inputs, image_inputs


def _digest(ids: Mapping[str, Tensor], token_inputs: Mapping[str, Tensor], image_inputs: Mapping[str, Tensor]) -> str:
    """Returns a hash of the names, dtypes, shapes and bytes of all tensors."""
    hasher = hashlib.blake2b(digest_size=16)
    for group in (ids, token_inputs, image_inputs):
        hasher.update(f"{len(group)};".encode())
        for field in sorted(group):
            value = group[field].contiguous()
            hasher.update(f"{field!r} {value.dtype} {tuple(value.shape)};".encode())
            hasher.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
