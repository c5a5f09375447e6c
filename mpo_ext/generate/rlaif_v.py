"""The RLAIF-V pipeline (arXiv 2405.17220), which checks the claims of each response one by one.

The model answers the question of an item several times. Each response is split into claims, and each claim becomes a
yes-or-no question. A model that sees the image answers this yes-or-no question. The score of a response is minus the
number of its wrong claims. ``mpo_ext.generate.runner`` runs the pipeline.
"""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

from mpo_ext.checks import check_choice, check_integer, check_number
from mpo_ext.generate.choices import VERDICT_SAMPLING, YES_OR_NO, check_prompt, fill, quoted, yes_and_no
from mpo_ext.generate.claims import (
    CLAIMS_PROMPT,
    QUESTIONS_PROMPT,
    STATEMENT,
    VERDICT_PROMPT,
    read_list,
    split_sentences,
)
from mpo_ext.generate.engine import Engine, Generation, Request, SamplingConfig, derive_seed
from mpo_ext.generate.feeding import Steps, run_steps
from mpo_ext.generate.items import Item, media_problem
from mpo_ext.generate.outputs import ItemResult
from mpo_ext.generate.prompts import get_template
from mpo_ext.generate.questions import QuestionSampler
from mpo_ext.generate.responses import RatedResponse, distinct, normalized, pairs_by_score, skip_reason
from mpo_ext.images import ImageError

UNREADABLE_VERDICT = "verdict on a claim is neither yes nor no"
#: Field of a record with the number of generated tokens, by stage.
_STAGES = {
    "responses": "tokens", "claims": "claim_tokens", "questions": "question_tokens", "verdicts": "verdict_tokens",
}  # fmt: skip
_CLEAR = 0.5  # minimum sum of the probabilities of yes and no for a clear verdict


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RlaifVConfig:
    """Settings of the RLAIF-V pipeline.

    Attributes:
        samples: Number of responses per question.
        sampling: Settings for drawing the tokens of the responses.
        seed: Seed of all draws and choices.
        template: Name of the prompt template (``mpo_ext.generate.prompts``); None: the question with its options.
        claims: "model": a model lists the claims of a response, as in the paper; "sentences": each sentence is a
            claim.
        questions: "model": a model turns the claims of a response into yes-or-no questions, as in the paper;
            "statement": the yes-or-no question is whether the claim is correct.
        rewriting: Settings for drawing tokens when a model lists claims or writes yes-or-no questions.
        min_gap: The rejected response must have at least this many more wrong claims than the chosen response. A claim
            is wrong if P(no) is at least P(yes).
        pairs_per_question: Maximum number of pairs per question; 0: no limit.
        max_shorter: Limit for shorter chosen responses. A chosen response must have at least ``1 - max_shorter`` times
            as many words as the rejected response. 1: no limit; short responses then have an advantage, because they
            make fewer claims.
        allow_truncated: Whether to use responses that ``max_new_tokens`` cut off.
        allow_degenerate: Whether to use responses that repeat themselves.
        judge: Name of the model that splits and checks responses. It is only a label that is written into the pairs,
            and loads no model. None: the name of the model that wrote the responses.
        claims_prompt: Prompt with ``{question}`` and ``{answer}``.
        questions_prompt: Prompt with ``{claims}``, a list with one claim per line.
        verdict_prompt: Prompt with ``{question}``, a yes-or-no question about a claim.
    """

    samples: int = 10
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    seed: int = 0
    template: str | None = None
    claims: Literal["model", "sentences"] = "model"
    questions: Literal["model", "statement"] = "model"
    rewriting: SamplingConfig = dataclasses.field(
        default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=512)
    )
    min_gap: int = 1
    pairs_per_question: int = 2
    max_shorter: float = 1.0
    allow_truncated: bool = False
    allow_degenerate: bool = False
    judge: str | None = None
    claims_prompt: str = CLAIMS_PROMPT
    questions_prompt: str = QUESTIONS_PROMPT
    verdict_prompt: str = VERDICT_PROMPT

    def __post_init__(self) -> None:
        check_integer("samples", self.samples, least=2)
        check_integer("seed", self.seed, least=0)
        check_integer("min_gap", self.min_gap, least=1)
        check_integer("pairs_per_question", self.pairs_per_question, least=0)
        check_number("max_shorter", self.max_shorter, "[0, 1]")
        check_choice("claims", self.claims, ("model", "sentences"))
        check_choice("questions", self.questions, ("model", "statement"))
        check_prompt("claims_prompt", self.claims_prompt, ("{question}", "{answer}"))
        check_prompt("questions_prompt", self.questions_prompt, ("{claims}",))
        check_prompt("verdict_prompt", self.verdict_prompt, ("{question}",))


