"""Runs the compiled CUDA kernels on the simulator. Compares their results with the definitions in float64.

Kernels must not read uninitialized memory or bytes outside labelled rows. They must write every part of an output.
MPO_PTXSIM_ALL=1 runs every combination of parameters; CI runs a selection.
"""

import itertools
import os

import numpy as np
import ptxsim
import pytest
import torch
from ptxsim.testing import need_nvcc
from simulator import (
    CONFIG,
    NARROWED,
    Pairs,
    Rows,
    SimulatedNative,
    exact_rows,
    run_forward,
    run_logits_grad,
    run_pair_loss,
    run_token_logp,
)

need_nvcc()

ALL = os.environ.get("MPO_PTXSIM_ALL") == "1"
BY_HAND = pytest.mark.skip(reason="20 schedules of one dtype and architecture run in CI; MPO_PTXSIM_ALL=1 runs all")
ARCHS = ("sm_80", "sm_90", "sm_100", *(("sm_120",) if ALL else ()))
# 1, 2, 7: less than a vector. 1003, 5003: rows that are not aligned to 16 bytes; one round of the main loop, with and
# without a remainder. 4096: full vectors only.
VOCABS = (1, 2, 7, 1003, 4096, 5003)
ALL_STATS = 15
STAT_NAMES = ("entropy", "mean_logit", "top1", "sum_p_squared")


