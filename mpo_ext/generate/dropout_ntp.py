"""DropoutNTP: the model finishes the beginning of a good response without the image. Run by ``generate.runner``.

What the model then makes up is the rejected response: it begins like the chosen one and goes wrong where one would
have had to look. Prefix and continuation are joined as tokens and decoded as one: no space is lost between them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mpo_ext.answers import Matcher, extract_answer, matcher
from mpo_ext.chat import IMAGE_PLACEHOLDER
from mpo_ext.checks import check_integer, check_number
from mpo_ext.data.records import Pair
from mpo_ext.generate.engine import Engine, Request, SamplingConfig, derive_seed
from mpo_ext.generate.items import WRONG_SAMPLE, Item
from mpo_ext.generate.outputs import ItemResult
from mpo_ext.generate.repetition import is_degenerate

WRONG_CHOSEN = "chosen is a sample that was wrong (--allow-wrong-chosen takes it)"
_BROKEN = "\ufffd"  # what decoding puts for half a character


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DropoutNTPConfig:
    """How responses are cut and finished.

    Attributes:
        keep: Share of the chosen response that is kept, in [0, 1).
        unit: "tokens" counts tokens, which works for every language; "words" counts what stands between single spaces,
            as the authors' script does.
        with_image: Leaves the image in the question.
        samples: Continuations per response.
        sampling: How they are drawn.
        seed: Source of every draw.
        sample_chosen: Where an item has no chosen response, lets the model answer it with its image first, as the
            paper does; otherwise such an item is refused.
        allow_truncated: Takes continuations that ``max_new_tokens`` cut off.
        allow_wrong_chosen: Takes items whose chosen response is a sample that was wrong, as they stand in the
            ``unsolved.jsonl`` of the correctness pipeline; otherwise such an item is refused.
        style: How the answer stands in a response, as in ``extract_answer``; for items that have a true answer.
        matcher: Kind of the matcher that compares it, and its options. None compares nothing.
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
        check_number("keep", self.keep)
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep must be in [0, 1), got {self.keep}")
        if self.unit not in ("tokens", "words"):
            raise ValueError(f"unit must be 'tokens' or 'words', got {self.unit!r}")
        check_integer("samples", self.samples, least=1)
        check_integer("seed", self.seed, least=0)


@dataclasses.dataclass(frozen=True, slots=True)
class Prefix:
    """The part of a response that is kept.

    Attributes:
        token_ids: What the assistant's turn begins with.
        text: The same as text.
    """

    token_ids: tuple[int, ...]
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Sampled:
    """A chosen response that the model gave, its length, and why it is no good."""

    text: str
    tokens: int
    problem: str | None


