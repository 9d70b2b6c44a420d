"""clamp: bounds become integers, and rounding is monotone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from fxq import qdq
from fxq.family import Claim
from fxq.graph import Value
from fxq.ops.clamp import FAMILY
from fxq.spelling import float_bounds

FLOAT, INTEGER = Value(torch.float32, (2, 3)), Value(torch.int64, (2, 3))


def node(target, *rest, source=FLOAT):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["value"] = source
    call = graph.call_function(target, (x, *rest))
    call.meta["value"] = FLOAT
    return fx.GraphModule(nn.Module(), graph), call


@pytest.mark.parametrize(
    ("target", "rest", "bounds"),
    [
        (torch.relu, (), (0.0, None)),
        (torch.clamp, (0, 6), (0.0, 6.0)),
        (torch.clamp, (None, 1.5), (None, 1.5)),
        (torch.clamp, (2.0, -1.0), (-1.0, -1.0)),
        (torch.sigmoid, (), None),
        (F.relu6, (), None),  # normalize_pointwise leaves none
    ],
)
def test_bounds(target, rest, bounds):
    gm, call = node(target, *rest)
    assert float_bounds(call) == bounds
    wanted = None if bounds is None else Claim("carry", (call.args[0],))
    assert FAMILY.claim(gm, call) == wanted


def test_bounds_that_are_computed_or_of_integers_are_not_claimed():
    gm, call = node(torch.clamp, None, None)
    call.args = (call.args[0], call.args[0], None)
    assert float_bounds(call) is None
    assert FAMILY.claim(gm, call) is None
    assert FAMILY.claim(*node(torch.clamp, 0.5, 1.5, source=INTEGER)) is None
    assert float_bounds(None) is float_bounds(3) is None


bound = st.none() | st.floats(-20, 20)


@given(bound, bound, st.floats(1e-3, 1.0), st.integers(0, 255))
def test_clamping_integers_is_clamping_floats(low, high, scale, zero_point):
    if low is None and high is None:
        return
    x = torch.linspace(-30, 30, 999)
    _, call = node(torch.clamp, low, high)
    q = qdq.quantize(x, scale, zero_point)
    q_low, q_high = qdq.integer_bounds(float_bounds(call), scale, zero_point)
    assert q_low <= q_high
    wanted = qdq.quantize(torch.clamp(x, low, high), scale, zero_point)
    assert torch.equal(q.clamp(q_low, q_high), wanted)