def labels_for(vocab: int) -> list[int]:
    """Returns 10 labels: first, last and middle tokens, ignored labels (-100), and labels out of range."""
    return [-100, 0, vocab - 1, -100, vocab, vocab // 2, -1, -100, vocab // 3, -100]


def check_token_logp(rows: Rows, out: dict[str, np.ndarray], stats: int) -> None:
    exact = exact_rows(rows)
    eager = torch.log_softmax(rows.values.float(), -1).double().numpy()
    scored = np.flatnonzero(rows.is_scored)
    picked = eager[scored, rows.labels[scored]]
    largest = max(1.0, np.abs(exact["logp"][scored]).max(initial=0))
    bound = 2 * np.abs(picked - exact["logp"][scored]).max(initial=0) + np.finfo(np.float32).eps * largest
    np.testing.assert_allclose(out["logp"], exact["logp"], rtol=0, atol=bound)
    for row in range(rows.rows):
        if not rows.is_scored[row]:
            assert out["row_max"][row] == out["row_sum"][row] == 0
            continue
        assert out["row_max"][row] == rows.exact[row].max()
        total = np.exp(rows.exact[row] - rows.exact[row].max()).sum()
        np.testing.assert_allclose(out["row_sum"][row], total, rtol=1e-6)
    if stats == ALL_STATS:
        for values, name in zip(out["row_stats"].reshape(4, -1), STAT_NAMES, strict=True):
            np.testing.assert_allclose(values, exact[name], rtol=3e-6, atol=2e-6, err_msg=name)


def check_grad(rows: Rows, place: Rows, buffer: object, weight: np.ndarray, scale: float = 1.0) -> None:
    """Compares a gradient of logits with the exact gradient.

    ``buffer`` holds the gradient. ``place`` describes its dtype and its layout. Rows with an ignored label must be 0.
    Rows with an invalid label must be NaN.
    """
    exact = exact_rows(rows)
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[rows.dtype]
    smallest = {"float32": 0, "bfloat16": 0, "float16": 2.0**-25}[rows.dtype]
    for row, label in enumerate(rows.labels):
        got = place.read(buffer, row)
        if label == rows.arguments()["ignore_index"]:
            assert not got.any()
        elif not rows.is_scored[row]:
            assert np.isnan(got).all()
        else:
            w = weight[row] * scale
            expected = w * ((np.arange(rows.vocab) == label) - exact["p"][row])
            bound = (unit + 6e-6) * np.abs(expected) + smallest
            bound[label] += 4e-7 * abs(w)
            assert (np.abs(got - expected) <= bound).all(), f"row {row}"


def check_only_rows_written(place: Rows, buffer: object) -> None:
    inside = np.zeros(buffer.nbytes, bool)
    for row in range(place.rows):
        inside[place.place(row)] = True
    assert buffer.valid[: buffer.nbytes][inside].all(), "part of the gradient was not written"
    assert not buffer.valid[: buffer.nbytes][~inside].any(), "memory outside of the gradient was written"


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_rows_give_what_the_definition_says(arch: str, dtype: str, vocab: int) -> None:
    native = SimulatedNative(arch)
    wide = vocab % 2 == 1  # odd vocabularies have a gap between rows and an unaligned start
    layouts = [(vocab, 0), (vocab + 5, 3)] if ALL else [(vocab + 5, 3) if wide else (vocab, 0)]
    for stride, offset in layouts:
        rows = Rows(dtype, labels_for(vocab), vocab, stride, offset, seed=vocab)
        plain = run_token_logp(native, rows)
        check_token_logp(rows, plain, 0)
        out = run_token_logp(native, rows, ALL_STATS)
        check_token_logp(rows, out, ALL_STATS)

        weight = np.linspace(-1, 1, rows.rows).astype(np.float32)
        scale = np.array([3.0], np.float32)
        grad = run_logits_grad(native, rows, out["row_max"], out["row_sum"], weight, scale=scale)
        check_only_rows_written(rows, grad)
        check_grad(rows, rows, grad, weight, 3.0)
        # A gradient with another alignment than the logits.
        other = Rows(dtype, labels_for(vocab), vocab, vocab + 2, 1)
        grad = run_logits_grad(native, rows, out["row_max"], out["row_sum"], weight, grad=other)
        check_only_rows_written(other, grad)
        check_grad(rows, other, grad, weight)
        grad = run_logits_grad(native, rows, out["row_max"], out["row_sum"], weight, is_in_place=True)
        check_only_rows_written(rows, grad)
        check_grad(rows, rows, grad, weight)


@pytest.mark.parametrize("vocab", [7, 1003, 4096, 5003])
@pytest.mark.parametrize(("dtype", "grad_dtype"), NARROWED)
@pytest.mark.parametrize("arch", ARCHS if ALL else ("sm_90",))
def test_a_gradient_may_be_narrower_than_its_logits(arch: str, dtype: str, grad_dtype: str, vocab: int) -> None:
    native = SimulatedNative(arch)
    for stride, offset, grad_offset in ((vocab, 0, 0), (vocab + 5, 3, 3), (vocab + 5, 3, 2)):
        rows = Rows(dtype, labels_for(vocab), vocab, stride, offset, seed=vocab)
        out = run_token_logp(native, rows)
        weight = np.linspace(-1, 1, rows.rows).astype(np.float32)
        place = Rows(grad_dtype, labels_for(vocab), vocab, stride, grad_offset)
        grad = run_logits_grad(native, rows, out["row_max"], out["row_sum"], weight, grad=place)
        check_only_rows_written(place, grad)
        check_narrow_grad(rows, place, grad, weight)


def check_narrow_grad(rows: Rows, place: Rows, buffer: object, weight: np.ndarray) -> None:
    """Checks the gradient in ``buffer``. Its dtype is narrower than the dtype of the logits.

    ``place`` gives the dtype and the layout of the gradient.
    """
    smallest = 2.0**-25 if place.dtype == "float16" else 0
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[place.dtype]
    exact = exact_rows(rows)
    for row, label in enumerate(rows.labels):
        got = place.read(buffer, row)
        if label == -100:
            assert not got.any()
        elif not rows.is_scored[row]:
            assert np.isnan(got).all()
        else:
            expected = weight[row] * ((np.arange(rows.vocab) == label) - exact["p"][row])
            bound = (unit + 6e-6) * np.abs(expected) + smallest
            bound[label] += 4e-7 * abs(weight[row])
            assert (np.abs(got - expected) <= bound).all(), f"row {row}"


@pytest.mark.parametrize(("dtype", "grad_dtype"), NARROWED)
def test_a_narrow_gradient_has_the_same_bits_in_any_order_of_blocks(dtype: str, grad_dtype: str) -> None:
    rows = Rows(dtype, [3, -100, 5000, 17, 9000, 9001], 9001, 9001)
    out = run_token_logp(SimulatedNative(traffic=False), rows)
    weight, place = np.linspace(-1, 1, 6).astype(np.float32), Rows(grad_dtype, [0] * 6, 9001, 9001)

    def run(**options: object) -> bytes:
        native = SimulatedNative(traffic=False, **options)
        return run_logits_grad(native, rows, out["row_max"], out["row_sum"], weight, grad=place).raw.tobytes()

    expected = run()
    for seed in range(20):
        assert run(schedule="random", seed=seed, check_races="raise" if ALL else False) == expected, f"seed {seed}"


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param([3], id="one row"),
        pytest.param([-100] * 5, id="no labelled row"),
        pytest.param(list(range(20)), id="every row labelled"),
        pytest.param([-100] * 300 + [1, 2, 3] + [-100] * 300, id="fewer labelled rows than blocks"),
        pytest.param([-100, 5, 6] * 30, id="more rows than blocks"),
        pytest.param(([-100] * 40 + [9] * 3) * 2, id="labelled rows together at the ends of sequences"),
    ],
)
@pytest.mark.parametrize("vocab", [1003, 9001])
def test_any_number_of_labelled_rows_is_shared_out(labels: list[int], vocab: int) -> None:
    native = SimulatedNative(traffic=False)
    rows = Rows("bfloat16", labels, vocab, vocab)
    out = run_token_logp(native, rows, ALL_STATS)
    check_token_logp(rows, out, ALL_STATS)
    weight = np.full(rows.rows, 0.25, np.float32)
    grad = run_logits_grad(native, rows, out["row_max"], out["row_sum"], weight, scale=np.array([2.0]))
    check_only_rows_written(rows, grad)
    check_grad(rows, rows, grad, weight, 2.0)


