"""Tests the statistics of an evaluation. The expected values are published values, or are computed by hand."""

import math

import pytest

from mpo_ext.evaluate.statistics import compare, majority, mcnemar, mean_and_error, pass_at_k, wilson


def test_the_error_of_the_mean_is_over_questions() -> None:
    # Squares around 0.75: 3 * 0.0625 + 0.5625 = 0.75; over 3 and 4: 0.0625.
    assert mean_and_error([1, 0, 1, 1]) == (0.75, 0.25)
    assert mean_and_error([0.5]) == (0.5, None)
    assert mean_and_error([]) == (None, None)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.5, 10, 0.2366, 0.7634), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.9, 100, 0.8256, 0.9448)],
)
def test_wilson_agrees_with_published_values(share: float, count: int, low: float, high: float) -> None:
    assert wilson(share, count) == pytest.approx((low, high), abs=5e-5)


def test_pass_at_k_draws_without_replacement() -> None:
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs contain the right sample
    assert pass_at_k(4, 3, 2) == 1.0
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"k must be in \[1, 4\], got 5"):
        pass_at_k(4, 1, 5)


def test_the_majority_is_the_largest_group_of_equal_answers() -> None:
    def is_same(one: str, other: str) -> bool:
        return one.lower() == other.lower()

    assert majority(["a", "b", "B"], is_same) == 1
    assert majority(["a", "b", "b", "A"], is_same) == 0  # equally frequent: the earlier answer wins
    assert majority([None, None, "c"], is_same) == 2  # unreadable answers do not count
    assert majority([None, None], is_same) is None


def test_mcnemar_is_exact() -> None:
    assert mcnemar(1, 6) == mcnemar(6, 1) == 2 * (1 + 7) / 2**7
    assert mcnemar(0, 10) == 2 / 1024
    assert mcnemar(5, 5) == mcnemar(0, 0) == 1.0
    assert 0 < mcnemar(20_000, 21_000) < 1e-5
    scipy = pytest.importorskip("scipy.stats", reason="needs scipy.stats, which dev installs")
    assert mcnemar(17, 40) == pytest.approx(scipy.binomtest(17, 57).pvalue, rel=1e-12)


def test_a_comparison_pairs_the_questions() -> None:
    first, second = [1, 1, 0, 0, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 1, 0]
    compared = compare(first, second, samples=1)
    # Differences 0 -1 1 1 1 1 0 0: mean 3/8, sum of squares 5 - 8 * 9/64 = 3.875, over 7 and 8.
    assert (compared.questions, compared.gained, compared.lost) == (8, 4, 1)
    assert compared.difference == 0.375
    assert compared.standard_error == pytest.approx(math.sqrt(3.875 / 56))
    assert compared.p == 2 * (1 + 5) / 2**5
    assert compared.test == "mcnemar"


def test_a_comparison_with_several_samples_uses_fractions() -> None:
    compared = compare([0.25, 0.5, 0.0], [0.5, 0.5, 0.5], samples=4)
    # Differences 0.25 0 0.5: mean 0.25, sum of squares 0.125, error sqrt(0.125 / 6), z = sqrt(3).
    assert compared.p == pytest.approx(math.erfc(math.sqrt(3 / 2)))
    assert (compared.gained, compared.lost, compared.test) == (2, 0, "normal")
    assert compare([0.5, 0.0], [0.5, 0.0], samples=2).p == 1.0
    assert compare([0.0, 0.0], [0.5, 0.5], samples=2).p is None  # without spread there is no p-value
    assert compare([], [], samples=1).p is None
