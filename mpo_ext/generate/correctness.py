"""The correctness pipeline, which makes pairs of a right and a wrong sample. ``mpo_ext.generate.runner`` runs it.

If more pairs are possible than requested, a hash of the seed, the item and the responses selects the pairs. With
``length_balance``, responses of similar length come first. The order of the input has no effect.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpo_ext.answers import is_same_answer
from mpo_ext.checks import check_integer, check_number
from mpo_ext.data.records import Pair
from mpo_ext.generate.engine import Engine, SamplingConfig
from mpo_ext.generate.feeding import Steps, run_steps
from mpo_ext.generate.items import WRONG_SAMPLE, Item
from mpo_ext.generate.outputs import ItemResult
from mpo_ext.generate.prompts import get_template
from mpo_ext.generate.questions import AnswerScorer, QuestionSampler
from mpo_ext.generate.responses import choice_hash, distinct, skip_reason

_BINS_PER_DOUBLING = 4  # number of bins per doubling of the length ratio of two responses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorrectnessConfig:
    """Settings of the correctness pipeline.

    Attributes:
        samples: Number of responses per question.
        sampling: Settings for drawing tokens.
        seed: Seed of all draws and choices.
        template: Name of the prompt template (``mpo_ext.generate.prompts``). None: the prompt is the question,
            followed by its options. The whole prompt is stored in the pairs as their ``question``.
        style: How to find the answer in a response, such as "boxed"; see ``extract_answer``. None: the style of the
            template, or "final_answer" without a template.
        matcher: Kind and options of the matcher that compares an answer with the truth.
        pairs_per_question: Maximum number of pairs per question in each of the outputs ``pairs`` and ``format_pairs``;
            0: no limit.
        accuracy: Minimum and maximum fraction of right samples of a question. A question outside this range gives no
            pairs. Samples that are skipped as truncated, degenerate or empty do not count.
        length_balance: Whether to prefer pairs whose responses have similar lengths.
        reuse_limit: Maximum number of pairs in one output that use the same response; 0: no limit.
        dedupe: Whether to use equal responses to a question only once.
        allow_truncated: Whether to use responses that ``max_new_tokens`` cut off.
        allow_degenerate: Whether to use responses that repeat themselves.
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
class ScoredSample:
    """A response and the result of comparing its answer with the truth.

    Attributes:
        text: The response.
        answer: The extracted answer; None if the response has no answer.
        correct: True for a right answer, False for a wrong answer. None: there is no answer, or the matcher cannot
            decide.
        rule: Name of the comparison that decided, such as "choice:letter"; None without an answer.
        record: JSON object of the response, as stored on disk.
    """

    text: str
    answer: str | None
    correct: bool | None
    rule: str | None
    record: Mapping[str, Any]


