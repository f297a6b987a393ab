"""Paired differences and the closed gap of made-up scores whose answer is known."""

import numpy as np
import pytest

from nnunet_oneshot.evaluation.statistics import (
    closed_gap,
    mean_difference,
    mean_score,
    paired,
    score_table,
    seed_spread,
)


def rows(method, values, *, atlas="a", fold="0", seed=1, label="x"):
    """Rows of one run; ``values`` is case to Dice."""
    shared = {"method": method, "atlas": atlas, "fold": fold, "seed": seed, "label": label}
    return [{**shared, "case": case, "dice": value, "hd95": 1.0, "nsd_2mm": 1.0} for case, value in values.items()]


def test_labels_and_seeds_are_averaged_and_missing_scores_left_out():
    table = score_table(
        rows("m", {"c1": 0.4, "c2": 0.0})
        + rows("m", {"c1": 0.8, "c2": None}, label="y")
        + rows("m", {"c1": 0.0}, seed=2),
        "m",
    )
    assert table.cases == (("0", "c1"), ("0", "c2"))
    assert table.values.tolist() == [[pytest.approx((0.6 + 0.0) / 2), 0.0]]


def test_same_case_of_two_folds_counts_twice():
    table = score_table(rows("m", {"c": 1.0}) + rows("m", {"c": 0.0}, fold="1"), "m")
    assert table.values.shape == (1, 2)


def test_mean_of_a_method_lies_in_its_interval_and_is_none_where_nothing_was_scored():
    mean = mean_score(score_table(rows("m", {f"c{i}": 0.1 * i for i in range(6)}), "m"))
    assert mean.value == pytest.approx(0.25) and 0.1 < mean.low < 0.2 and 0.3 < mean.high < 0.4
    assert mean_score(score_table(rows("m", {"c": None}), "m")) is None


def test_constant_difference_has_an_interval_of_no_width():
    cases = {f"c{i}": 0.1 * i for i in range(6)}
    higher = {case: value + 0.2 for case, value in cases.items()}
    data = rows("low", cases) + rows("high", higher)
    difference = mean_difference(score_table(data, "high"), score_table(data, "low"))
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.2, 0.2, 0.2))


def test_interval_agrees_with_the_normal_approximation_over_cases():
    generator = np.random.default_rng(0)
    deviations = generator.normal(0.05, 0.1, size=80)
    data = rows("m", {f"c{i}": float(d) for i, d in enumerate(deviations)})
    data += rows("n", {f"c{i}": 0.0 for i in range(80)})
    interval = mean_difference(score_table(data, "m"), score_table(data, "n"), resamples=4000)
    half = 1.96 * deviations.std() / np.sqrt(80)
    assert interval.value == pytest.approx(deviations.mean())
    assert interval.low == pytest.approx(deviations.mean() - half, abs=0.005)
    assert interval.high == pytest.approx(deviations.mean() + half, abs=0.005)


def test_disagreeing_atlases_widen_the_interval():
    cases = [f"c{i}" for i in range(10)]
    data = rows("n", dict.fromkeys(cases, 0.5), atlas="a") + rows("n", dict.fromkeys(cases, 0.5), atlas="b")
    data += rows("m", dict.fromkeys(cases, 0.6), atlas="a") + rows("m", dict.fromkeys(cases, 0.4), atlas="b")
    interval = mean_difference(score_table(data, "m"), score_table(data, "n"))
    assert interval.value == pytest.approx(0.0)
    assert (interval.low, interval.high) == pytest.approx((-0.1, 0.1))


def test_method_without_an_atlas_is_compared_with_every_atlas():
    data = rows("full", {"c": 0.9, "d": 0.7}, atlas=None)
    data += rows("m", {"c": 0.5, "d": 0.5}, atlas="a") + rows("m", {"c": 0.6, "d": 0.6}, atlas="b")
    full, one_shot = paired(score_table(data, "full"), score_table(data, "m"))
    assert full.tolist() == [[0.9, 0.7]] * 2
    assert one_shot.tolist() == [[0.5, 0.5], [0.6, 0.6]]


def test_methods_without_common_cases_are_not_compared():
    data = rows("m", {"c": 0.5}) + rows("n", {"d": 0.5})
    assert mean_difference(score_table(data, "m"), score_table(data, "n")) is None


def test_half_the_gap():
    data = rows("floor", {"c": 0.4, "d": 0.4}) + rows("m", {"c": 0.6, "d": 0.6})
    data += rows("ceiling", {"c": 0.8, "d": 0.8}, atlas=None)
    gap = closed_gap(*[score_table(data, name) for name in ("m", "floor", "ceiling")])
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.5, 0.5, 0.5))


def test_no_gap_is_not_divided_by():
    data = rows("floor", {"c": 0.8}) + rows("m", {"c": 0.8}) + rows("ceiling", {"c": 0.8}, atlas=None)
    assert closed_gap(*[score_table(data, name) for name in ("m", "floor", "ceiling")]) is None


def test_spread_between_seeds():
    data = rows("m", {"c": 0.5}, seed=1) + rows("m", {"c": 0.7}, seed=2)
    assert seed_spread(data, "m") == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert seed_spread(rows("m", {"c": 0.5}), "m") is None
