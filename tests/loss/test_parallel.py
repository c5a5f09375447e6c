"""The losses over ranks that share the vocabulary, the sequences, or both: equal to one process."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from rank_pool import GROUPS, RankPool
from torch import Tensor

from mpo_ext import (
    MPOConfig,
    MPOOutput,
    linear_mpo_loss,
    linear_token_logp,
    mpo_loss,
    token_logp,
)

CASES = int(os.environ.get("MPO_PARALLEL_CASES", "60"))
IGNORE = -100
#: Groups of the vocabulary and of the sequences.
LAYOUTS = (("pair", None), ("all", None), (None, "cross"), (None, "all"), ("pair", "cross"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    ranks = RankPool(str(tmp_path_factory.mktemp("ranks") / "store"))
    yield ranks
    ranks.close()


class Split(NamedTuple):
    """The part of this rank: its columns of the vocabulary, and its positions of each sequence."""

    vocab: str | None
    sequence: str | None
    columns: slice
    positions: Tensor  # bool, in the shape of the labels
    cu_seqlens: Tensor | None

    @property
    def groups(self) -> dict[str, Any]:
        return {
            "vocab_parallel": None if self.vocab is None else GROUPS[self.vocab],
            "sequence_parallel": None if self.sequence is None else GROUPS[self.sequence],
        }

    def rows(self, tensor: Tensor) -> Tensor:
        """Returns this rank's rows; padded sequences have equal parts."""
        if self.sequence is None:
            return tensor
        if self.cu_seqlens is not None:
            return tensor[self.positions]
        return tensor[:, self.positions[0]]

    def logits(self, tensor: Tensor) -> Tensor:
        return self.rows(tensor)[..., self.columns]


def cuts(rng: random.Random, size: int, parts: int, *, least: int) -> list[slice]:
    """Returns consecutive slices of ``range(size)``, each with at least ``least`` elements."""
    free = size - least * parts
    inner = sorted(rng.randint(0, free) for _ in range(parts - 1))
    ends = [cut + least * (i + 1) for i, cut in enumerate([*inner, free])]
    return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def make_split(rng: random.Random, layout: tuple[str | None, str | None], vocab: int, labels: Tensor, cu_seqlens: Any):
    vocab_group, sequence_group = layout
    columns, positions, offsets = slice(None), torch.ones_like(labels, dtype=torch.bool), cu_seqlens
    if vocab_group is not None:
        group = GROUPS[vocab_group]
        columns = cuts(rng, vocab, dist.get_world_size(group), least=1)[dist.get_rank(group)]
    if sequence_group is not None:
        group = GROUPS[sequence_group]
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if cu_seqlens is None:
            positions = torch.zeros_like(positions)
            positions[:, cuts(rng, labels.shape[1], ranks, least=0)[rank]] = True
        else:
            of_rank = [rng.randrange(ranks) for _ in range(labels.numel())]  # any rows of any rank, as zigzag has
            positions = torch.tensor(of_rank) == rank
            lengths = [int(part.sum()) for part in positions.split(cu_seqlens.diff().tolist())]
            offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Split(vocab_group, sequence_group, columns, positions, offsets)


class Case(NamedTuple):
    """Inputs of one process, and the options of a call."""

    function: str
    tensors: dict[str, Tensor | None]  # logits, or hidden, weight and bias; their reference; labels
    options: dict[str, Any]
    split: Split
    wanted: tuple[str, ...]  # tensors that need a gradient


