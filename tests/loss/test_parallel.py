"""Tests the losses when the vocabulary, the sequences or both are split over ranks.

The expected results are those of one process.
"""

from __future__ import annotations

import contextlib
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
    RewardShift,
    linear_mpo_loss,
    linear_token_logp,
    mpo_loss,
    shift_labels,
    token_logp,
)

FIRST_CASE, CASES = 100, int(os.environ.get("MPO_PARALLEL_CASES", "40"))
IGNORE = -100
#: Groups of the vocabulary and of the sequences.
LAYOUTS = (("pair", None), ("all", None), (None, "cross"), (None, "all"), ("pair", "cross"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    ranks = RankPool(str(tmp_path_factory.mktemp("ranks") / "store"))
    yield ranks
    ranks.close()


class Split(NamedTuple):
    """This rank's part of the inputs: a slice of the vocabulary, and some positions in each sequence."""

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
        """Returns the rows of a tensor that belong to this rank."""
        if self.sequence is None:
            return tensor
        if self.cu_seqlens is not None:
            return tensor[self.positions]
        return tensor[:, self.positions[0]]

    def logits(self, tensor: Tensor) -> Tensor:
        return self.rows(tensor)[..., self.columns]


def cuts(rng: random.Random, size: int, parts: int, *, least: int) -> list[slice]:
    """Splits ``range(size)`` at random into consecutive slices of at least ``least`` elements."""
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
    """A random test case: the complete inputs, this rank's part of the inputs, and the options of the call."""

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
    """Calls the function of a case. Returns results and gradients by name; the name of a gradient is "d <input>"."""
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
    """Returns this rank's parts of tensors. The names of gradients begin with "d ", such as "d hidden"."""
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


def error(name: str, ours: Tensor, truth: Tensor, *, may_have_more_nan: bool = False) -> float:
    """Returns the largest absolute error of ``ours``, divided by the largest absolute value of ``truth``.

    For a loss or log-prob, the divisor is at least 1. Both tensors must have NaN at the same places. With
    ``may_have_more_nan``, ``ours`` may have NaN at other places, too.
    """
    assert ours.shape == truth.shape, f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if may_have_more_nan:
        assert not (truth.isnan() & ~ours.isnan()).any(), "a gradient is not NaN"
        truth = truth.masked_fill(ours.isnan(), torch.nan)
    assert torch.equal(ours.isnan(), truth.isnan()), "NaN in other places"
    ours, truth = ours.double().nan_to_num(), truth.double().nan_to_num()
    if not ours.numel():
        return 0.0
    scale = truth.abs().max().clamp(min=1e-9 if name[:2] == "d " else 1.0)
    return ((ours - truth).abs().max() / scale).item()


BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8}


def check_case(rank: int, seed: int) -> dict[str, float]:
    """Computes a random case on several ranks and in one process. Compares the results.

    Returns the error of each result by name. An error of 1 is the largest allowed error.
    """
    case = make_case(seed)
    truth = compute(case, case.tensors, case.options)
    options = {**case.options, **case.split.groups}
    if case.function.endswith("token_logp"):
        del options["sequence_parallel"]
    else:
        options["cu_seqlens"] = case.split.cu_seqlens
    if not case.function.startswith("linear"):
        options["reuse_logits"] = seed % 2 == 1
    ours = compute(case, local(case, case.tensors), options)
    expected = local(case, truth)
    # Of a loss that is NaN, the kernel of one process makes fewer gradients NaN than the plain torch of several ranks.
    is_nan = "loss" in truth and bool(truth["loss"].isnan())
    errors = {}
    for name, value in expected.items():
        got, bound = ours[name], BOUNDS[value.dtype if value.is_floating_point() else torch.float32]
        if name in ("d weight", "d bias") and case.split.sequence is not None:
            total = got.to(torch.promote_types(got.dtype, torch.float32), copy=True)
            dist.all_reduce(total, group=GROUPS[case.split.sequence])  # a rank has the part of its rows
            got = total.to(got.dtype)
        if name in ("d hidden", "d weight", "d bias"):  # rounded parts are summed
            bound *= 2 if value.dtype != torch.bfloat16 else dist.get_world_size()
        try:
            errors[name] = error(name, got, value, may_have_more_nan=is_nan and name[:2] == "d ") / bound
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
    for first in range(FIRST_CASE, FIRST_CASE + CASES, 50):
        for worst in pool.run(fuzz, first, min(50, FIRST_CASE + CASES - first)):
            for name, (value, seed) in worst.items():
                assert value <= 1, f"{name} of case {seed} is {value:.2f} times its bound"


def same_bits(rank: int, seeds: range) -> list[dict[str, Tensor]]:
    """Checks that two runs of a case give the same bits. Returns the results that must also be equal on all ranks."""
    shared = []
    for seed in seeds:
        case = make_case(seed)
        options = {**case.options, **case.split.groups}
        if case.function.endswith("token_logp"):
            del options["sequence_parallel"]
        else:
            options["cu_seqlens"] = case.split.cu_seqlens
        first, second = (compute(case, local(case, case.tensors), options) for _ in range(2))
        assert all(torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first), seed
        shared.append({name: value for name, value in first.items() if name[:2] != "d " or name == "d hidden"})
    return shared


def test_two_runs_and_all_ranks_give_the_same_bits(pool: RankPool) -> None:
    by_rank = pool.run(same_bits, range(0, 4 * len(LAYOUTS), len(LAYOUTS)))  # the vocabulary over two ranks
    by_rank_of_4 = pool.run(same_bits, range(1, 4 * len(LAYOUTS), len(LAYOUTS)))  # over four
    for results in (by_rank, by_rank_of_4):
        for case in zip(*results, strict=True):
            for other in case[1:]:
                assert all(torch.equal(case[0][name].nan_to_num(), other[name].nan_to_num()) for name in case[0])


def pairs(seed: int, vocab: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4, 5, vocab, generator=generator)
    labels = torch.randint(vocab, (4, 5), generator=generator)
    return logits, labels, -15 - 5 * torch.rand(4, generator=generator)


def reward_shift_run(rank: int, settings: dict[str, Any], sequence: bool) -> list[float]:
    """Runs three steps on four ranks: two groups of two ranks.

    The two ranks of a group have the same pairs. The two groups have different pairs. The ranks of a group split the
    sequences if ``sequence`` is True, otherwise the vocabulary. Returns a list with three numbers per step: delta in
    the loss, then ``value`` and ``count`` of the shift after the step.
    """
    shift = RewardShift(**settings)
    replica, part = divmod(rank, 2)
    log = []
    for step in range(3):
        logits, labels, ref_logp = pairs(10 * replica + step)
        if replica == 1 and step == 2:
            labels[2:] = IGNORE  # no pair with two sides
        if sequence:
            half = slice(0, 2) if part == 0 else slice(2, 5)
            aligned = shift_labels(labels)[:, half]
            options = {"shift": False, "sequence_parallel": GROUPS["pair"]}
            out = mpo_loss(logits[:, half].requires_grad_(), aligned, ref_logp, reward_shift=shift, **options)
        else:
            columns = slice(0, 7) if part == 0 else slice(7, 24)
            options = {"vocab_parallel": GROUPS["pair"]}
            out = mpo_loss(logits[..., columns].requires_grad_(), labels, ref_logp, reward_shift=shift, **options)
        shift.step()
        log += [out.reward_shift.item(), shift.value, shift.state_dict()["count"]]
    return log


def expected_shift(settings: dict[str, Any]) -> list[float]:
    """Returns the expected list of ``reward_shift_run``, computed in one process."""
    log, value, means = [], 0.0, []
    for step in range(3):
        rewards = []
        for replica in range(2):
            logits, labels, ref_logp = pairs(10 * replica + step)
            if not (replica == 1 and step == 2):
                out = mpo_loss(logits, labels, ref_logp)
                rewards.append(torch.cat([out.chosen_reward, out.rejected_reward]).double())
        before = value
        if settings.get("mode") == "ema":
            value = settings["decay"] * value + (1 - settings["decay"]) * torch.cat(rewards).mean().item()
            means.append(0.0)
        else:
            per_step = settings.get("per") == "optimizer_step"
            means += [torch.cat(rewards).mean()] if per_step else [values.mean() for values in rewards]
            value = torch.stack(means).mean().item()
        log += [before if settings.get("update") == "after" else value, value, len(means)]
    return log


@pytest.mark.parametrize("sequence", [False, True], ids=["vocabulary", "sequence"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "ema", "decay": 0.5, "update": "after"}, {"update": "after", "per": "optimizer_step"}],
    ids=str,
)
def test_the_reward_shift_counts_each_pair_once(pool: RankPool, settings: dict[str, Any], sequence: bool) -> None:
    expected = pytest.approx(expected_shift(settings), rel=1e-5, abs=1e-6)
    for log in pool.run(reward_shift_run, settings, sequence):
        assert log == expected