@dataclasses.dataclass(slots=True)
class _Draft:
    """The state of a response while ``RlaifV`` checks its claims.

    Attributes:
        item: The item of the response.
        record: JSON object of the response, to which the claims and the verdicts are added.
        claims: The claims of the response.
        questions: The yes-or-no question about each claim.
    """

    item: Item
    record: dict[str, Any]
    claims: list[str] = dataclasses.field(default_factory=list)
    questions: list[str] = dataclasses.field(default_factory=list)

    def fail(self, reason: str) -> None:
        self.record["failure"] = reason

    def is_whole(self, generation: Generation, name: str) -> bool:
        """Returns whether a generated list of claims or yes-or-no questions is complete.

        If the request was refused, or the list was cut off, stores the reason in ``record``. ``name`` is "claims" or
        "questions".
        """
        if generation.refusal is not None:
            self.record["refusal"] = generation.refusal
            self.fail(f"prompt for the {name} refused by the engine")
        elif generation.finish_reason == "length":
            self.fail(f"{name} cut off at the token limit")
        return self.is_alive

    @property
    def is_alive(self) -> bool:
        return "failure" not in self.record


class RlaifV:
    """Makes pairs of responses. The response with fewer wrong claims is the chosen response.

    ``mpo_ext.generate.runner.run`` runs this pipeline. The only output file is ``pairs.jsonl``. Equal responses to an
    item are checked only once. If several claims about an item give the same yes-or-no question, the model gets this
    question only once.
    """

    name = "rlaif_v"
    outputs = ("pairs",)
    needs_truths = False

    def __init__(self, config: RlaifVConfig | None = None) -> None:
        self.config = config or RlaifVConfig()
        template = get_template(self.config.template) if self.config.template is not None else None
        self.questions = QuestionSampler(
            self.name, self.config.samples, self.config.sampling, self.config.seed, template, needs_truths=False
        )

    def settings(self) -> dict[str, Any]:
        """Returns the settings that determine the samples and the output files, as JSON values."""
        return dataclasses.asdict(self.config)

    def keys(self, item: Item) -> list[str]:
        return self.questions.keys(item)

    def sample(self, items: Sequence[Item], engine: Engine) -> list[list[dict[str, Any]]]:
        """Samples responses to the items, checks their claims, and returns one list of records per item.

        A record is a JSON object with a response, its claims and the verdicts on them.
        """
        return run_steps(self.steps(items, engine), engine)

    def steps(self, items: Sequence[Item], engine: Engine) -> Steps:
        """Yields lists of requests. The caller sends the generations of each list with ``send``.

        At the end, this generator returns the same value as ``sample``.
        """
        all_records = yield from self.questions.steps(items, engine)
        drafts: list[_Draft] = []
        for item, records in zip(items, all_records, strict=True):
            texts: set[str] = set()
            for record in records:
                if "problem" in record or self._skip_reason(record) or normalized(record["text"]) in texts:
                    continue
                texts.add(normalized(record["text"]))
                drafts.append(_Draft(item, record))
        yield from self._split(drafts)
        yield from self._ask(drafts)
        yield from self._check(drafts)
        return all_records

    def _split(self, drafts: Sequence[_Draft]) -> Generator[list[Request], list[Generation], None]:
        """Splits the responses into claims: a claim per sentence, or a list of claims from a model.

        For lists from a model, this generator yields the requests, and the caller sends the generations back.
        """
        if self.config.claims == "sentences":
            for draft in drafts:
                draft.claims = split_sentences(draft.record["text"])
        else:
            requests = [
                self._request(
                    f"{draft.record['key']}.claims",
                    fill(self.config.claims_prompt, **self._quotes(draft)),
                )
                for draft in drafts
            ]
            for draft, generation in zip(drafts, (yield requests), strict=True):
                draft.record["claim_tokens"] = generation.n_tokens
                if draft.is_whole(generation, "claims"):
                    draft.claims = read_list(generation.text)
        for draft in drafts:
            draft.record["claims"] = draft.claims
            if draft.is_alive and not draft.claims:
                draft.fail("response without a claim")

    def _ask(self, drafts: Sequence[_Draft]) -> Generator[list[Request], list[Generation], None]:
        """Turns the claims into yes-or-no questions.

        If a model writes the questions, yields the requests to the model and receives the generations.
        """
        alive = [draft for draft in drafts if draft.is_alive]
        if self.config.questions == "statement":
            for draft in alive:
                draft.questions = [fill(STATEMENT, claim=claim) for claim in draft.claims]
            return
        requests = [
            self._request(
                f"{draft.record['key']}.questions",
                fill(self.config.questions_prompt, claims="\n".join(f"- {quoted(claim)}" for claim in draft.claims)),
            )
            for draft in alive
        ]
        for draft, generation in zip(alive, (yield requests), strict=True):
            draft.record["question_tokens"] = generation.n_tokens
            if not draft.is_whole(generation, "questions"):
                continue
            draft.questions = read_list(generation.text)
            draft.record["questions"] = draft.questions
            if len(draft.questions) != len(draft.claims):
                draft.fail("number of questions is not that of the claims")

    def _check(self, drafts: Sequence[_Draft]) -> Generator[list[Request], list[Generation], None]:
        """Asks a model about each claim, and stores the verdicts in the records. The model sees the item's images.

        Yields the requests, and receives the generations. Each yes-or-no question about an item is asked only once.
        """
        media: dict[int, dict[str, Any]] = {}
        users: dict[tuple[int, str], list[_Draft]] = {}
        for draft in drafts:
            if draft.is_alive and id(draft.item) not in media:
                try:
                    media[id(draft.item)] = draft.item.load_media()
                except (OSError, ImageError) as error:  # the files were readable when the responses were sampled
                    draft.fail(media_problem(error))
            if draft.is_alive:
                for question in draft.questions:
                    users.setdefault((id(draft.item), question), []).append(draft)
        requests = [
            self._request(
                f"{drafts_of[0].record['key']}.verdict",
                fill(self.config.verdict_prompt, question=quoted(question)),
                **media[item],
                sampling=VERDICT_SAMPLING,
                choices=YES_OR_NO,
            )
            for (item, question), drafts_of in users.items()
        ]
        verdicts: dict[tuple[int, str], tuple[float, float]] = {}
        for (key, drafts_of), generation in zip(users.items(), (yield requests), strict=True):
            record = drafts_of[0].record
            record["verdict_tokens"] = record.get("verdict_tokens", 0) + generation.n_tokens
            if generation.refusal is not None:
                for draft in drafts_of:
                    draft.fail("question about a claim refused by the engine")
                    draft.record["refusal"] = generation.refusal
            verdicts[key] = yes_and_no(generation)
        for draft in drafts:
            if draft.is_alive:
                draft.record["verdicts"] = [list(verdicts[id(draft.item), question]) for question in draft.questions]
                if [0.0, 0.0] in draft.record["verdicts"]:
                    draft.fail(UNREADABLE_VERDICT)

    def _quotes(self, draft: _Draft) -> dict[str, str]:
        return {"question": quoted(draft.item.prompt_text), "answer": quoted(draft.record["text"])}

    def _request(self, key: str, question: str, **values: Any) -> Request:
        sampling = values.pop("sampling", self.config.rewriting)
        seed = derive_seed(self.config.seed, self.name, key, question)
        return Request(key=key, question=question, seed=seed, sampling=sampling, role="judge", **values)

    def make_pairs(self, item: Item, records: Sequence[Mapping[str, Any]], model: str) -> ItemResult:
        """Makes preference pairs from the responses to an item. The chosen response of a pair has fewer wrong claims.

        ``records`` are JSON objects: the responses, with the verdicts on their claims. ``model`` is the name of the
        model that wrote the responses.
        """
        result = ItemResult()
        for stage, field in _STAGES.items():
            result.stage_tokens[stage] = sum(record.get(field, 0) for record in records)
        result.tokens = result.stage_tokens.total()
        if result.skip_problem(records):
            return result
        usable = []
        for record in records:
            if reason := self._skip_reason(record):
                result.skipped[reason] += 1
            else:
                usable.append(RatedResponse(record["text"], 0.0, record))
        rated = []
        for response in distinct(usable, result):
            if "failure" in response.record:
                result.skipped[response.record["failure"]] += 1
            else:
                rated.append(dataclasses.replace(response, score=-float(n_rejected(response.record))))
        pairs = pairs_by_score(
            item, rated, result, min_gap=self.config.min_gap, max_shorter=self.config.max_shorter,
            limit=self.config.pairs_per_question, seed=self.config.seed,
        )  # fmt: skip
        for chosen, rejected in pairs:
            if not (_is_clear(chosen.record) and _is_clear(rejected.record)):
                result.notes["pairs with an unclear verdict: P(yes) + P(no) is below 0.5"] += 1
            provenance = self._provenance(chosen.record, rejected.record, model)
            pair = item.pair(self.questions.prompt(item), chosen.text, rejected.text, provenance)
            result.lines.append(("pairs", pair.to_dict()))
        return result if result.lines else result.skip("question without a pair")

    def _skip_reason(self, record: Mapping[str, Any]) -> str | None:
        config = self.config
        return skip_reason(record, allow_truncated=config.allow_truncated, allow_degenerate=config.allow_degenerate)

    def _provenance(self, chosen: Mapping[str, Any], rejected: Mapping[str, Any], model: str) -> dict[str, Any]:
        sides = (chosen, rejected)
        return {
            "pipeline": self.name,
            "model": model,
            "judge": self.config.judge or model,
            "sampling": dataclasses.asdict(self.config.sampling),
            "seed": self.config.seed,
            "chosen_key": chosen["key"],
            "rejected_key": rejected["key"],
            "claims": [len(record["claims"]) for record in sides],
            "rejected_claims": [n_rejected(record) for record in sides],
            "generated_tokens": [sum(record.get(field, 0) for field in _STAGES.values()) for record in sides],
        }


def n_rejected(record: Mapping[str, Any]) -> int:
    """Returns the number of wrong claims in a response: claims for which P(no) is at least P(yes)."""
    return sum(yes <= no for yes, no in record["verdicts"])


def _is_clear(record: Mapping[str, Any]) -> bool:
    return all(yes + no >= _CLEAR for yes, no in record["verdicts"])
