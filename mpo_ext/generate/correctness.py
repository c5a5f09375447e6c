"""Pairs from the correctness of answers: right samples against wrong ones. Run by ``mpo_ext.generate.runner``.

Every choice among possible pairs follows a hash of the seed and of the responses, so it does not depend on the order
of anything.
"""

import collections
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpo_ext.answers import extract_answer, is_same_answer, matcher
from mpo_ext.checks import check_integer, check_number
from mpo_ext.data.records import Pair
from mpo_ext.generate.engine import Engine, Request, SamplingConfig, derive_seed
from mpo_ext.generate.items import WRONG_SAMPLE, Item
from mpo_ext.generate.outputs import ItemResult
from mpo_ext.generate.prompts import get_template, render
from mpo_ext.generate.repetition import is_degenerate

_LENGTH_BINS = 4  # per doubling of the length


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorrectnessConfig:
    """How questions are answered and samples are paired.

    Attributes:
        samples: Responses per question.
        sampling: How they are drawn.
        seed: Source of every draw and choice.
        template: Name of the template that questions are put in (``mpo_ext.generate.prompts``), with the ``options``
            of the item where it has some; None puts them as they are. Pairs hold the prompt as the model saw it.
        style: How the answer stands in a response, as in ``extract_answer``; None takes that of the template, or
            "final_answer".
        matcher: Kind of the matcher that compares it with the truth, and its options.
        pairs_per_question: Most pairs that one question gives to each of the two outputs; 0 takes all.
        accuracy: Lowest and highest share of right samples of a question that gives pairs.
        length_balance: Prefers pairs whose responses are of about one length; else length does not matter.
        reuse_limit: Most pairs of one output that a response is in; 0 sets no limit.
        dedupe: Takes equal responses to a question for one.
        allow_truncated: Takes responses that ``max_new_tokens`` cut off.
        allow_degenerate: Takes responses caught in a loop.
    """

    samples: int = 32
    sampling: SamplingConfig = dataclasses.field(default_factory=lambda: SamplingConfig(max_new_tokens=4096))
    seed: int = 0
    template: str | None = None
    style: str | None = None
    matcher: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "vqa"})
    pairs_per_question: int = 15
    accuracy: tuple[float, float] = (0.0, 1.0)
    length_balance: bool = False
    reuse_limit: int = 0
    dedupe: bool = True
    allow_truncated: bool = False
    allow_degenerate: bool = False

    def __post_init__(self) -> None:
        check_integer("samples", self.samples, least=2)
        for name in ("seed", "pairs_per_question", "reuse_limit"):
            check_integer(name, getattr(self, name), least=0)
        for value in self.accuracy:
            check_number("accuracy", value)
        if len(self.accuracy) != 2 or not 0 <= self.accuracy[0] <= self.accuracy[1] <= 1:
            raise ValueError(f"accuracy must be two numbers in [0, 1], the lower first, got {self.accuracy}")


@dataclasses.dataclass(frozen=True, slots=True)
class _Response:
    text: str
    answer: str | None
    record: Mapping[str, Any]