def raised(rank: int, fault: str, function: str) -> str:
    """Calls a function with invalid arguments on rank 2. Returns this rank's error message, or "no error"."""
    logits, labels, ref_logp = pairs(3)
    part = dist.get_rank(GROUPS["all"])
    logits = logits[..., 6 * part : 6 * part + 6].clone()
    options: dict[str, Any] = {"vocab_parallel": GROUPS["all"]}
    if function == "mpo_loss":
        options["ref_logp"] = ref_logp
    else:
        options["shift"] = True
    tensors = [logits, labels]
    if rank == 2:
        if fault == "dtype":
            tensors[1] = labels.int()
        elif fault == "rows":
            tensors = [logits[:, 1:], labels[:, 1:]]
        elif fault == "label":
            labels[3, 2] = (labels[3, 2] + 1) % 24
        elif fault == "out of range":
            labels[1, 3] = 24
        elif fault == "options":
            options |= {"config": MPOConfig(beta=0.2)} if function == "mpo_loss" else {"ignore_index": 3}
        elif fault == "ref_logp":
            options["ref_logp"] = ref_logp + 1
        elif fault == "empty":
            tensors[0] = logits[..., :0]
        elif fault == "backend":
            options["backend"] = "cuda"
        elif fault == "other backend":
            options["backend"] = "reference"
    try:
        FUNCTIONS[function](*tensors, **options)
    except (TypeError, ValueError, RuntimeError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return "no error"


@pytest.mark.parametrize("function", ["mpo_loss", "token_logp"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dtype", "TypeError: labels must be torch.int64, got torch.int32"),
        ("rows", "ValueError: labels must have the same number of positions on all ranks of vocab_parallel"),
        ("label", "ValueError: labels must be the same on all ranks of vocab_parallel, got others on 2 than on 0"),
        ("out of range", "ValueError: labels must be the same on all ranks of vocab_parallel"),
        ("options", "ValueError: config, stats, dtypes and the other options must be the same on all ranks"),
        ("other backend", "ValueError: config, stats, dtypes and the other options must be the same on all ranks"),
        ("empty", "ValueError: logits must have a vocabulary axis of at least 1"),
        ("backend", "RuntimeError: backend 'cuda' cannot run"),
    ],
)
def test_a_fault_of_one_rank_is_raised_on_all(pool: RankPool, function: str, fault: str, message: str) -> None:
    for rank, problem in enumerate(pool.run(raised, fault, function)):
        kind, _, text = message.partition(": ")
        assert problem.startswith(kind)
        assert text in problem
        if fault in ("dtype", "empty", "backend") and rank != 2:
            assert "rank 2 of vocab_parallel" in problem


def test_sums_of_the_reference_must_be_the_same_on_all_ranks(pool: RankPool) -> None:
    for problem in pool.run(raised, "ref_logp", "mpo_loss"):
        assert "ref_logp must be the same on all ranks of vocab_parallel" in problem


def fault_with_two_groups(rank: int, fault: str) -> tuple[str, float]:
    """Calls mpo_loss with a vocabulary group and a sequence group. Returns (error message, loss).

    On rank 2, an argument is wrong: ``fault`` names the mistake.
    """
    logits, labels, ref_logp = pairs(4)
    columns = slice(0, 10) if rank % 2 == 0 else slice(10, 24)
    rows = slice(0, 3) if rank < 2 else slice(3, 5)
    labels = shift_labels(labels)[:, rows].clone()
    if rank == 2 and fault == "dtype":
        labels = labels.int()
    elif rank == 2:
        labels[0, 0] = (labels[0, 0] + 1) % 24
    try:
        out = mpo_loss(
            logits[:, rows, columns], labels, ref_logp, shift=False,
            vocab_parallel=GROUPS["pair"], sequence_parallel=GROUPS["cross"],
        )  # fmt: skip
    except TypeError as problem:
        return str(problem), 0.0
    return "", out.loss.item()


def test_faults_reach_the_ranks_of_both_groups(pool: RankPool) -> None:
    for problem, _ in pool.run(fault_with_two_groups, "dtype"):
        assert "labels must be torch.int64, got torch.int32" in problem
    for problem, loss in pool.run(fault_with_two_groups, "label"):  # an error would leave the other group waiting
        assert problem == ""
        assert loss != loss


def refused(rank: int) -> dict[str, str]:
    logits, labels, ref_logp = pairs(5)
    half = logits[..., 12 * (rank % 2) : 12 * (rank % 2) + 12].clone().requires_grad_()
    group = GROUPS["pair"]
    other = dist.new_group([0]), dist.new_group([1])
    calls = {
        "shift": lambda: mpo_loss(logits, labels, ref_logp, sequence_parallel=group),
        "type": lambda: token_logp(half, labels, vocab_parallel=2, shift=False),
        "member": lambda: token_logp(half, labels, vocab_parallel=other[1 if rank == 0 else 0], shift=False),
        "offsets": lambda: mpo_loss(
            logits[0], labels[0], ref_logp[:2], cu_seqlens=torch.tensor([0, 4, 3 if rank % 2 else 5]), shift=False,
            sequence_parallel=group,
        ),
    }  # fmt: skip
    for backend in ("cpu", "reference"):
        loss = mpo_loss(half, labels, ref_logp, vocab_parallel=group, backend=backend).loss
        (grad,) = torch.autograd.grad(loss, half, create_graph=True)
        calls[f"twice {backend}"] = grad.sum().backward
    texts = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as problem:
            texts[name] = str(problem)
    return texts


def test_what_is_refused_is_named(pool: RankPool) -> None:
    for texts in pool.run(refused):
        assert "shift must be False with sequence_parallel" in texts["shift"]
        assert "vocab_parallel must be a torch.distributed.ProcessGroup or None, got int" in texts["type"]
        assert "vocab_parallel must be a process group that this process is a member of" in texts["member"]
        assert "cu_seqlens must not decrease, got 4 followed by 3" in texts["offsets"]
        assert "can be differentiated once" in texts["twice cpu"]
        assert "can be differentiated once" in texts["twice reference"]


def without_gradients(rank: int) -> list[float]:
    """Returns the loss of a split sequence with gradients, under no_grad, and under inference_mode."""
    logits, labels, ref_logp = pairs(7)
    half = slice(0, 2) if rank % 2 == 0 else slice(2, 5)
    aligned, part = shift_labels(labels)[:, half], logits[:, half].clone()
    losses = []
    for context in (contextlib.nullcontext(), torch.no_grad(), torch.inference_mode()):
        with context:
            out = mpo_loss(part, aligned, ref_logp, shift=False, sequence_parallel=GROUPS["pair"])
        losses.append(out.loss.item())
    return losses


def test_split_sequences_need_no_gradients(pool: RankPool) -> None:
    for losses in pool.run(without_gradients):
        assert losses[0] == losses[1] == losses[2]


def compiled(rank: int) -> tuple[float, float] | None:
    if rank >= 2:
        return None
    logits, labels, ref_logp = pairs(6)
    half = logits[..., 12 * (rank % 2) : 12 * (rank % 2) + 12].clone()

    def loss(part: Tensor) -> Tensor:
        return 2 * mpo_loss(part * 1.5, labels, ref_logp, vocab_parallel=GROUPS["pair"]).loss

    values = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        leaf = half.clone().requires_grad_()
        function(leaf).backward()
        values.append(leaf.grad)
    return values[0].norm().item(), (values[0] - values[1]).abs().max().item()


def test_a_compiled_function_may_call_the_loss(pool: RankPool) -> None:
    for norm, difference in pool.run(compiled)[:2]:
        assert norm > 0
        assert difference <= 1e-7


def tp_plan(rank: int, style: str) -> dict[str, Any]:
    """Returns the errors of the loss and the gradients of a tensor-parallel model on two ranks.

    ``style`` says how the model is sharded. "transformers": transformers shards all layers. "torch": torch shards only
    the output head. "local": like "torch", but the loss takes each rank's columns of the logits.
    """
    if rank >= 2:
        return {}
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    from mpo_ext import hidden_and_head

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=61, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    whole = Qwen2ForCausalLM(config)
    sharded = Qwen2ForCausalLM(config)
    sharded.load_state_dict(whole.state_dict())
    mesh = DeviceMesh.from_group(GROUPS["pair"], "cpu", mesh_dim_names=("tp",))
    if style == "transformers":
        layers = {name: kind for name, kind in whole.tp_plan.items() if "*" not in name}
        for name, kind in whole.tp_plan.items():
            if "*" in name:
                layers |= {name.replace("*", str(layer)): kind for layer in range(2)}
        parameters = {
            f"{name}.{part}": kind
            for name, kind in layers.items()
            for part in ("weight", "bias")
            if f"{name}.{part}" in dict(sharded.named_parameters())
        }
        apply_tensor_parallelism(sharded, mesh, parameters | layers)
    else:
        layouts = {"torch": Replicate(), "local": Shard(-1)}[style]
        parallelize_module(sharded, mesh, {"lm_head": ColwiseParallel(output_layouts=layouts)})
    input_ids = torch.randint(61, (4, 7))
    labels = input_ids.masked_fill(torch.arange(7) < 2, IGNORE)
    ref_logp = torch.full((4,), -20.0)
    if style == "local":
        logits = sharded(input_ids=input_ids).logits
        out = mpo_loss(logits, labels, ref_logp, vocab_parallel=GROUPS["pair"])
    else:
        head = hidden_and_head(sharded, input_ids=input_ids)
        assert head.vocab_parallel is not None
        assert head.weight.shape[0] < 61
        out = linear_mpo_loss(head.hidden, head.weight, labels, ref_logp, **head.options)
    out.loss.backward()
    truth = mpo_loss(whole(input_ids=input_ids).logits, labels, ref_logp)
    truth.loss.backward()
    errors = {"loss": (out.loss - truth.loss).abs().item()}
    for (name, parameter), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        errors[name] = ((grad - other.grad).abs().max() / other.grad.abs().max()).item()
    return errors


@pytest.mark.parametrize("style", ["transformers", "torch", "local"])
def test_a_model_with_a_sharded_head(pool: RankPool, style: str) -> None:
    for errors in pool.run(tp_plan, style)[:2]:
        assert len(errors) > 20
        assert max(errors.values()) <= 5e-6, errors
