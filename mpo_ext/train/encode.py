"""Encodes a pair as a ``Sample``: token ids of the prompt and of both responses, and image inputs."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mpo_ext.chat import ChatEncoder, ChatError, Conversation, EncodedResponse
from mpo_ext.checks import DefectError, check_integer
from mpo_ext.data.reader import BadLine
from mpo_ext.data.records import Pair
from mpo_ext.images import describe_source, load_image

TOO_LONG = "longer than max_length"
NO_ROOM = "prompt leaves no room for a response"
EQUAL = "chosen and rejected are equal"
EQUAL_CUT = "chosen and rejected are equal once cut"
BAD_PAIR = "bad pair"
# Attributes of tokenizers and processors, without "_token", that name the tokens of media and around them.
_MEDIA_TOKENS = ("image", "video", "audio", "boi", "eoi", "start_image", "end_image", "vision_start", "vision_end")
_PER_IMAGE = ("image_", "pixel_", "num_", "batch_")  # inputs per image, which may have the prompt's shape by chance


class BadPairError(DefectError):
    """Raised for a pair that cannot be encoded. The message names the pair, the rule and the value."""


class MissingImageError(BadPairError):
    """Raised for a pair with an image file that does not exist. The message names the path."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """An encoded pair.

    Attributes:
        key: ``Pair.key()``.
        name: File and line number of the pair, for messages.
        prompt_key: Hash of the question and the image paths; see ``mpo_ext.train.encode.prompt_key``.
        prompt_ids: ``[P]`` int64, the tokens before the response, image tokens included.
        chosen_ids: ``[C]`` int64, the chosen response and the token that ends the turn.
        rejected_ids: ``[R]`` int64, the rejected response and the token that ends the turn.
        token_inputs: Other per-token inputs of the prompt, ``[P]`` each, such as ``mm_token_type_ids``.
        image_inputs: The processor's outputs for the images, such as ``pixel_values``. The first axis counts images,
            tiles or patches; batches concatenate along this axis.
        digest: Hash of the model's inputs: all token ids, ``token_inputs`` and ``image_inputs``.
        is_cut: Whether a response was cut and lacks the token that ends the turn.
        is_split: Whether a response was tokenized apart from the prompt; see ``mpo_ext.chat.ChatEncoder``.
        chosen_targets: ``[C]`` bool, False for the user's turns in a chosen response of several turns; None: all
            tokens are targets.
        rejected_targets: ``[R]`` bool, defined like ``chosen_targets`` for the rejected response.
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

    @property
    def n_chosen_targets(self) -> int:
        """Number of tokens of the chosen response that are targets."""
        return len(self.chosen_ids) if self.chosen_targets is None else int(self.chosen_targets.sum())


@dataclasses.dataclass(frozen=True, slots=True)
class SkippedPair:
    """A valid pair that training does not use, for example because it is too long.

    Attributes:
        name: File and line number of the pair.
        reason: ``TOO_LONG``, ``NO_ROOM``, ``EQUAL`` or ``EQUAL_CUT``.
        detail: The numbers of tokens, for messages.
    """

    name: str
    reason: str
    detail: str