class Correctness:
    """The pipeline; ``mpo_ext.generate.runner.run`` runs it.

    Outputs: ``pairs`` (right against wrong), ``format_pairs`` (right against unreadable) and ``unsolved``: the
    questions without a right sample, each with one of its readable samples as ``chosen`` where it brought none, so
    that ``DropoutNTP`` takes them.

    Args:
        config: How questions are answered and samples are paired.
    """

    name = "correctness"
    outputs = ("pairs", "format_pairs", "unsolved")

    def __init__(self, config: CorrectnessConfig | None = None) -> None:
        self.config = config or CorrectnessConfig()
        self._matcher = matcher(**self.config.matcher)
        self._sampling = dataclasses.asdict(self.config.sampling)
        self._template = get_template(self.config.template) if self.config.template is not None else None
        self._style = self.config.style or (self._template.answer_style if self._template else "final_answer")
        extract_answer("", self._style)  # an unknown style is said now, not after the first block

    def settings(self) -> dict[str, Any]:
        """What the records and the outputs depend on, as JSON can hold it."""
        return dataclasses.asdict(self.config)

    def keys(self, item: Item) -> list[str]:
        """Names of the records of an item, in their order."""
        return [f"{item.digest}-{sample}" for sample in range(self.config.samples)]

    def sample(self, items: Sequence[Item], engine: Engine) -> list[list[dict[str, Any]]]:
        """Answers the questions of a block; an item that cannot be used gets records that say why."""
        problems: dict[int, str] = {}
        requests: list[Request] = []
        for row, item in enumerate(items):
            if item.problem or not item.truths:
                problems[row] = item.problem or "no true answer"
                continue
            try:
                images = item.load_images()
            except OSError:
                problems[row] = "image cannot be read"
                continue
            prompt = self._prompt(item)
            for key in self.keys(item):
                seed = derive_seed(self.config.seed, self.name, key)
                sampling = self.config.sampling
                requests.append(Request(key=key, question=prompt, images=images, seed=seed, sampling=sampling))
        generations = iter(engine.generate(requests))
        records: list[list[dict[str, Any]]] = []
        for row, item in enumerate(items):
            if row in problems:
                records.append([{"key": key, "problem": problems[row]} for key in self.keys(item)])
                continue
            known: dict[str, dict[str, Any]] = {}  # samples often agree, and some matchers take their time
            records.append([])
            for key in self.keys(item):
                generation = next(generations)
                answer = extract_answer(generation.text, self._style)
                if answer is not None and answer not in known:
                    verdict = self._matcher(answer, item.truths)
                    known[answer] = {"correct": verdict.correct, "score": verdict.score, "rule": verdict.rule}
                records[-1].append(
                    {
                        "key": key,
                        "text": generation.text,
                        "finish": generation.finish_reason,
                        "tokens": len(generation.token_ids),
                        "answer": answer,
                        **(known[answer] if answer is not None else {}),
                    }
                )
        return records

    def make_pairs(self, item: Item, records: Sequence[Mapping[str, Any]], model: str) -> ItemResult:
        """Pairs the samples of a question."""
        outcome = ItemResult(tokens=sum(record.get("tokens", 0) for record in records))
        if problem := next((record["problem"] for record in records if "problem" in record), None):
            outcome.refuse(problem)
            return outcome
        responses = [response for response in map(_response, records) if self._is_usable(response, outcome)]
        right = [response for response in responses if response.record.get("correct")]
        wrong = [response for response in responses if response.record.get("correct") is False]
        unreadable = [response for response in responses if response.answer is None]
        if not right:
            outcome.refuse("question without a right answer")
            outcome.lines.append(("unsolved", self._unsolved(item, wrong)))
            return outcome
        accuracy = len(right) / len(responses)
        if not self.config.accuracy[0] <= accuracy <= self.config.accuracy[1]:
            outcome.refuse("accuracy outside the band")
            return outcome
        if len(right) == len(responses):
            outcome.refuse("question with right answers only")
            return outcome
        if self.config.dedupe:
            right, wrong, unreadable = (self._distinct(kind, outcome) for kind in (right, wrong, unreadable))
        for name, rejected in (("pairs", wrong), ("format_pairs", unreadable)):
            for left, other in self._pairs(item, right, rejected, outcome):
                pair = self._pair(item, left, other, model=model, accuracy=accuracy)
                outcome.lines.append((name, pair.to_dict()))
        if not outcome.lines:
            outcome.refuse("question without a pair")
        return outcome

    def _prompt(self, item: Item) -> str:
        """The question as the model sees it."""
        if self._template is None:
            return item.question
        return render(self._template, item.question, item.extra.get("options"))

    def _is_usable(self, response: _Response, outcome: ItemResult) -> bool:
        reason = None
        if response.record["finish"] == "length" and not self.config.allow_truncated:
            reason = "sample cut off at max_new_tokens"
        elif not response.text.strip():
            reason = "sample is empty"
        elif not self.config.allow_degenerate and is_degenerate(response.text):
            reason = "sample repeats itself"
        if reason is not None:
            outcome.refused[reason] += 1
        return reason is None

    def _distinct(self, responses: Sequence[_Response], outcome: ItemResult) -> list[_Response]:
        kept = {" ".join(response.text.split()): response for response in reversed(responses)}
        if len(kept) < len(responses):
            outcome.refused["sample is a duplicate"] += len(responses) - len(kept)
        return list(reversed(kept.values()))

    def _pairs(
        self, item: Item, right: Sequence[_Response], rejected: Sequence[_Response], outcome: ItemResult
    ) -> Iterator[tuple[_Response, _Response]]:
        """Yields pairs, best first, until there are enough."""
        ranked = sorted(
            itertools.product(right, rejected), key=lambda pair: (self._gap(*pair), self._rank(item, *pair))
        )
        uses: collections.Counter[tuple[str, str]] = collections.Counter()
        taken: set[tuple[str, str]] = set()
        limit = self.config.reuse_limit or math.inf
        for chosen, other in ranked:
            if self.config.pairs_per_question and len(taken) == self.config.pairs_per_question:
                return
            if (chosen.text, other.text) in taken:
                continue
            if uses["chosen", chosen.text] >= limit or uses["rejected", other.text] >= limit:
                continue
            if is_same_answer(chosen.answer, other.answer, self._matcher):
                outcome.refused["same answer on both sides"] += 1
                continue
            uses["chosen", chosen.text] += 1
            uses["rejected", other.text] += 1
            taken.add((chosen.text, other.text))
            yield chosen, other

    def _gap(self, chosen: _Response, other: _Response) -> int:
        """How far apart the lengths are, in bins."""
        if not self.config.length_balance:
            return 0
        return round(_LENGTH_BINS * abs(math.log2(len(chosen.text) / len(other.text))))

    def _rank(self, item: Item, *responses: _Response) -> bytes:
        parts = (self.config.seed, item.digest, *(response.text for response in responses))
        return hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=16).digest()

    def _pair(self, item: Item, chosen: _Response, other: _Response, *, model: str, accuracy: float) -> Pair:
        provenance = {
            "pipeline": self.name if other.answer is not None else "format",
            "model": model,
            "sampling": dict(self._sampling),
            "seed": self.config.seed,
            "chosen_key": chosen.record["key"],
            "rejected_key": other.record["key"],
            "chosen_answer": chosen.answer,
            "rejected_answer": other.answer,
            "rule": chosen.record["rule"],
            "accuracy": round(accuracy, 6),
            "generated_tokens": [chosen.record["tokens"], other.record["tokens"]],
        }
        return Pair(
            question=self._prompt(item),
            chosen=chosen.text,
            rejected=other.text,
            images=item.pair_images,
            answer_gt=item.answer_gt,
            provenance=provenance,
            extra=item.pair_extra,
        )

    def _unsolved(self, item: Item, wrong: Sequence[_Response]) -> dict[str, Any]:
        """The item for DropoutNTP: where it brought no chosen response, one of its readable samples stands in."""
        source = "input"
        if item.chosen is None and wrong:
            picked = min(wrong, key=lambda response: self._rank(item, response))
            item, source = dataclasses.replace(item, chosen=picked.text), WRONG_SAMPLE
        item = dataclasses.replace(item, question=self._prompt(item))
        return {**item.to_dict(), **({"chosen_source": source} if item.chosen is not None else {})}


def _response(record: Mapping[str, Any]) -> _Response:
    return _Response(record["text"], record["answer"], record)
