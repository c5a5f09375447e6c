"""The DropoutNTP pipeline: a model continues a truncated chosen response without seeing the image or video.

The kept beginning (the prefix) and the continuation form the rejected response. The rejected response tends to be
wrong where the answer depends on the image. ``mpo_ext.generate.runner`` runs the pipeline.
"""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

from mpo_ext.answers import extract_answer
from mpo_ext.chat import ChatError, Conversation
from mpo_ext.chat.template import common_length
from mpo_ext.checks import check_choice, check_integer, check_number
from mpo_ext.generate.engine import Engine, Generation, Request, SamplingConfig, derive_seed
from mpo_ext.generate.feeding import Steps, run_steps
from mpo_ext.generate.items import WRONG_SAMPLE, Item
from mpo_ext.generate.outputs import ItemResult
from mpo_ext.generate.questions import AnswerScorer, item_fields, media_fields, prompt_fields, refusal_fields
from mpo_ext.generate.repetition import is_degenerate
from mpo_ext.images import ImageError

WRONG_CHOSEN = "chosen is a sample that was wrong (--allow-wrong-chosen takes it)"
_BROKEN = "\ufffd"  # a decoder writes this for an incomplete character


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DropoutNTPConfig:
    """Settings of the DropoutNTP pipeline.

    Attributes:
        keep: Fraction of the chosen response to keep as the prefix, in [0, 1).
        unit: Unit of ``keep``. "tokens" works for every language. "words" are separated by single spaces, as in the
            script of MPO's authors.
        with_image: Whether the model sees the images and videos while it continues the response.
        samples: Number of continuations per response.
        sampling: Settings for drawing tokens.
        seed: Seed of all draws.
        sample_chosen: Whether to sample a chosen response for an item without a chosen response. For this sample, the
            model sees the image, as in the paper. False: such items are skipped.
        allow_truncated: Whether to use continuations that ``max_new_tokens`` cut off.
        allow_wrong_chosen: Whether to use items whose chosen response is known to be wrong. The correctness pipeline
            writes such items to ``unsolved.jsonl``.
        style: How to find the answer in a response, such as "final_answer"; see ``extract_answer``.
        matcher: Kind and options of the matcher. For an item with a true answer, the matcher compares the answer of
            each continuation with the true answer. The continuation is skipped if its answer is right, or if the
            matcher cannot tell. The continuation is used if its answer is wrong or missing. None: no comparison.
    """

    keep: float = 0.5
    unit: Literal["tokens", "words"] = "tokens"
    with_image: bool = False
    samples: int = 1
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    seed: int = 0
    sample_chosen: bool = False
    allow_truncated: bool = False
    allow_wrong_chosen: bool = False
    style: str = "final_answer"
    matcher: Mapping[str, Any] | None = dataclasses.field(default_factory=lambda: {"kind": "vqa"})

    def __post_init__(self) -> None:
        check_number("keep", self.keep, "[0, 1)")
        check_choice("unit", self.unit, ("tokens", "words"))
        check_integer("samples", self.samples, least=1)
        check_integer("seed", self.seed, least=0)


@dataclasses.dataclass(frozen=True, slots=True)
class Prefix:
    """The kept beginning of a response: token ids, and the text of these tokens."""

    token_ids: tuple[int, ...]
    text: str


@dataclasses.dataclass(slots=True)
class _Row:
    """The state of an item while ``DropoutNTP`` samples its continuations.

    Attributes:
        item: The item.
        problem: Reason why the item cannot be used, or None.
        details: Fields that explain the problem. They are stored together with the problem.
        media: The loaded images and videos; empty if the model does not see them.
        chosen: The chosen response, from the item or sampled; None before it is sampled.
        sampled_tokens: Number of tokens of ``chosen`` if the pipeline sampled it; otherwise None.
        prefix: The kept beginning of ``chosen``.
    """

    item: Item
    problem: str | None = None
    details: dict[str, str] = dataclasses.field(default_factory=dict)
    media: dict[str, Any] = dataclasses.field(default_factory=dict)
    chosen: str | None = None
    sampled_tokens: int | None = None
    prefix: Prefix = Prefix((), "")