class PairCounts:
    """Counts encoded and skipped pairs, and keeps the first message for each reason.

    Attributes:
        kept: Number of pairs that became samples.
        cut: Number of samples with a cut response.
        split: Number of samples with a response that was tokenized apart from the prompt.
        skipped: Number of skipped pairs for each reason; the reason of a bad line is its ``BadLine.kind``.
        examples: The first message for each reason.
    """

    def __init__(self) -> None:
        self.kept = 0
        self.cut = 0
        self.split = 0
        self.skipped: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}

    def add(self, result: Sample | SkippedPair | BadLine | BadPairError) -> None:
        """Counts a sample, a skipped pair, a bad line or an encoding error."""
        if isinstance(result, Sample):
            self.kept += 1
            self.cut += result.is_cut
            self.split += result.is_split
            return
        if isinstance(result, SkippedPair):
            reason, message = result.reason, f"{result.name}: {result.detail}"
        else:
            reason, message = result.kind if isinstance(result, BadLine) else BAD_PAIR, str(result)
        self.skipped[reason] += 1
        self.examples.setdefault(reason, message)

    def merge(self, other: "PairCounts") -> None:
        """Adds the counts of another process. For a reason with an example here, the example stays."""
        self.kept += other.kept
        self.cut += other.cut
        self.split += other.split
        self.skipped.update(other.skipped)
        self.examples = {**other.examples, **self.examples}

    @property
    def n_skipped(self) -> int:
        """Number of skipped pairs, summed over all reasons."""
        return self.skipped.total()

    def lines(self) -> Iterator[str]:
        """Yields the counts and the examples as lines of text."""
        if self.cut:
            yield f"cut the responses of {self.cut:,} pairs"
        if self.split:
            yield f"tokenized the responses of {self.split:,} pairs apart: the tokenizer merges prompt and response"
        for reason, count in self.skipped.most_common():
            yield f"skipped {count:,}: {reason}, for example {self.examples[reason]}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts and the examples as a dict, under the names that checkpoints use."""
        return {
            "kept": self.kept,
            "cut": self.cut,
            "split": self.split,
            "dropped": dict(self.skipped),
            "examples": self.examples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept, self.cut, self.split = state["kept"], state["cut"], state.get("split", 0)
        self.skipped = collections.Counter(state["dropped"])
        self.examples = dict(state["examples"])


def prompt_key(pair: Pair) -> str:
    """Returns a hash of the prompt: the question or conversation, and the image paths.

    Pairs with equal hashes have the same prompt tokens and images if the same ``Encoder`` encodes them.
    """
    text = json.dumps([pair.question, pair.source.get("messages"), *pair.images], ensure_ascii=True, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Encoder:
    """Encodes pairs as samples. An encoder can be pickled for the workers of a DataLoader.

    ``mpo_ext.chat.ChatEncoder`` makes the token ids; sampling and evaluation use the same class. Each response ends
    with the token that ends the turn. Text that the template writes after this token, such as the line break after
    ``<|im_end|>``, is not a training target.

    A prompt of several turns is in ``pair.source["messages"]``, which replaces ``question``; see
    ``mpo_ext.chat.Conversation``. A response of several turns is in ``pair.source["chosen_messages"]`` or
    ``["rejected_messages"]``, which replaces ``chosen`` or ``rejected``. In such a response, only the assistant's
    turns are targets.

    Some processors (Idefics3, SmolVLM) return images with an additional batch axis, ``[1, N, ...]``. The encoder
    changes their shape to ``[N, 1, ...]``, so that batches can concatenate the first axis; the models flatten both
    axes. Models with cross-attention to images (Mllama) are not supported.

    Args:
        processor: The model's processor, or the tokenizer of a text model.
        max_length: Maximum number of tokens of a prompt plus its longer response; None: no limit.
        too_long: "drop" skips longer pairs; "truncate" cuts the ends of the responses, never the prompt.
        image_token_id: Id of the token that represents (a part of) an image in the prompt, from the model's config;
            None: the id is read from the tokenizer or, if the tokenizer has none, from the processor.
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
        for owner in (self.tokenizer, processor):
            if self.image_token_id is None:
                self.image_token_id = _token_id(self.tokenizer, owner, "image")
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
            name: File and line number of the pair, for messages.

        Raises:
            BadPairError: If an image cannot be read, the prompt does not fit its images or the chat template, or a
                response does not fit the chat template or contains an image token.
            TypeError: If the processor returns values that cannot be batched.
        """
        conversation = conversation_of(pair, name)
        if pair.images and not self.chat.is_multimodal:
            raise BadPairError(f"{name}: images must be none for a text model, got {len(pair.images)}")
        try:
            self.chat.prompt(conversation)
        except ChatError as error:
            raise BadPairError(f"{name}: the prompt must fit the chat template, got {error}") from error
        chosen = self._response("chosen", pair, conversation, name)
        rejected = self._response("rejected", pair, conversation, name)
        if chosen.ids == rejected.ids:
            return SkippedPair(name, EQUAL, f"both responses are the same {len(chosen.ids)} tokens")
        prompt_ids, token_inputs, image_inputs = self._prompt(conversation, name)
        size, longest = len(prompt_ids), max(len(chosen.ids), len(rejected.ids))
        room = longest if self.max_length is None else self.max_length - size
        if room < longest:
            detail = f"{size} tokens of prompt and {longest} of the longer response, max_length is {self.max_length}"
            if room < 1:
                return SkippedPair(name, NO_ROOM, detail)
            if self.too_long == "drop":
                return SkippedPair(name, TOO_LONG, detail)
            if chosen.ids[:room] == rejected.ids[:room]:
                return SkippedPair(name, EQUAL_CUT, detail)
        chosen_ids, rejected_ids = torch.tensor(chosen.ids[:room]), torch.tensor(rejected.ids[:room])
        targets = {"chosen_targets": _targets(chosen, room), "rejected_targets": _targets(rejected, room)}
        responses = {"prompt": prompt_ids, "chosen": chosen_ids, "rejected": rejected_ids}
        responses |= {key: value for key, value in targets.items() if value is not None}
        return Sample(
            key=pair.key(),
            name=name,
            prompt_key=prompt_key(pair),
            prompt_ids=prompt_ids,
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            token_inputs=token_inputs,
            image_inputs=image_inputs,
            digest=_digest(responses, token_inputs, image_inputs),
            is_cut=room < longest,
            is_split=chosen.is_split or rejected.is_split,
            chosen_targets=targets["chosen_targets"],
            rejected_targets=targets["rejected_targets"],
        )

    def _response(self, side: str, pair: Pair, conversation: Conversation, name: str) -> EncodedResponse:
        response = pair.source.get(f"{side}_messages", getattr(pair, side))
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

    def _prompt(self, conversation: Conversation, name: str) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Returns the prompt's token ids ``[P]``, its other per-token inputs ``[P]``, and its image inputs."""
        prompt = self.chat.prompt(conversation)
        if not conversation.images:
            ids = torch.tensor(prompt.ids, dtype=torch.int64)
            self._check_image_tokens(ids, {}, 0, name)
            return ids, {}, {}
        images = [_open(path, index, name) for index, path in enumerate(conversation.images)]
        try:
            special = self.chat.adds_special_tokens(prompt.text)
            options = {"padding": True, "return_tensors": "pt", "add_special_tokens": special}
            inputs = dict(self.processor(text=[prompt.text], images=[images], **options))
        except Exception as error:  # processors report a wrong number of images in many ways
            raise BadPairError(
                f"{name}: the prompt with its {len(images)} images must be valid for the processor, "
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
        self._check_image_tokens(ids, image_inputs, len(images), name)
        return ids, token_inputs, image_inputs

    def _check_image_tokens(self, ids: Tensor, image_inputs: Mapping[str, Tensor], images: int, name: str) -> None:
        token = next((token for token in ids.tolist() if token in self._media_ids), None)
        if not images and token is not None:
            raise BadPairError(
                f"{name}: the prompt must have 0 image tokens for its 0 images, got "
                f"{self.tokenizer.decode([token])!r} in its text"
            )
        if self.image_token_id is None:
            return
        count = int((ids == self.image_token_id).sum())
        expected = self._expected_image_tokens(image_inputs) if images else 0
        if count != expected if expected is not None else count < images:
            rule = f"at least {images}" if expected is None else str(expected)
            raise BadPairError(
                f"{name}: the prompt must have {rule} image tokens ({self.tokenizer.decode([self.image_token_id])!r}) "
                f"for its {images} images, got {count}"
            )

    def _expected_image_tokens(self, image_inputs: Mapping[str, Tensor]) -> int | None:
        """Returns the number of image tokens that the processor should write; None if its rule is unknown."""
        grid = image_inputs.get("image_grid_thw")
        merge = getattr(getattr(self.processor, "image_processor", None), "merge_size", None)
        if grid is not None and isinstance(merge, int):
            return int((grid.prod(dim=-1) // merge**2).sum())
        pixels = image_inputs.get("pixel_values")
        for attribute in ("image_seq_length", "image_seq_len"):
            tokens = getattr(self.processor, attribute, None)
            if isinstance(tokens, int) and pixels is not None:
                return len(pixels) * tokens
        return None


def conversation_of(pair: Pair, name: str) -> Conversation:
    """Returns the prompt of a pair: its question, or the turns of ``pair.source["messages"]``.

    ``name`` is the file and line number of the pair.
    """
    messages = pair.source.get("messages", ())
    if "messages" in pair.source and not (isinstance(messages, (list, tuple)) and messages):
        raise BadPairError(
            f"{name}: the prompt must fit the chat template, got messages must be a list of messages, got "
            f"{str(messages)[:80]!r}"
        )
    return Conversation(key=name, question=pair.question, messages=tuple(messages), images=pair.images)


def _targets(response: EncodedResponse, room: int) -> Tensor | None:
    """Returns for each of the first ``room`` tokens of a response whether it is a target; None if all tokens are."""
    return None if all(response.is_target) else torch.tensor(response.is_target[:room])


def _token_id(tokenizer: Any, owner: Any, kind: str) -> int | None:
    """Returns the id of the token that represents media of a kind ("image", "video" ...).

    ``owner`` (a tokenizer or a processor) names the token in its attributes. If it names none, the result is None.
    """
    token_id = getattr(owner, f"{kind}_token_id", None)
    token = getattr(owner, f"{kind}_token", None)
    if token_id is None and isinstance(token, str):
        token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id if isinstance(token_id, int) and token_id != tokenizer.unk_token_id else None


def _open(path: str, index: int, name: str) -> Any:
    try:
        return load_image(path)
    except Exception as error:  # Pillow raises many kinds of exceptions for a broken file
        kind = MissingImageError if isinstance(error, FileNotFoundError) else BadPairError
        raise kind(
            f"{name}: images[{index}] must be an image that can be read, got {describe_source(path)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _split_inputs(inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Splits the processor's output for one sample. Returns the token ids, inputs per token, and image inputs."""
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
