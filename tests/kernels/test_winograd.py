"""The algebra of winograd_tiles.h over Python integers: its matrices, and what it does modulo 2**32."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxq.kernels.binary import PACKAGE

HEADER = [re.sub(r"//|[BAG](\^T)? =", "", line) for line in Path(PACKAGE, "winograd_tiles.h").read_text().splitlines()]
TABLE = [[int(n) for n in line.split()] for line in HEADER if re.fullmatch(r"[-\s\d]+", line) and line.strip()]
B = np.array([row[:6] for row in TABLE], object)
G = np.array([row[6:9] for row in TABLE], object)
A = np.array([row[9:] for row in TABLE[:4]], object)


def outputs(d, g):
    """The definition: [4, 4] sums of products."""
    return np.array([[(d[i : i + 3, j : j + 3] * g).sum() for j in range(4)] for i in range(4)], object)


def test_the_transforms_fit_int16():
    assert [m.shape for m in (B, G, A)] == [(6, 6), (6, 3), (4, 6)]
    assert np.abs(B).sum(1).max() ** 2 * 255 < 2**15
    assert np.abs(G).sum(1).max() ** 2 * 128 < 2**15


INPUTS = st.lists(st.sampled_from([0, 1, 127, 254, 255]), min_size=36, max_size=36)
WEIGHTS = st.lists(st.sampled_from([-128, -127, -1, 0, 1, 127]), min_size=9, max_size=9)


@given(INPUTS, WEIGHTS)
def test_576_times_the_outputs(d, g):
    d, g = np.array(d, object).reshape(6, 6), np.array(g, object).reshape(3, 3)
    assert np.array_equal(A @ ((G @ g @ G.T) * (B @ d @ B.T)) @ A.T, 576 * outputs(d, g))


@pytest.mark.parametrize("y", [0, 1, -1, 12345, -(2**25), 2**25 - 1])
def test_what_comes_back_modulo_two_to_the_32(y):
    left = np.array([576 * y % 2**32], np.uint32) * np.uint32(0x38E38E39)
    assert (left.astype(np.int32) >> 6).item() == y