class DropoutNTP:
    """The DropoutNTP pipeline: a model continues truncated chosen responses, by default without seeing the images.

    A continued response becomes the rejected response of a pair. The only output file is ``pairs.jsonl``.
    ``mpo_ext.generate.runner.run`` runs the pipeline.
    """

    name = "dropout_ntp"
    outputs = ("pairs",)
    needs_truths = False

    def __init__(self, config: DropoutNTPConfig | None = None) -> None:
        self.config = config or DropoutNTPConfig()
        self._sampling = dataclasses.asdict(self.config.sampling)
        extract_answer("", self.config.style)  # raises for an unknown style before a model is loaded
        self._scorer = AnswerScorer(self.config.matcher, style=self.config.style) if self.config.matcher else None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that determine the samples and the output files, as JSON values."""
        settings = dataclasses.asdict(self.config)
        if not self.config.allow_wrong_chosen:  # older journals lack this setting
            del settings["allow_wrong_chosen"]
        return settings

    def keys(self, item: Item) -> list[str]:
        return [f"{item.digest}-{sample}" for sample in range(self.config.samples)]

    def cut(self, chosen: str, conversation: Conversation, engine: Engine) -> Prefix:
        """Returns the kept beginning of a chosen response. ``keep`` and ``unit`` determine its length.

        ``conversation`` is the prompt of the response. With the unit "tokens", no character is cut in the middle.
        """
        if self.config.unit == "words":
            words = chosen.split(" ")
            kept = " ".join(words[: int(len(words) * self.config.keep)]).strip()
            ids = engine.encode_response(conversation, kept) if kept else []
            # The template may write white space after the kept words.
            ids = ids[: common_length(ids, engine.encode_response(conversation, chosen))]
            return Prefix(tuple(ids), engine.decode_response(conversation, ids))
        ids = engine.encode_response(conversation, chosen)
        count = int(len(ids) * self.config.keep)
        text = engine.decode_response(conversation, ids[:count])
        while count > 0 and text.endswith(_BROKEN):
            count -= 1
            text = engine.decode_response(conversation, ids[:count])
        return Prefix(tuple(ids[:count]), text)

    def sample(self, items: Sequence[Item], engine: Engine) -> list[list[dict[str, Any]]]:
        """Truncates the chosen responses, samples their continuations, and returns one list of records per item.

        A record is a JSON object with a continuation. If an item cannot be used, its records hold the reason as
        ``problem`` instead.
        """
        return run_steps(self.steps(items, engine), engine)

    def steps(self, items: Sequence[Item], engine: Engine) -> Steps:
        """Yields lists of requests. The caller sends the generations of each list with ``send``.

        At the end, this generator returns the same value as ``sample``.
        """
        rows = [self._load(item) for item in items]
        yield from self._sample_chosen([row for row in rows if row.problem is None and row.chosen is None])
        requests: list[Request] = []
        for row in rows:
            if row.problem is not None or row.chosen is None:
                continue
            conversation = self._conversation(row)
            try:
                row.prefix = self.cut(row.chosen, conversation, engine)
            except ChatError as error:
                row.problem = "chosen response does not fit the chat template"
                row.details = {"detail": str(error)}
                continue
            if not row.prefix.token_ids and self.config.keep > 0:
                row.problem = "chosen response too short to cut"
                continue
            for key in self.keys(row.item):
                requests.append(
                    Request(
                        key=key,
                        question=conversation.question,
                        messages=conversation.messages,
                        tools=conversation.tools,
                        images=conversation.images,
                        videos=conversation.videos,
                        prefix_ids=row.prefix.token_ids,
                        seed=derive_seed(self.config.seed, self.name, key),
                        sampling=self.config.sampling,
                    )
                )
        generations = iter((yield requests))
        return [
            [
                self._record(row, key, next(generations) if row.problem is None else None, engine)
                for key in self.keys(row.item)
            ]
            for row in rows
        ]

    def make_pairs(self, item: Item, records: Sequence[Mapping[str, Any]], model: str) -> ItemResult:
        """Makes a pair from each usable continuation of an item, and counts the skipped continuations by reason.

        ``records`` are the continuations as JSON objects. The pairs store ``model``, the name of the model.
        """
        result = ItemResult(tokens=sum(record.get("tokens", 0) for record in records))
        if sampled := records[0].get("chosen_tokens", 0):
            result.stage_tokens.update(chosen=sampled, continuations=result.tokens)
            result.tokens += sampled
        if result.skip_problem(records):
            return result
        is_wrong = _is_wrong(item)
        if is_wrong and not self.config.allow_wrong_chosen:  # older journals hold samples of such items
            return result.skip(WRONG_CHOSEN)
        seen: set[str] = set()
        for sample, record in enumerate(records):
            chosen = item.chosen if item.chosen is not None else record.get("chosen", "")
            scored = self._stored_score(item, record)
            reason = self._skip_reason(chosen, record, scored)
            if reason is None and record["text"] in seen:
                reason = "continuation is a duplicate"
            if reason is not None:
                result.skipped[reason] += 1
                continue
            seen.add(record["text"])
            provenance = {
                "pipeline": self.name,
                "model": model,
                "keep": self.config.keep,
                "unit": self.config.unit,
                "with_image": self.config.with_image,
                "cut": record["cut"],
                "sampling": dict(self._sampling),
                "seed": self.config.seed,
                "sample": sample,
                "key": record["key"],
                "finish": record["finish"],
                "generated_tokens": record["tokens"],
                "chosen_source": WRONG_SAMPLE if is_wrong else "input" if item.chosen is not None else "sample",
                "rejected_answer": scored.get("answer"),
            }
            pair = item.pair(item.question_with_options, chosen, record["text"], provenance)
            result.lines.append(("pairs", pair.to_dict()))
            if is_wrong:
                result.notes["pairs whose chosen response is a sample that was wrong"] += 1
        return result

    def _load(self, item: Item) -> _Row:
        """Checks an item and opens the media for the model. Returns the state of the item."""
        row = _Row(item, item.problem, chosen=item.chosen)
        if row.problem:
            row.details = item_fields(item)
            return row
        if _is_wrong(item) and not self.config.allow_wrong_chosen:
            row.problem = WRONG_CHOSEN
        elif item.chosen is None and not self.config.sample_chosen:
            row.problem = "no chosen response"
        elif self.config.with_image or item.chosen is None:
            try:
                row.media = item.load_media()
            except (OSError, ImageError) as error:
                row.details = media_fields(error)
                row.problem = row.details["problem"]
        return row

    def _conversation(self, row: _Row) -> Conversation:
        """Returns the prompt for a continuation. The prompt has images and videos only with ``with_image``."""
        with_image = self.config.with_image
        fields = prompt_fields(row.item, row.item.question_with_options, with_image=with_image)
        return Conversation(key=row.item.digest, **fields, **(row.media if with_image else {}))

    def _sample_chosen(self, rows: Sequence[_Row]) -> Generator[list[Request], list[Generation], None]:
        """Samples a chosen response for each row, and stores the response in the row.

        The model sees the images. If a response cannot be used, the row's ``problem`` is set. An example is a response
        with a wrong answer. The generator yields one list of requests, and the caller sends the generations.
        """
        if not rows:
            return
        requests = [
            Request(
                key=row.item.digest,
                **prompt_fields(row.item, row.item.question_with_options, with_image=True),
                **row.media,
                seed=derive_seed(self.config.seed, f"{self.name}.chosen", row.item.digest),
                sampling=self.config.sampling,
            )
            for row in rows
        ]
        generations = yield requests
        for row, generation in zip(rows, generations, strict=True):
            if generation.refusal is not None:
                row.details = refusal_fields(generation.refusal)
                row.problem = row.details["problem"]
            elif not generation.text.strip():
                row.problem = "sampled chosen response is empty"
            elif generation.finish_reason == "length":
                row.problem = "sampled chosen response cut off at max_new_tokens"
            elif is_degenerate(generation.text):
                row.problem = "sampled chosen response repeats itself"
            elif (score := self._score(row.item, generation.text)) and score["correct"] is not True:
                is_wrong = score["correct"] is False
                row.problem = f"sampled chosen response {'is wrong' if is_wrong else 'has no readable answer'}"
            row.chosen = generation.text
            row.sampled_tokens = generation.n_tokens

    def _record(self, row: _Row, key: str, generation: Generation | None, engine: Engine) -> dict[str, Any]:
        """Returns the JSON object that is stored for a continuation.

        ``key`` identifies the continuation. If ``generation`` is None, the object holds the item's problem.
        """
        record: dict[str, Any] = {"key": key}
        if row.sampled_tokens is not None:
            record |= {"chosen": row.chosen, "chosen_tokens": row.sampled_tokens}
        if generation is None:
            return {**record, **row.details, "problem": row.problem}
        if generation.refusal is not None:
            return {**record, **refusal_fields(generation.refusal)}
        text = engine.decode_response(self._conversation(row), [*row.prefix.token_ids, *generation.token_ids])
        record |= {
            "text": text,
            "finish": generation.finish_reason,
            "tokens": generation.n_tokens,
            "cut": {
                "characters": common_length(row.chosen or "", row.prefix.text),
                "tokens": len(row.prefix.token_ids),
            },
        }
        return record | self._score(row.item, text)

    def _skip_reason(self, chosen: str, record: Mapping[str, Any], scored: Mapping[str, Any]) -> str | None:
        """Returns the reason to skip a continuation, or None if it can become a rejected response.

        ``record`` is the stored continuation. ``scored`` is the result of ``_stored_score``.
        """
        if not chosen.strip():  # older journals hold continuations of such responses
            return "sampled chosen response is empty"
        if record["finish"] == "length" and not self.config.allow_truncated:
            return "continuation cut off at max_new_tokens"
        if record["tokens"] == 0 or not record["text"].strip():
            return "continuation is empty"
        if " ".join(record["text"].split()) == " ".join(chosen.split()):
            return "continuation equals the chosen response"
        if _BROKEN in record["text"] and _BROKEN not in chosen:
            return "continuation holds a broken character"
        if is_degenerate(record["text"]):
            return "continuation repeats itself"
        if scored.get("correct"):
            return "answer is still right"
        if scored.get("answer") is not None and scored["correct"] is None:
            return "answer is unreadable, and may still be right"
        return None

    def _score(self, item: Item, text: str) -> dict[str, Any]:
        """Compares the answer in a response with the true answers, and returns the answer and the result as a dict.

        ``text`` is the response. The dict is empty if the item has no true answer, or the settings have no matcher.
        """
        if not item.truths or self._scorer is None:
            return {}
        return self._scorer.score_fields(text, item)

    def _stored_score(self, item: Item, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a dict with the answer and the score of a stored continuation.

        The dict is empty if the item has no true answer, or the settings have no matcher.
        """
        if not item.truths or self._scorer is None:
            return {}
        return self._scorer.stored_fields(record, item)


def _is_wrong(item: Item) -> bool:
    return item.chosen is not None and item.extra.get("chosen_source") == WRONG_SAMPLE