class Correctness:
    """Makes pairs of a right and a wrong sample; ``mpo_ext.generate.runner.run`` runs this pipeline.

    A sample is in no pair if it has an answer, but the matcher cannot tell whether the answer is right. The output
    files, ``<name>.jsonl``, are:

    - ``pairs``: the chosen response is a right sample, and the rejected response is a wrong sample.
    - ``format_pairs``: the chosen response is a right sample. The rejected response is a sample without an answer in
      the form that ``style`` requires.
    - ``unsolved``: questions without a right sample, as input for ``DropoutNTP``. That pipeline needs a ``chosen``
      response. If a question came without ``chosen``, one of its wrong samples (if any) is stored as ``chosen``. The
      field ``chosen_source`` marks this sample as wrong.
    """

    name = "correctness"
    outputs = ("pairs", "format_pairs", "unsolved")
    needs_truths = True

    def __init__(self, config: CorrectnessConfig | None = None) -> None:
        self.config = config or CorrectnessConfig()
        template = get_template(self.config.template) if self.config.template is not None else None
        self.questions = QuestionSampler(
            self.name, self.config.samples, self.config.sampling, self.config.seed, template
        )
        self.scorer = AnswerScorer(self.config.matcher, style=self.config.style, template=template)
        self._sampling = dataclasses.asdict(self.config.sampling)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that determine the samples and the output files, as JSON values."""
        return dataclasses.asdict(self.config)

    def keys(self, item: Item) -> list[str]:
        return self.questions.keys(item)

    def sample(self, items: Sequence[Item], engine: Engine) -> list[list[dict[str, Any]]]:
        """Samples responses to each item, scores them, and returns one list of records per item.

        A record is a JSON object with a response and its score. If an item cannot be used, its records hold the reason
        as ``problem`` instead.
        """
        return run_steps(self.steps(items, engine), engine)

    def steps(self, items: Sequence[Item], engine: Engine) -> Steps:
        """Yields lists of requests. The caller sends the generations of each list with ``send``.

        At the end, this generator returns the same value as ``sample``.
        """
        all_records = yield from self.questions.steps(items, engine)
        for item, records in zip(items, all_records, strict=True):
            for record in records:
                if "problem" not in record:
                    record |= self.scorer.score_fields(record["text"], item)
        return all_records

    def make_pairs(self, item: Item, records: Sequence[Mapping[str, Any]], model: str) -> ItemResult:
        result = ItemResult(tokens=sum(record.get("tokens", 0) for record in records))
        if result.skip_problem(records):
            return result
        samples = [self._scored(item, record) for record in records]
        samples = [sample for sample in samples if self._is_usable(sample, result)]
        right = [sample for sample in samples if sample.correct is True]
        wrong = [sample for sample in samples if sample.correct is False]
        unanswered = [sample for sample in samples if sample.answer is None]
        n_unreadable = len(samples) - len(right) - len(wrong) - len(unanswered)
        if n_unreadable:
            result.skipped["answer of the sample is unreadable"] += n_unreadable
        if not right:
            result.lines.append(("unsolved", self._unsolved_line(item, wrong)))
            return result.skip("question without a right answer")
        accuracy = len(right) / len(samples)
        if not self.config.accuracy[0] <= accuracy <= self.config.accuracy[1]:
            return result.skip("accuracy outside the band")
        if len(right) == len(samples):
            return result.skip("question with right answers only")
        if self.config.dedupe:
            right, wrong, unanswered = (distinct(samples, result) for samples in (right, wrong, unanswered))
        for name, candidates in (("pairs", wrong), ("format_pairs", unanswered)):
            for chosen, rejected in self._choose_pairs(item, right, candidates, result):
                pair = self._pair(item, chosen, rejected, model=model, accuracy=accuracy)
                result.lines.append((name, pair.to_dict()))
        return result if result.lines else result.skip("question without a pair")

    def _scored(self, item: Item, record: Mapping[str, Any]) -> ScoredSample:
        fields = self.scorer.stored_fields(record, item)
        return ScoredSample(record["text"], fields["answer"], fields["correct"], fields.get("rule"), record)

    def _is_usable(self, sample: ScoredSample, result: ItemResult) -> bool:
        allowed = {name: getattr(self.config, name) for name in ("allow_truncated", "allow_degenerate")}
        reason = skip_reason(sample.record, **allowed)
        if reason is not None:
            result.skipped[reason] += 1
        return reason is None

    def _choose_pairs(
        self, item: Item, right: Sequence[ScoredSample], candidates: Sequence[ScoredSample], result: ItemResult
    ) -> Iterator[tuple[ScoredSample, ScoredSample]]:
        """Yields (right sample, candidate) tuples, at most ``pairs_per_question``.

        The candidates are wrong samples, or samples without an answer. A hash determines the order of the tuples. With
        ``length_balance``, tuples of two samples with similar lengths come first. If both samples have the same
        answer, the tuple is skipped, and ``result`` counts it.
        """
        ranked = sorted(
            itertools.product(right, candidates), key=lambda pair: (self._length_gap(*pair), self._hash(item, *pair))
        )
        uses: collections.Counter[tuple[str, str]] = collections.Counter()
        taken: set[tuple[str, str]] = set()
        limit = self.config.reuse_limit or math.inf
        for chosen, rejected in ranked:
            if self.config.pairs_per_question and len(taken) == self.config.pairs_per_question:
                return
            if (chosen.text, rejected.text) in taken:
                continue
            if uses["chosen", chosen.text] >= limit or uses["rejected", rejected.text] >= limit:
                continue
            if is_same_answer(chosen.answer, rejected.answer, self.scorer.matcher_for(item)):
                result.skipped["same answer on both sides"] += 1
                continue
            uses["chosen", chosen.text] += 1
            uses["rejected", rejected.text] += 1
            taken.add((chosen.text, rejected.text))
            yield chosen, rejected

    def _length_gap(self, chosen: ScoredSample, rejected: ScoredSample) -> int:
        """Returns a measure of the difference in length of two responses; 0 without ``length_balance``.

        The measure is 4 if one response has twice as many characters as the other, and 8 if it has four times as many.
        Between these ratios, it is logarithmic and rounded to an integer.
        """
        if not self.config.length_balance:
            return 0
        return round(_BINS_PER_DOUBLING * abs(math.log2(len(chosen.text) / len(rejected.text))))

    def _hash(self, item: Item, *samples: ScoredSample) -> bytes:
        return choice_hash(self.config.seed, item, *(sample.text for sample in samples))

    def _pair(self, item: Item, chosen: ScoredSample, rejected: ScoredSample, *, model: str, accuracy: float) -> Pair:
        provenance = {
            "pipeline": self.name if rejected.answer is not None else "format",
            "model": model,
            "sampling": dict(self._sampling),
            "seed": self.config.seed,
            "chosen_key": chosen.record["key"],
            "rejected_key": rejected.record["key"],
            "chosen_answer": chosen.answer,
            "rejected_answer": rejected.answer,
            "rule": chosen.rule,
            "accuracy": round(accuracy, 6),
            "generated_tokens": [chosen.record["tokens"], rejected.record["tokens"]],
        }
        return item.pair(self.questions.prompt(item), chosen.text, rejected.text, provenance)

    def _unsolved_line(self, item: Item, wrong: Sequence[ScoredSample]) -> dict[str, Any]:
        """Returns the item as an input line for DropoutNTP, which needs a chosen response.

        If the item has no chosen response, a wrong sample (if any) becomes the chosen response. ``chosen_source``
        marks such a chosen response as wrong. DropoutNTP uses such a response only with ``allow_wrong_chosen``.
        """
        # An earlier run may have marked the chosen response of the input as wrong.
        source = WRONG_SAMPLE if item.extra.get("chosen_source") == WRONG_SAMPLE else "input"
        if item.chosen is None and wrong:
            sample = min(wrong, key=lambda sample: self._hash(item, sample))
            item, source = dataclasses.replace(item, chosen=sample.text), WRONG_SAMPLE
        item = dataclasses.replace(item, question=self.questions.prompt(item))
        return {**item.to_dict(), **({"chosen_source": source} if item.chosen is not None else {})}
