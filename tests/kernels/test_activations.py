"""The stated errors of the float32 activations, against float64, and their behaviour at the ends."""

import math

import numpy as np
import pytest

from fxq import numerics

X = np.unique(
    np.concatenate(
        [np.linspace(-87, 87, 400_001), np.geomspace(1e-30, 87, 50_001), -np.geomspace(1e-30, 87, 50_001)]
    ).astype(np.float32)
)
D = X.astype(np.float64)


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def _phi(x):
    """The normal distribution function, without cancellation on the left."""
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


TRUTH = {
    "sigmoid": _sigmoid(D),
    "silu": D * _sigmoid(D),
    "gelu": D * _phi(D),
    "gelu_tanh": D * _sigmoid(2 * math.sqrt(2 / math.pi) * (D + 0.044715 * D**3)),
    "tanh": np.tanh(D),
    "relu": np.maximum(D, 0),
    "hardsigmoid": np.clip(D + 3, 0, 6) / 6,
    "hardswish": D * np.clip(D + 3, 0, 6) / 6,
}


@pytest.mark.parametrize(
    ("name", "absolute_below_0", "relative_above_0"),
    [
        ("sigmoid", 1e-7, 1.6e-7),
        ("silu", 1e-7, 2.5e-7),
        ("gelu", 2.1e-4, 1e-3),
        ("gelu_tanh", 2e-7, 4e-7),
        ("tanh", 5e-7, 5e-7),
        ("relu", 0, 0),
        ("hardsigmoid", 1e-7, 1.8e-7),
        ("hardswish", 2e-7, 3e-7),
    ],
)
def test_errors_are_as_stated(name, absolute_below_0, relative_above_0):
    found = numerics.ACTIVATIONS[name](X)
    assert found.dtype == np.float32
    error = np.abs(found - TRUTH[name])
    assert error[X < 0].max() <= absolute_below_0
    assert (error[X > 0] / TRUTH[name][X > 0]).max() <= relative_above_0


def test_relative_errors_that_hold_on_both_sides():
    for name, bound in (("sigmoid", 4e-6), ("tanh", 5e-7)):
        relative = np.abs(numerics.ACTIVATIONS[name](X)[X != 0] / TRUTH[name][X != 0] - 1)
        assert relative.max() <= bound


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("sigmoid", 0, 1),
        ("silu", 0, np.inf),
        ("gelu", 0, np.inf),
        ("gelu_tanh", 0, np.inf),
        ("tanh", -1, 1),
        ("relu", 0, np.inf),
    ],
)
def test_the_ends(name, left, right):
    x = np.array([-np.inf, -3e38, np.nan, 3e38, np.inf], np.float32)
    found = numerics.ACTIVATIONS[name](x)
    assert found[0] == pytest.approx(left, abs=1e-30)
    assert found[1] == pytest.approx(left, abs=1e-30)
    assert np.isnan(found[2])
    assert found[3] == (right if np.isfinite(right) else x[3])
    assert found[4] == right


def test_hard_activations_reach_their_ends():
    assert numerics.hardsigmoid(np.float32([-3, 3, 40])).tolist() == [0, 1, 1]
    assert numerics.hardswish(np.float32([-3, 3, 40])).tolist() == [0, 3, 40]


def test_tanh_and_sigmoid_never_leave_their_range():
    assert np.abs(numerics.tanh(X)).max() <= 1
    assert 0 < numerics.sigmoid(X).min() <= numerics.sigmoid(X).max() <= 1
