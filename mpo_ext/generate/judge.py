"""The judge pipeline: a judge model compares or rates sampled responses, and prefers the chosen response of each pair.

The judge compares two responses in both orders. If its preference changes with the order, the responses form no pair.
``mpo_ext.generate.runner`` runs the pipeline.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

from mpo_ext.checks import check_choice, check_integer, check_number
from mpo_ext.generate.choices import check_prompt, fill, quoted
from mpo_ext.generate.engine import Engine, Generation, Request, SamplingConfig, derive_seed
from mpo_ext.generate.feeding import Steps, run_steps
from mpo_ext.generate.items import Item, media_problem
from mpo_ext.generate.outputs import ItemResult
from mpo_ext.generate.prompts import get_template
from mpo_ext.generate.questions import QuestionSampler
from mpo_ext.generate.responses import (
    RatedResponse,
    choice_hash,
    distinct,
    normalized,
    pairs_by_score,
    skip_reason,
)
from mpo_ext.images import ImageError

COMPARISON_PROMPT = """Question: {question}

Response A: {first}

Response B: {second}

Which response answers the question better? Judge whether a response is correct and whether it helps; ignore its \
length and its place. Reply with A or B."""
RATING_PROMPT = """Question: {question}

Response: {response}

How well does the response answer the question? Judge whether it is correct and whether it helps; ignore its length. \
Reply with a number from 1 (worst) to {best} (best)."""

_LETTERS = (("A",), ("B",))
_LETTER = re.compile(r"\W*(?:(?:Response|Answer|Verdict)\W+)?([AB])\W*", re.IGNORECASE)
_RATING = re.compile(r"\W*(?:(?:Rating|Score|Answer)\W+)?(\d)(?:\s*/\s*\d)?\W*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """Settings of the judge pipeline. "The judge" is the model that compares or rates the responses.

    Attributes:
        samples: Number of responses per question.
        sampling: Settings for drawing the tokens of the responses.
        seed: Seed of all draws and choices.
        template: Name of the prompt template (``mpo_ext.generate.prompts``); None: the question with its options.
        mode: "pairwise": the judge compares two responses, in both orders; "pointwise": the judge rates each response.
        judging: Settings for drawing the tokens of a verdict. They have no effect if the engine measures the
            probabilities of verdicts.
        best_rating: The best rating, from 2 to 9, with "pointwise" only; the worst rating is 1. If the engine measures
            the probability of each rating, the score of a response is the expected rating.
        min_gap: Minimum difference between the scores of a pair's two responses; with "pointwise" only.
        pairs_per_question: Maximum number of pairs per question; 0: no limit. With "pairwise", it limits the pairs of
            responses that the judge compares.
        max_shorter: Limit for shorter chosen responses, with "pointwise" only. A chosen response must have at least
            ``1 - max_shorter`` times as many words as the rejected response. 1: no limit.
        allow_truncated: Whether to use responses that ``max_new_tokens`` cut off.
        allow_degenerate: Whether to use responses that repeat themselves.
        judge: Name of the judge that is written into the pairs. It is only a label, and loads no model. None: the name
            of the model that wrote the responses.
        comparison_prompt: Prompt with ``{question}``, ``{first}`` and ``{second}``; the verdict is A or B.
        rating_prompt: Prompt with ``{question}``, ``{response}`` and ``{best}``; the verdict is a number.
    """

    samples: int = 4
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    seed: int = 0
    template: str | None = None
    mode: Literal["pairwise", "pointwise"] = "pairwise"
    judging: SamplingConfig = dataclasses.field(
        default_factory=lambda: SamplingConfig(temperature=0.0, top_k=0, max_new_tokens=8)
    )
    best_rating: int = 5
    min_gap: float = 0.5
    pairs_per_question: int = 2
    max_shorter: float = 1.0
    allow_truncated: bool = False
    allow_degenerate: bool = False
    judge: str | None = None
    comparison_prompt: str = COMPARISON_PROMPT
    rating_prompt: str = RATING_PROMPT

    def __post_init__(self) -> None:
        check_integer("samples", self.samples, least=2)
        check_integer("seed", self.seed, least=0)
        check_integer("pairs_per_question", self.pairs_per_question, least=0)
        check_choice("mode", self.mode, ("pairwise", "pointwise"))
        check_integer("best_rating", self.best_rating, least=2)
        if self.best_rating > 9:
            raise ValueError(f"best_rating must be at most 9, so that a rating is one digit, got {self.best_rating}")
        check_number("min_gap", self.min_gap, "(0, inf)")
        check_number("max_shorter", self.max_shorter, "[0, 1]")
        check_prompt("comparison_prompt", self.comparison_prompt, ("{question}", "{first}", "{second}"))
        check_prompt("rating_prompt", self.rating_prompt, ("{question}", "{response}", "{best}"))


@dataclasses.dataclass(slots=True)
class _Verdict:
    """A request to the judge, and the response whose record receives the verdict.

    Attributes:
        record: JSON object of the response. In a comparison, this is the first of the two responses.
        request: The request.
        opponent: Key of the second response in a comparison; None for a rating.
    """

    record: dict[str, Any]
    request: Request
    opponent: str | None = None


class Judge:
    """Makes pairs of responses by the preference of a judge model; ``mpo_ext.generate.runner.run`` runs this pipeline.

    The only output file is ``pairs.jsonl``.
    """

    name = "judge"
    outputs = ("pairs",)
    needs_truths = False

    def __init__(self, config: JudgeConfig | None = None) -> None:
        self.config = config or JudgeConfig()
        template = get_template(self.config.template) if self.config.template is not None else None
        self.questions = QuestionSampler(
            self.name, self.config.samples, self.config.sampling, self.config.seed, template, needs_truths=False
        )
        self._ratings = tuple((str(rating),) for rating in range(1, self.config.best_rating + 1))

    def settings(self) -> dict[str, Any]:
        """Returns the settings that determine the samples and the output files, as JSON values."""
        return dataclasses.asdict(self.config)

    def keys(self, item: Item) -> list[str]:
        return self.questions.keys(item)

    def sample(self, items: Sequence[Item], engine: Engine) -> list[list[dict[str, Any]]]:
        """Samples responses to the items, and asks the judge about the responses.

        Returns a list of records for each item. A record is a JSON object with a response and its verdicts.
        """
        return run_steps(self.steps(items, engine), engine)

    def steps(self, items: Sequence[Item], engine: Engine) -> Steps:
        """Yields lists of requests. The caller sends the generations of each list with ``send``.

        At the end, this generator returns the same value as ``sample``.
        """
        all_records = yield from self.questions.steps(items, engine)
        verdicts: list[_Verdict] = []
        for item, records in zip(items, all_records, strict=True):
            usable: dict[str, dict[str, Any]] = {}
            for record in records:
                if "problem" not in record and self._skip_reason(record) is None:
                    usable.setdefault(normalized(record["text"]), record)
            if len(usable) < 2:
                continue
            try:
                media = item.load_media()
            except (OSError, ImageError) as error:  # the files were readable when the responses were sampled
                for record in usable.values():
                    record["failure"] = media_problem(error)
                continue
            verdicts += self._verdicts(item, list(usable.values()), media)
        yield from self._judge(verdicts)
        return all_records

    def _verdicts(
        self, item: Item, records: Sequence[dict[str, Any]], media: dict[str, Any]
    ) -> Generator[_Verdict, None, None]:
        """Yields a ``_Verdict`` for each request to the judge about an item.

        In the mode "pointwise", a request asks for a rating of one response. Otherwise, it compares two responses.
        ``records`` are the JSON objects of distinct responses. ``media`` are the images and videos of the item.
        """
        question = quoted(item.prompt_text)
        if self.config.mode == "pointwise":
            for record in records:
                values = {"question": question, "response": quoted(record["text"])}
                prompt = fill(self.config.rating_prompt, best=str(self.config.best_rating), **values)
                yield _Verdict(record, self._request(f"{record['key']}.rating", prompt, media, self._ratings))
            return
        combinations = sorted(
            itertools.combinations(records, 2),
            key=lambda pair: choice_hash(self.config.seed, item, *(record["text"] for record in pair)),
        )
        for left, right in combinations[: self.config.pairs_per_question or None]:
            for first, second in ((left, right), (right, left)):
                texts = {"first": quoted(first["text"]), "second": quoted(second["text"])}
                prompt = fill(self.config.comparison_prompt, question=question, **texts)
                request = self._request(f"{first['key']}.{second['key']}", prompt, media, _LETTERS)
                yield _Verdict(first, request, second["key"])

    def _judge(self, verdicts: Sequence[_Verdict]) -> Generator[list[Request], list[Generation], None]:
        """Adds the judge's verdicts to the records of the responses.

        This generator yields the requests to the judge. The caller sends the judge's generations back.
        """
        generations = yield [verdict.request for verdict in verdicts]
        for verdict, generation in zip(verdicts, generations, strict=True):
            record = verdict.record
            record["verdict_tokens"] = record.get("verdict_tokens", 0) + generation.n_tokens
            if generation.refusal is not None:
                record["refusal"] = generation.refusal
            if verdict.opponent is None:
                record["rating"] = None if generation.refusal is not None else self._rating(generation)
            else:
                share = None if generation.refusal is not None else first_share(generation)
                record.setdefault("comparisons", []).append([verdict.opponent, share])

    def _request(self, key: str, prompt: str, media: dict[str, Any], choices: tuple[tuple[str, ...], ...]) -> Request:
        seed = derive_seed(self.config.seed, self.name, key)
        return Request(
            key=key, question=prompt, **media, seed=seed, sampling=self.config.judging, choices=choices,
            role="judge",
        )  # fmt: skip

    def _rating(self, generation: Generation) -> float | None:
        if (probs := generation.choice_probs) is not None:
            mean = sum(rating * prob for rating, prob in enumerate(probs, start=1)) / sum(probs)
            return round(mean, 6)
        match = _RATING.fullmatch(generation.text)
        return float(match[1]) if match and 1 <= int(match[1]) <= self.config.best_rating else None

    def make_pairs(self, item: Item, records: Sequence[Mapping[str, Any]], model: str) -> ItemResult:
        """Makes pairs from the judged responses to an item. In each pair, the judge prefers the chosen response.

        ``records`` are the responses with their verdicts, as JSON objects. ``model`` is the name of the model that
        wrote the responses.
        """
        result = ItemResult()
        for stage, field in (("responses", "tokens"), ("verdicts", "verdict_tokens")):
            result.stage_tokens[stage] = sum(record.get(field, 0) for record in records)
        result.tokens = result.stage_tokens.total()
        if result.skip_problem(records):
            return result
        usable = []
        for record in records:
            reason = self._skip_reason(record) or record.get("failure")
            if reason:
                result.skipped[reason] += 1
            else:
                usable.append(RatedResponse(record["text"], 0.0, record))
        responses = distinct(usable, result)
        choose = self._rated if self.config.mode == "pointwise" else self._compared
        for chosen, rejected in choose(item, responses, result):
            provenance = {
                "pipeline": self.name,
                "mode": self.config.mode,
                "model": model,
                "judge": self.config.judge or model,
                "sampling": dataclasses.asdict(self.config.sampling),
                "seed": self.config.seed,
                "chosen_key": chosen.record["key"],
                "rejected_key": rejected.record["key"],
                "scores": [chosen.score, rejected.score],
                "generated_tokens": [chosen.record["tokens"], rejected.record["tokens"]],
            }
            pair = item.pair(self.questions.prompt(item), chosen.text, rejected.text, provenance)
            result.lines.append(("pairs", pair.to_dict()))
        return result if result.lines else result.skip("question without a pair")

    def _rated(
        self, item: Item, responses: Sequence[RatedResponse], result: ItemResult
    ) -> list[tuple[RatedResponse, RatedResponse]]:
        rated = []
        for response in responses:
            rating = response.record.get("rating")
            if rating is not None:
                rated.append(dataclasses.replace(response, score=rating))
            elif len(responses) > 1:
                result.skipped["rating cannot be read"] += 1
        config = self.config
        return pairs_by_score(
            item, rated, result, min_gap=config.min_gap, max_shorter=config.max_shorter,
            limit=config.pairs_per_question, seed=config.seed,
        )  # fmt: skip

    def _compared(
        self, item: Item, responses: Sequence[RatedResponse], result: ItemResult
    ) -> list[tuple[RatedResponse, RatedResponse]]:
        """Returns (chosen, rejected) tuples of responses. The judge has preferred ``chosen`` in both orders.

        A comparison gives no tuple if its verdict is unreadable, is a tie in one of the orders, or changes with the
        order. ``result.notes`` counts these comparisons.
        """
        by_key = {response.record["key"]: response for response in responses}
        shares = {
            (key, opponent): share
            for key, response in by_key.items()
            for opponent, share in response.record.get("comparisons", ())
        }
        notes: collections.Counter[str] = collections.Counter()
        pairs = []
        for (key, opponent), share in shares.items():
            swapped = shares.get((opponent, key))
            if key > opponent and (opponent, key) in shares:
                continue  # the two orders are one comparison
            if share is None or swapped is None:
                notes["comparisons whose verdict cannot be read"] += 1
            elif 0.5 in (share, swapped):
                notes["comparisons that end in a tie"] += 1
            elif (share > 0.5) == (swapped > 0.5):
                notes["comparisons whose verdict changes with the order of the responses"] += 1
            else:
                score = round((share + 1 - swapped) / 2, 6)
                first = dataclasses.replace(by_key[key], score=score)
                second = dataclasses.replace(by_key[opponent], score=round(1 - score, 6))
                pairs.append((first, second) if share > 0.5 else (second, first))
        result.notes.update(notes)
        return pairs

    def _skip_reason(self, record: Mapping[str, Any]) -> str | None:
        config = self.config
        return skip_reason(record, allow_truncated=config.allow_truncated, allow_degenerate=config.allow_degenerate)


def first_share(generation: Generation) -> float | None:
    """Returns the judge's preference for the first of two responses, between 0 and 1.

    The preference is P(A) / (P(A) + P(B)), where A is the first response. If the engine has not measured
    probabilities, the preference is 1 for the text "A", 0 for "B", and None for any other text.
    """
    if (probs := generation.choice_probs) is not None:
        return round(probs[0] / sum(probs), 6)
    match = _LETTER.fullmatch(generation.text)
    return None if match is None else float(match[1].upper() == "A")
