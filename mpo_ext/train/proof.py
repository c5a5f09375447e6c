"""Checks the token ids of the first pairs at the start of a run. The model's own processor must give the same ids.

The result, a ``Proof``, also holds the decoded text of these pairs.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from mpo_ext.chat import ChatEncoder, Conversation, chat_messages
from mpo_ext.chat.conversation import message_turns
from mpo_ext.chat.decoding import squash
from mpo_ext.chat.media import expanded, media_arguments
from mpo_ext.chat.template import OPEN_TAG
from mpo_ext.checks import LinesError
from mpo_ext.data.records import Pair
from mpo_ext.images import load_image
from mpo_ext.train.encode import BadPairError, Encoder, Sample, conversation_of
from mpo_ext.videos import load_video

_CONSOLE_CHARACTERS = 160


@dataclasses.dataclass(frozen=True, slots=True)
class ProvedPair:
    """A pair as text, decoded from the token ids that the model reads.

    Attributes:
        name: File and line number of the pair.
        prompt: The decoded prompt; a run of image tokens is shown as ``<image> x 64``.
        chosen: The decoded chosen response, with the trained tokens in double square brackets.
        rejected: The decoded rejected response, with the trained tokens in double square brackets.
        sizes: Token counts as text, such as "70 tokens of prompt (64 of images), 5 of chosen, 6 of rejected".
    """

    name: str
    prompt: str
    chosen: str
    rejected: str
    sizes: str

    def lines(self, most: int | None = None) -> Iterator[str]:
        """Yields lines of text: the name and sizes, the prompt and both responses.

        ``most`` is the maximum number of characters of the prompt and of each response; None: no limit. A longer
        prompt is cut at its beginning, a longer response at its end.
        """
        yield f"{self.name}: {self.sizes}"
        for label, text in (("prompt", self.prompt), ("chosen", self.chosen), ("rejected", self.rejected)):
            shown = text.replace("\n", "\\n")
            if most is not None and len(shown) > most:
                shown = f"... {shown[-most:]}" if label == "prompt" else f"{shown[:most]} ..."
            yield f"  {label + ':':9} {shown}"


@dataclasses.dataclass(frozen=True, slots=True)
class Proof:
    """The result of ``prove``, which checks the encoding of the first pairs.

    Attributes:
        notices: Messages about the chat template and the tokenizer: for example, that the template writes the date.
            Also messages about checks that could not run.
        pairs: The first pairs that could be encoded, as decoded text.
        skipped: Messages about pairs that could not be encoded; at most ``count`` messages (see ``prove``).
        reasons: Dict from a reason to the number of pairs that could not be encoded for this reason. The number
            includes pairs without a message in ``skipped``.
        problems: Messages about failed checks. For example, token ids differ from those of the processor.
    """

    notices: tuple[str, ...]
    pairs: tuple[ProvedPair, ...]
    skipped: tuple[str, ...]
    problems: tuple[str, ...]
    reasons: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def lines(self, most: int | None = None) -> Iterator[str]:
        """Yields the messages and the decoded pairs as lines of text. For ``most``, see ``ProvedPair.lines``."""
        yield from (f"chat template: {notice}" for notice in self.notices)
        yield from (f"not encoded: {message}" for message in self.skipped)
        for pair in self.pairs:
            yield from pair.lines(most)
        yield from self.problems

    def console_lines(self) -> Iterator[str]:
        """Yields lines for the console: only the first pair, with shortened texts."""
        return dataclasses.replace(self, pairs=self.pairs[:1]).lines(_CONSOLE_CHARACTERS)

    def check(self) -> None:
        """Raises ``LinesError`` if ``problems`` is not empty."""
        if self.problems:
            raise LinesError("the token ids of the first pairs must be those of the model's processor, but:\n  " +
                             "\n  ".join(self.problems))  # fmt: skip


def prove(encoder: Encoder, pairs: Iterable[tuple[Pair, str]], *, count: int = 3) -> Proof:
    """Encodes the first pairs, compares the token ids with those of the model's own processor, and returns the result.

    For each pair, these rules are checked if they apply:

    - The prompt ids equal those of the processor's ``apply_chat_template``.
    - The processor's ids of the whole conversation begin with the ids of the prompt and the response.
    - The ids of each response decode to its text.
    - Each response ends with a token that stops sampling.

    Args:
        encoder: Encoder of the run.
        pairs: Tuples ``(pair, name)``. Image paths in the pair are absolute. Errors and warnings contain the name.
        count: Number of pairs to check. Pairs that cannot be encoded do not count. At most ``50 * count``
            pairs are read.
    """
    proved: list[ProvedPair] = []
    skipped: list[str] = []
    problems: list[str] = []
    reasons: collections.Counter[str] = collections.Counter()
    notices = dict.fromkeys(encoder.chat.notices)
    for pair, name in itertools.islice(pairs, 50 * count):
        try:
            sample = encoder.encode(pair, name)
        except BadPairError as error:
            skipped.append(str(error))
            reasons[str(error).removeprefix(f"{name}: ").partition(", got ")[0]] += 1
            continue
        if not isinstance(sample, Sample):
            skipped.append(f"{name}: {sample.reason}: {sample.detail}")
            reasons[sample.reason] += 1
            continue
        proved.append(_decode(encoder, sample))
        problems += [f"{name}: {problem}" for problem in _decoding_problems(encoder, pair, sample)]
        try:
            problems += [f"{name}: {problem}" for problem in _differences(encoder, pair, sample)]
        except Exception as error:  # processors may raise anything; the pair itself could be encoded
            notices[f"the ids could not be compared with the processor's: {type(error).__name__}: {error}"[:300]] = (
                None
            )
        if len(proved) == count:
            break
    return Proof(tuple(notices), tuple(proved), tuple(skipped[:count]), tuple(problems), dict(reasons.most_common()))


def _decoding_problems(encoder: Encoder, pair: Pair, sample: Sample) -> Iterator[str]:
    """Yields a message for each response whose ids decode to another text.

    Also yields a message for each response whose last token does not stop sampling.
    """
    chat = encoder.chat
    conversation = conversation_of(pair, sample.name)
    for side, ids in (("chosen", sample.chosen_ids.tolist()), ("rejected", sample.rejected_ids.tolist())):
        if sample.is_cut or f"{side}_messages" in pair.source:
            continue
        response, text = getattr(pair, side), chat.response_text(conversation, ids[:-1])
        block = OPEN_TAG.search(chat.prompt_text(conversation))  # the prompt may end with the response's <think> tag
        if squash(response) not in squash(f"{block[0]}{text}" if block else text):
            yield f"the ids of {side} must decode to the response, got {text[:80]!r} for {response[:80]!r}"
        if ids[-1] not in chat.stop_ids:
            yield f"{side} must end with a token at which sampling stops, got {ids[-1]}"


def _differences(encoder: Encoder, pair: Pair, sample: Sample) -> Iterator[str]:
    """Yields a message if the processor gives other ids than ``sample`` for the prompt or for a response."""
    chat = encoder.chat
    if chat.chat_template is None:
        return
    prompt, conversation = sample.prompt_ids.tolist(), conversation_of(pair, sample.name)
    conversation = expanded(conversation, chat.processor)
    images, videos = list(map(load_image, conversation.images)), list(map(load_video, conversation.videos))
    messages = _with_media(chat, conversation, images, [video.pixels() for video in videos])
    media = media_arguments([], [videos]).get("videos_kwargs")
    options = {"processor_kwargs": {"videos_kwargs": media}} if media else {}
    if not chat.form.ignores_generation_prompt:
        expected = chat.processor_ids(messages, generation_prompt=True, tools=conversation.tools, **options)
        suffix = chat.added_suffix if chat.adds_special_tokens(chat.prompt_text(conversation)) else 0
        yield from _difference(encoder, "the prompt", prompt, expected[: len(expected) - suffix])
    if not chat.ends_in_tail or chat.form.opened or sample.is_split or sample.is_cut:
        return  # the ids follow a rule beyond the template
    for side, ids in (("chosen", sample.chosen_ids.tolist()), ("rejected", sample.rejected_ids.tolist())):
        response = pair.source.get(f"{side}_messages") or [{"role": "assistant", "content": getattr(pair, side)}]
        turns = message_turns(response, split=False)
        if not chat.is_multimodal:
            turns = [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in turns]
        turns_of_pair = [*messages, *turns]
        whole = chat.processor_ids(turns_of_pair, generation_prompt=False, tools=conversation.tools, **options)
        yield from _difference(encoder, f"prompt and {side}", [*prompt, *ids], whole[: len(prompt) + len(ids)])


def _with_media(
    chat: ChatEncoder, conversation: Conversation, images: Sequence[Any], videos: Sequence[Any]
) -> list[dict[str, Any]]:
    """Returns the chat messages of a conversation. Their image and video parts hold the loaded images and videos.

    For a text model, the messages have no image and video parts.
    """
    messages = chat_messages(conversation, as_parts=chat.is_multimodal)
    if not chat.is_multimodal:
        return messages
    rest = {"image": iter(images), "video": iter(videos)}

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        return {"type": kind, kind: next(rest[kind])} if kind in rest else part

    return [{**turn, "content": [filled(part) for part in turn["content"]]} for turn in messages]


def _difference(encoder: Encoder, what: str, ours: Sequence[int], expected: Sequence[int]) -> Iterator[str]:
    if list(ours) == list(expected):
        return
    pairs = itertools.zip_longest(ours, expected)
    place = next(index for index, (left, right) in enumerate(pairs) if left != right)
    left, right = (encoder.chat.decode(ids[place : place + 8]) for ids in (ours, expected))
    yield (
        f"the ids of {what} must be those of the processor, got {left[:80]!r} at token {place} where it has "
        f"{right[:80]!r}"
    )


def _decode(encoder: Encoder, sample: Sample) -> ProvedPair:
    tokens = {"<image>": encoder.image_token_id, "<video>": encoder.video_token_id}
    marks = {token: mark for mark, token in tokens.items() if token is not None}
    images = sum(token in marks for token in sample.prompt_ids.tolist())
    kinds = "images and videos" if encoder.video_token_id in sample.prompt_ids.tolist() else "images"
    counts = f"{len(sample.prompt_ids):,} tokens of prompt{f' ({images:,} of {kinds})' if images else ''}"
    sizes = f"{counts}, {len(sample.chosen_ids):,} of chosen, {len(sample.rejected_ids):,} of rejected"
    pieces = []
    for mark, group in itertools.groupby(sample.prompt_ids.tolist(), marks.get):
        ids = list(group)
        pieces.append(f"{mark} x {len(ids)}" if mark else encoder.chat.decode(ids))
    return ProvedPair(
        sample.name,
        "".join(pieces),
        _marked(encoder, sample.chosen_ids, sample.chosen_targets),
        _marked(encoder, sample.rejected_ids, sample.rejected_targets),
        sizes,
    )


def _marked(encoder: Encoder, ids: Tensor, targets: Tensor | None) -> str:
    """Returns the decoded response. Trained tokens are in double square brackets.

    ``targets`` is True for trained tokens; None: all tokens are trained.
    """
    is_target = [True] * len(ids) if targets is None else targets.tolist()
    text = ""
    for marked, group in itertools.groupby(zip(ids.tolist(), is_target, strict=True), lambda entry: entry[1]):
        part = encoder.chat.decode([token for token, _ in group])
        text += f"[[{part}]]" if marked else part
    return text