def make_case(seed: int) -> Case:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layout = LAYOUTS[seed % len(LAYOUTS)]
    function = rng.choice(("mpo_loss", "linear_mpo_loss"))
    if layout[1] is None and rng.random() < 0.4:
        function = rng.choice(("token_logp", "linear_token_logp"))
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    vocab = rng.choice((rng.randint(4, 9), rng.randint(10, 90), rng.randint(900, 2500)))
    pairs, length, width = rng.randint(1, 3), rng.randint(1, 8), rng.randint(1, 20)
    is_loss, is_linear = function.endswith("mpo_loss"), function.startswith("linear")
    is_packed = is_loss and rng.random() < 0.5
    cu_seqlens = None
    shape: tuple[int, ...] = (2 * pairs, length)
    if is_packed:
        cu_seqlens = torch.tensor([0, *(rng.randint(1, length) for _ in range(2 * pairs))]).cumsum(0)
        shape = (int(cu_seqlens[-1]),)
    labels = torch.randint(vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < rng.choice((0.0, 0.3, 0.8))] = IGNORE
    if rng.random() < 0.1:
        labels.view(-1)[rng.randrange(labels.numel())] = vocab + rng.randint(0, 2)  # out of range: NaN

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype)

    tensors: dict[str, Tensor | None] = {"labels": labels}
    options: dict[str, Any] = {"backend": rng.choice(("cpu", "cpu", "reference"))}
    if is_linear:
        tensors |= {"hidden": normal(*shape, width), "weight": normal(vocab, width, scale=2 / width**0.5)}
        tensors["bias"] = normal(vocab) if rng.random() < 0.4 else None
        options |= {"softcap": rng.choice((None, None, 3.0)), "temperature": rng.choice((1.0, 0.7))}
        options |= {"recompute": rng.random() < 0.7, "memory_budget": rng.choice((None, 3000, 20000))}
        options["logit_scale"] = rng.choice((1.0, 0.5))
        wanted = rng.choice((("hidden", "weight", "bias"), ("hidden",), ("weight",)))
    else:
        tensors["logits"] = normal(*shape, vocab, scale=3)
        if rng.random() < 0.2:
            tensors["logits"][..., : vocab // 2] = -torch.inf  # a shard without a finite logit
            labels[(labels >= 0) & (labels < vocab // 2)] += vocab - vocab // 2
        wanted = ("logits",)
    if is_loss:
        kind = rng.choice(("logp", "model"))
        if kind == "logp":
            tensors["ref_logp"] = -4 * length * torch.rand(2 * pairs, generator=generator)
        elif is_linear:
            tensors["ref_hidden"] = normal(*shape, width)
            tensors["ref_weight"] = normal(vocab, width) if rng.random() < 0.5 else None
        else:
            tensors["ref_logits"] = normal(*shape, vocab)
        options["config"] = MPOConfig(
            beta=rng.choice((0.1, 1.0)), ntp_average=rng.choice(("token", "sequence")),
            label_smoothing=rng.choice((0.0, 0.1)), dpo_weight=rng.choice((0.8, 0.0)),
        )  # fmt: skip
        options["stats"] = rng.sample(("entropy", "mean_logit", "top1", "sum_p_squared"), rng.randint(0, 4))
        options["reward_shift"] = rng.choice((None, -0.3, torch.tensor(0.2)))
    split = make_split(rng, layout, vocab, labels, cu_seqlens)
    options["shift"] = split.sequence is None and rng.random() < 0.5
    if is_loss:
        options["cu_seqlens"] = cu_seqlens
    wanted = tuple(name for name in wanted if tensors.get(name) is not None)
    return Case(function, tensors, options, split, wanted)


FUNCTIONS = {f.__name__: f for f in (mpo_loss, linear_mpo_loss, token_logp, linear_token_logp)}


def compute(case: Case, tensors: dict[str, Tensor | None], options: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the results and the gradients of a call, by name."""
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in case.wanted}
    out = FUNCTIONS[case.function](**{**tensors, **leaves}, **options)
    if isinstance(out, MPOOutput):
        results = {name: value for name, value in out._asdict().items() if isinstance(value, Tensor)}
        results |= {f"stats.{name}": value for name, value in out.stats.items()}
        out.loss.backward()
    else:
        results = {"logp": out}
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return {name: value.detach() for name, value in results.items()} | {
        f"d {name}": leaf.grad for name, leaf in leaves.items()
    }


def local(case: Case, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Returns this rank's part of the tensors of one process, or of their gradients."""
    parts = dict(tensors)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        kind = name.removeprefix("d ")
        if kind in ("logits", "ref_logits"):
            parts[name] = case.split.logits(tensor)
        elif kind in ("labels", "hidden", "ref_hidden"):
            parts[name] = case.split.rows(tensor)
        elif kind in ("weight", "bias", "ref_weight"):
            parts[name] = tensor[case.split.columns]
    return parts


def error(ours: Tensor, truth: Tensor) -> float:
    """Returns the largest error, relative to the largest value or 1 (gradients: to their largest value)."""
    assert ours.shape == truth.shape, f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert torch.equal(ours.isnan(), truth.isnan()), "NaN in other places"
    ours, truth = ours.double().nan_to_num(), truth.double().nan_to_num()
    if not ours.numel():
        return 0.0
    return ((ours - truth).abs().max() / truth.abs().max().clamp(min=1e-3)).item()


BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8}


def check_case(rank: int, seed: int) -> dict[str, float]:
    """Compares a case over the ranks with one process. Returns the errors relative to their bounds."""
    case = make_case(seed)
    truth = compute(case, case.tensors, case.options)
    options = {**case.options, **case.split.groups}
    if case.function.endswith("token_logp"):
        del options["sequence_parallel"]
    else:
        options["cu_seqlens"] = case.split.cu_seqlens
    ours = compute(case, local(case, case.tensors), options)
    expected = local(case, truth)
    errors = {}
    for name, value in expected.items():
        got = ours[name]
        if (name == "d weight" and case.split.sequence is not None) or (
            name == "d bias" and case.split.sequence is not None
        ):  # a part of the sum over the sequence's ranks
            total = got.to(torch.promote_types(got.dtype, torch.float32), copy=True)
            dist.all_reduce(total, group=GROUPS[case.split.sequence])
            got = total.to(got.dtype)
        try:
            errors[name] = error(got, value) / BOUNDS[value.dtype if value.is_floating_point() else torch.float32]
        except AssertionError as problem:
            raise AssertionError(f"seed {seed}, {case.function}, {case.split}: {name}: {problem}") from problem
    return errors


def fuzz(rank: int, first: int, count: int) -> dict[str, tuple[float, int]]:
    worst: dict[str, tuple[float, int]] = {}
    for seed in range(first, first + count):
        for name, value in check_case(rank, seed).items():
            worst[name] = max(worst.get(name, (0.0, seed)), (value, seed))
    return worst


def test_random_cases_equal_one_process(pool: RankPool) -> None:
    for worst in pool.run(fuzz, 0, CASES):
        for name, (value, seed) in worst.items():
            assert value <= 1, f"{name} of case {seed} is {value:.2f} times its bound"