class DropoutNTP:
    """The pipeline; ``mpo_ext.generate.runner.run`` runs it. Output: ``pairs``.

    Args:
        config: How responses are cut and finished.
    """

    name = "dropout_ntp"
    outputs = ("pairs",)

    def __init__(self, config: DropoutNTPConfig | None = None) -> None:
        self.config = config or DropoutNTPConfig()
        self._sampling = dataclasses.asdict(self.config.sampling)
        self._matcher: Matcher | None = matcher(**self.config.matcher) if self.config.matcher else None
        extract_answer("", self.config.style)  # an unknown style is said now, not after the first block

    def settings(self) -> dict[str, Any]:
        """What the records and the outputs depend on, as JSON can hold it."""
        settings = dataclasses.asdict(self.config)
        if not self.config.allow_wrong_chosen:  # as journals have it that were written before there was a choice
            del settings["allow_wrong_chosen"]
        return settings

    def keys(self, item: Item) -> list[str]:
        """Names of the records of an item, in their order."""
        return [f"{item.digest}-{sample}" for sample in range(self.config.samples)]

    def cut(self, chosen: str, engine: Engine) -> Prefix:
        """Keeps the first part of a response.

        A cut in tokens moves back to the end of a character where it would fall into one.
        """
        if self.config.unit == "words":
            words = chosen.split(" ")
            ids = engine.encode(" ".join(words[: int(len(words) * self.config.keep)]).strip())
            return Prefix(tuple(ids), engine.decode(ids))
        ids = engine.encode(chosen)
        count = int(len(ids) * self.config.keep)
        text = engine.decode(ids[:count])
        while count > 0 and text.endswith(_BROKEN):
            count -= 1
            text = engine.decode(ids[:count])
        return Prefix(tuple(ids[:count]), text)

    def sample(self, items: Sequence[Item], engine: Engine) -> list[list[dict[str, Any]]]:
        """Cuts and continues the responses of a block; an item that cannot be used gets records that say why."""
        problems: dict[int, str] = {}
        images: dict[int, tuple[Any, ...]] = {}
        for row, item in enumerate(items):
            if item.problem:
                problems[row] = item.problem
            elif _is_wrong(item) and not self.config.allow_wrong_chosen:
                problems[row] = WRONG_CHOSEN
            elif item.chosen is None and not self.config.sample_chosen:
                problems[row] = "no chosen response"
            elif self.config.with_image or item.chosen is None:
                try:
                    images[row] = item.load_images()
                except OSError:
                    problems[row] = "image cannot be read"
        chosen = {row: item.chosen for row, item in enumerate(items) if item.chosen is not None}
        sampled = self._sample_chosen(items, [row for row in images if row not in chosen], images, engine)
        for row, own in sampled.items():
            chosen[row] = own.text
            if own.problem is not None:
                problems[row] = own.problem

        requests: list[Request] = []
        prefixes: dict[int, Prefix] = {}
        for row, item in enumerate(items):
            if row in problems:
                continue
            prefix = prefixes[row] = self.cut(chosen[row], engine)
            if not prefix.token_ids and self.config.keep > 0:
                problems[row] = "chosen response too short to cut"
                continue
            for key in self.keys(item):
                requests.append(
                    Request(
                        key=key,
                        question=item.question if self.config.with_image else without_placeholders(item.question),
                        images=images[row] if self.config.with_image else (),
                        prefix_ids=prefix.token_ids,
                        seed=derive_seed(self.config.seed, self.name, key),
                        sampling=self.config.sampling,
                    )
                )
        generations = iter(engine.generate(requests))
        records: list[list[dict[str, Any]]] = []
        for row, item in enumerate(items):
            records.append([])
            for key in self.keys(item):
                record: dict[str, Any] = {"key": key}
                if row in sampled:
                    record |= {"chosen": chosen[row], "chosen_tokens": sampled[row].tokens}
                if row in problems:
                    record["problem"] = problems[row]
                    records[-1].append(record)
                    continue
                generation, prefix = next(generations), prefixes[row]
                text = engine.decode([*prefix.token_ids, *generation.token_ids])
                record |= {
                    "text": text,
                    "finish": generation.finish_reason,
                    "tokens": len(generation.token_ids),
                    "cut": {"characters": _common(chosen[row], prefix.text), "tokens": len(prefix.token_ids)},
                }
                record |= self._verdict(item, text)
                records[-1].append(record)
        return records

    def make_pairs(self, item: Item, records: Sequence[Mapping[str, Any]], model: str) -> ItemResult:
        """Makes a pair of each continuation that is a negative, and counts the others by reason."""
        outcome = ItemResult(tokens=sum(record.get("tokens", 0) for record in records))
        outcome.tokens += records[0].get("chosen_tokens", 0)
        if problem := next((record["problem"] for record in records if "problem" in record), None):
            return outcome.refuse(problem)
        is_wrong = _is_wrong(item)
        if is_wrong and not self.config.allow_wrong_chosen:  # in a journal from before there was this rule
            return outcome.refuse(WRONG_CHOSEN)
        seen: set[str] = set()
        for sample, record in enumerate(records):
            chosen = item.chosen if item.chosen is not None else record.get("chosen", "")
            reason = self._reason(chosen, record)
            if reason is None and record["text"] in seen:
                reason = "continuation is a duplicate"
            if reason is not None:
                outcome.refused[reason] += 1
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
                "rejected_answer": record.get("answer"),
            }
            pair = Pair(
                question=item.question,
                chosen=chosen,
                rejected=record["text"],
                images=item.pair_images,
                answer_gt=item.answer_gt,
                provenance=provenance,
                extra=item.pair_extra,
            )
            outcome.lines.append(("pairs", pair.to_dict()))
            if is_wrong:
                outcome.notes["pairs whose chosen response is a sample that was wrong"] += 1
        return outcome

    def _reason(self, chosen: str, record: Mapping[str, Any]) -> str | None:
        """Why a continuation teaches nothing; None where it is a negative."""
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
        if record.get("correct"):
            return "answer is still right"
        return None

    def _sample_chosen(
        self, items: Sequence[Item], rows: Sequence[int], images: Mapping[int, tuple[Any, ...]], engine: Engine
    ) -> dict[int, _Sampled]:
        """Answers questions with their images."""
        requests = [
            Request(
                key=items[row].digest,
                question=items[row].question,
                images=images[row],
                seed=derive_seed(self.config.seed, f"{self.name}.chosen", items[row].digest),
                sampling=self.config.sampling,
            )
            for row in rows
        ]
        responses: dict[int, _Sampled] = {}
        for row, generation in zip(rows, engine.generate(requests) if requests else (), strict=True):
            problem = None
            if generation.finish_reason == "length":
                problem = "sampled chosen response cut off at max_new_tokens"
            elif is_degenerate(generation.text):
                problem = "sampled chosen response repeats itself"
            elif self._verdict(items[row], generation.text).get("correct") is False:
                problem = "sampled chosen response is wrong"
            responses[row] = _Sampled(generation.text, len(generation.token_ids), problem)
        return responses

    def _verdict(self, item: Item, text: str) -> dict[str, Any]:
        """The answer of a response and whether it is right, for an item that has a true answer."""
        if not item.truths or self._matcher is None:
            return {}
        answer = extract_answer(text, self.config.style)
        return {"answer": answer, "correct": answer is not None and self._matcher(answer, item.truths).correct}


def without_placeholders(question: str) -> str:
    """The question without the places for images."""
    return question.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "").strip()


def _is_wrong(item: Item) -> bool:
    return item.chosen is not None and item.extra.get("chosen_source") == WRONG_SAMPLE


def _common(chosen: str, prefix: str) -> int:
    """How many characters of the chosen response the prefix repeats."""
    if chosen.startswith(prefix):
        return len(prefix)
    return next((at for at, (left, right) in enumerate(zip(chosen, prefix, strict=False)) if left != right), 0)