def test_more_rows_than_a_grid_may_have_blocks() -> None:
    labels = np.full(70_000, -100)
    labels[[0, 1, 65_535, 65_536, 69_999]] = 1
    rows = Rows("bfloat16", labels.tolist(), 3, 3)
    out = run_token_logp(SimulatedNative(traffic=False), rows)
    check_token_logp(rows, out, 0)


def test_lists_longer_than_a_block_holds() -> None:
    rows = Rows("float32", [1, 0] * 1300, 2, 2)  # 2,600 rows, few enough bytes for one block
    native = SimulatedNative(traffic=False)
    out = run_token_logp(native, rows, multiprocessors=1)
    assert native.reports[-1][1].grid[0] <= 4
    check_token_logp(rows, out, 0)


def test_rows_beyond_2_to_the_31_elements_are_found() -> None:
    vocab, stride = 1003, 2**30 + 8
    rows = Rows("bfloat16", [5, -100, 1002], vocab, vocab)
    far = ptxsim.Buffer(nbytes=16)
    far.nbytes = 2 * (2 * stride + vocab)
    far.raw = np.zeros(-(-far.nbytes // 32) * 32, np.uint8)  # pages that are never touched
    for row in (0, 2):
        far.raw[2 * row * stride :][: 2 * vocab] = rows.values[row].view(torch.uint8).numpy()
    rows.buffer, rows.stride = far, stride
    native = SimulatedNative(traffic=False)
    out = run_token_logp(native, rows)
    check_token_logp(rows, out, 0)
    weight = np.ones(3, np.float32)
    run_logits_grad(native, rows, out["row_max"], out["row_sum"], weight, is_in_place=True)
    check_grad(rows, rows, far, weight)


@pytest.mark.parametrize("vocab", [5, 3000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_infinite_and_undefined_logits(dtype: str, vocab: int) -> None:
    rows = Rows(dtype, [0, 1, 2, 3, 4, 1], vocab, vocab)
    values = rows.values
    values[0, 1:3] = -torch.inf  # banned tokens: p is 0
    values[1, 1] = -torch.inf  # the label is banned
    values[2] = -torch.inf
    values[3, vocab - 1] = torch.inf
    values[4, vocab // 2] = torch.nan
    values[5] += 10_000 if dtype == "float32" else 512  # a large common offset
    rows.write()
    native = SimulatedNative()
    out = run_token_logp(native, rows, ALL_STATS)
    with np.errstate(invalid="ignore"):
        exact = exact_rows(rows)
    np.testing.assert_allclose(out["logp"][[0, 5]], exact["logp"][[0, 5]], atol=2e-6)
    assert out["logp"][1] == -np.inf
    assert np.isnan(out["logp"][2:5]).all()
    stats = out["row_stats"].reshape(4, -1)
    np.testing.assert_allclose(stats[0, [0, 1, 5]], exact["entropy"][[0, 1, 5]], atol=3e-6)
    assert np.isnan(stats[[0, 2, 3]][:, 3:5]).all()
    weight = np.full(6, 0.5, np.float32)
    grad = run_logits_grad(native, rows, out["row_max"], out["row_sum"], weight)
    assert (rows.read(grad, 0)[1:3] == 0).all()
    assert rows.read(grad, 1)[1] == 0.5
    for row in (2, 3, 4):
        assert np.isnan(rows.read(grad, row)).all()


def test_zeros_that_are_there_already_are_not_written() -> None:
    rows = Rows("bfloat16", [-100, 1, 1003, -100], 1003, 1003)
    native = SimulatedNative()
    out = run_token_logp(native, rows)
    grad = run_logits_grad(native, rows, out["row_max"], out["row_sum"], np.ones(4, np.float32), is_zeroed=True)
    touched = [bool(grad.valid[rows.place(row)].any()) for row in range(4)]
    assert touched == [False, True, True, False]


# ------------------------------------------------------------------------------------------------ the whole forward


def exact_pair_loss(
    logp: np.ndarray,
    labels: np.ndarray,
    ref_logp: np.ndarray,
    bounds: np.ndarray,
    state: tuple[float, float],
    **c: object,
) -> dict[str, np.ndarray]:
    """Computes the outputs of pair_loss in float64, from their definitions.

    ``state`` is (delta, number of updates) of the reward shift. ``c`` has the settings of the loss.
    """

    def log_sigmoid(x: float) -> float:
        return -float(np.logaddexp(0, -x))

    def sigmoid(x: float) -> float:
        return float(np.exp(log_sigmoid(x)))

    pairs = len(ref_logp) // 2
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    labelled = [labels[part] != -100 for part in parts]
    sums = [float(logp[part][on].sum()) for part, on in zip(parts, labelled, strict=True)]
    tokens = np.array([int(on.sum()) for on in labelled])
    both = (tokens[:pairs] > 0) & (tokens[pairs:] > 0)
    reward = np.where(np.tile(both, 2), c["beta"] * (np.array(sums) - ref_logp), 0.0)
    delta, updates = state
    count = 2 * both.sum()
    if c["rule"] and count:
        mean = reward.sum() / count
        moved = (
            delta + (mean - delta) / (updates + 1) if c["rule"] == 1 else c["decay"] * delta + (1 - c["decay"]) * mean
        )
        new_state = (moved, updates + 1)
    else:
        new_state = (delta, updates)
    delta = new_state[0] if c["update_first"] else delta
    chosen = tokens[:pairs]
    responses = max(int((chosen > 0).sum()), 1)
    per_token = (
        1 / (np.maximum(chosen, 1) * responses) if c["average_sequences"] else np.full(pairs, 1 / max(chosen.sum(), 1))
    )
    ntp = -float((np.array(sums[:pairs]) * per_token)[chosen > 0].sum())
    dpo = bco = 0.0
    weight = np.zeros(len(logp))
    smooth = c["label_smoothing"]
    for i in range(pairs):
        good, bad = reward[i], reward[pairs + i]
        dpo -= (1 - smooth) * log_sigmoid(good - bad) + smooth * log_sigmoid(bad - good)
        bco -= log_sigmoid(good - delta) + log_sigmoid(delta - bad)
        by_margin = c["dpo_weight"] * (smooth * sigmoid(good - bad) - (1 - smooth) * sigmoid(bad - good))
        by_good = by_margin - c["bco_weight"] * sigmoid(delta - good)
        by_bad = -by_margin + c["bco_weight"] * sigmoid(bad - delta)
        scale = c["beta"] / pairs * both[i]
        weight[parts[i]] = np.where(labelled[i], scale * by_good - c["ntp_weight"] * per_token[i], 0)
        weight[parts[pairs + i]] = np.where(labelled[pairs + i], scale * by_bad, 0)
    terms = np.array([dpo / pairs, bco / pairs, ntp])
    return {
        "loss": terms @ np.array([c["dpo_weight"], c["bco_weight"], c["ntp_weight"]]),
        "terms": terms,
        "reward_shift": delta,
        "sums": np.array(sums),
        "reward": reward,
        "tokens": tokens,
        "new_state": np.array(new_state),
        "batch": np.array([reward.sum(), count]),
        "weight": weight,
    }


def pair_labels(lengths: list[int], vocab: int, seed: int = 0) -> tuple[list[int], np.ndarray]:
    """Returns labels and offsets of packed sequences. The first half of each sequence is ignored."""
    random = np.random.default_rng(seed)
    labels: list[int] = []
    for length in lengths:
        labels += [-100 if t < length // 2 else int(random.integers(vocab)) for t in range(length)]
    return labels, np.cumsum([0, *lengths])


@pytest.mark.parametrize("stats", [0, ALL_STATS])
@pytest.mark.parametrize(
    ("lengths", "config"),
    [
        pytest.param([6, 6], {}, id="one pair"),
        pytest.param([5, 9, 1, 7, 3, 8], {"rule": 2, "label_smoothing": 0.1, "average_sequences": True}, id="packed"),
        pytest.param([4] * 20, {"rule": 0, "ntp_weight": 0.0}, id="more sequences than warps"),
    ],
)
def test_the_forward_is_the_loss_in_one_launch(lengths: list[int], config: dict[str, object], stats: int) -> None:
    vocab = 1003
    labels, bounds = pair_labels(lengths, vocab)
    if len(lengths) == 6:
        labels[bounds[2] : bounds[3]] = [-100]  # a pair with an empty side
    rows = Rows("bfloat16", labels, vocab, vocab)
    ref_logp = np.linspace(-30, -12, len(lengths)).astype(np.float32 if stats else np.float64)
    offsets = None if len(set(lengths)) == 1 else bounds.astype(np.int32 if stats else np.int64)
    native = SimulatedNative()
    out = run_forward(native, rows, Pairs(rows.rows, ref_logp, offsets), stats, **config)
    check_token_logp(rows, out, stats)
    settings = {**CONFIG, **config}
    expected = exact_pair_loss(
        out["logp"].astype(np.float64), rows.labels, ref_logp.astype(np.float64), bounds, (0.2, 3.0), **settings
    )
    for name, value in expected.items():
        np.testing.assert_allclose(out[name].squeeze(), value, rtol=2e-7, atol=1e-9, err_msg=name)

    apart = run_token_logp(native, rows, stats)
    pair = run_pair_loss(native, apart["logp"], rows.labels, Pairs(rows.rows, ref_logp, offsets), **config)
    for name, value in (apart | pair).items():
        assert value.tobytes() == out[name].tobytes(), f"{name} differs between one launch and two"


@pytest.mark.parametrize(
    "offsets", [[1, 5, 10], [0, 5, 9], [0, 0, 10], [0, 12, 10], [0, -3, 10]], ids=lambda offsets: str(offsets)
)
def test_offsets_that_make_no_sense_give_nan(offsets: list[int]) -> None:
    out = run_pair_loss(
        SimulatedNative(),
        np.full(10, -1, np.float32),
        np.ones(10, np.int64),
        Pairs(10, np.zeros(2), np.array(offsets)),
    )
    assert np.isnan(out["loss"]).all()
    assert np.isnan(out["weight"]).all()
    assert out["new_state"].tolist() == [0.2, 3.0]


def test_a_label_out_of_range_makes_the_loss_nan() -> None:
    rows = Rows("float32", [1, 2, 7, 1], 7, 7)
    out = run_forward(SimulatedNative(), rows, Pairs(4, np.zeros(2)))
    assert np.isnan(out["loss"]).all()


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        pytest.param(arch, dtype, marks=() if ALL or (arch, dtype) == ("sm_90", "bfloat16") else BY_HAND)
        for arch in ARCHS
        for dtype in ("float32", "bfloat16", "float16")
    ],
)
@pytest.mark.parametrize(("vocab", "length"), [(9001, 2), (1003, 4)], ids=["split rows", "many rows"])
def test_the_order_of_blocks_and_warps_does_not_change_a_bit(vocab: int, length: int, arch: str, dtype: str) -> None:
    labels, _ = pair_labels([length, length] if vocab == 9001 else [length] * 4, vocab)
    rows = Rows(dtype, labels, vocab, vocab)
    ref_logp = np.linspace(-25, -15, 2 if vocab == 9001 else 4)

    def run(**options: object) -> bytes:
        native = SimulatedNative(arch, traffic=False, **options)
        out = run_forward(native, rows, Pairs(rows.rows, ref_logp), ALL_STATS)
        grad = run_logits_grad(native, rows, out["row_max"], out["row_sum"], out["weight"])
        return b"".join(value.tobytes() for value in out.values()) + grad.raw.tobytes()

    expected = run()
    for seed in range(20):
        races = "raise" if ALL and seed == 0 else False  # looking for races takes many times longer
        assert run(schedule="random", seed=seed, check_races=races) == expected, f"seed {seed}"
