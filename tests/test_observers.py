"""Observers: what range a tensor takes, exactly counted, and the least squared error of the histogram."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fxq.errors import CalibrationError
from fxq.numerics import dequantize, quantize
from fxq.observers import BINS, OBSERVERS, Histogram, MinMax, MovingAverage, Percentile, WeightObserver
from fxq.qtypes import SCALE_FLOOR, QParams

ALL = pytest.mark.parametrize("kind", OBSERVERS.values(), ids=list(OBSERVERS))


def seen(kind, *batches):
    observer = kind("the output of fc1")
    for batch in batches:
        assert observer(batch) is batch
    return observer


def squared_error(observer, x):
    q = observer.qparams()
    return float(
        ((dequantize(quantize(x.numpy(), q.scale, q.zero_point), q.scale, q.zero_point) - x.numpy()) ** 2).sum()
    )


@ALL
def test_no_data(kind):
    observer = kind("the output of fc1")
    assert not observer.seen
    with pytest.raises(CalibrationError, match=r"the output of fc1 was never computed .* keep its module float"):
        observer.qparams()
    observer(torch.empty(0, 4))
    assert not observer.seen


@ALL
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(kind, value):
    observer = seen(kind, torch.randn(4))
    before = copy.deepcopy(observer.state_dict())
    with pytest.raises(CalibrationError, match="the output of fc1 holds NaN or infinity"):
        observer(torch.tensor([1.0, value, 2.0]))
    assert all(torch.equal(before[key], value) for key, value in observer.state_dict().items())


@ALL
def test_all_zeros(kind):
    assert seen(kind, torch.zeros(3, 4)).qparams() == QParams(1.0, 0)


@ALL
def test_one_value(kind):
    for value, zero_point in ((5.0, 0), (-5.0, 255)):
        q = seen(kind, torch.full((7,), value)).qparams()
        assert q.zero_point == zero_point
        assert abs((255 if value > 0 else -255) * q.scale - value) < 0.02


@ALL
def test_zero_is_always_exact(kind):
    for shift in (3.0, -3.0, 0.0):
        q = seen(kind, torch.rand(1000) + shift).qparams()
        assert dequantize(np.uint8([q.zero_point]), q.scale, q.zero_point) == 0
        assert q.zero_point == {3.0: 0, -3.0: 255, 0.0: 0}[shift]


@ALL
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30, 3e38])
def test_any_magnitude(kind, scale):
    x = torch.linspace(-1, 1, 10_000) * scale
    q = seen(kind, x).qparams()
    assert SCALE_FLOOR <= q.scale < 1e37
    if scale >= 1:
        assert abs(q.scale * 255 - 2 * scale) < 0.05 * scale


@ALL
def test_state_dict_round_trip(kind):
    observer = seen(kind, torch.randn(100), torch.randn(100) * 3)
    other = kind("elsewhere")
    other.load_state_dict(observer.state_dict())
    assert other.qparams() == observer.qparams()
    other(torch.randn(100) * 9)
    observer_again = copy.deepcopy(observer)
    assert observer_again.qparams() == observer.qparams() != other.qparams()
    assert "the output of fc1" in repr(observer)


@ALL
def test_requires_grad_and_any_layout(kind):
    x = torch.randn(6, 8, requires_grad=True)
    assert seen(kind, x).qparams() == seen(kind, x.detach()).qparams()
    assert seen(kind, x.detach().t()).qparams() == seen(kind, x.detach()).qparams()


def test_min_max():
    observer = seen(MinMax, torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]))
    assert observer.range() == (-2.0, 4.0)


def test_moving_average():
    observer = seen(MovingAverage, torch.tensor([-1.0, 1.0]), torch.tensor([-2.0, 11.0]))
    assert observer.range() == pytest.approx((-1.1, 2.0))
    assert seen(MovingAverage, torch.tensor([3.0])).range() == (3.0, 3.0)


@given(
    st.lists(
        npst.arrays(np.float32, st.integers(1, 20), elements=st.floats(-1000, 1000, width=16)), min_size=1, max_size=6
    )
)
def test_histogram_counts_every_value_but_zeros(batches):
    observer = seen(Histogram, *map(torch.from_numpy, batches))
    values = np.concatenate(batches)
    assert observer.counts.sum() == np.count_nonzero(values)
    assert (observer.counts == observer.counts.round()).all()
    if np.any(values):
        low, width = observer.start.item(), observer.width.item()
        assert low <= values.min()
        assert low + width >= values.max()
        # Each value is in a bin that holds it; merging never moves one.
        edges = low + np.arange(BINS + 1) * (width / BINS)
        wanted, _ = np.histogram(values[values != 0].astype(np.float64), edges)
        assert np.abs(np.cumsum(wanted) - np.cumsum(observer.counts.numpy())).max() <= np.count_nonzero(values)
        assert abs(int(wanted.sum()) - int(observer.counts.sum())) == 0


def test_histogram_of_few_values_reaches_beyond_them():
    """The largest of a hundred values of a distribution with tails is not the largest there is."""
    others, errors = torch.randn(100_000), {Histogram: 0.0, MinMax: 0.0}
    for _ in range(8):
        x = torch.randn(100)
        for kind in errors:
            errors[kind] += squared_error(seen(kind, x), others)
    assert errors[Histogram] < 0.2 * errors[MinMax]
    low, high = seen(Histogram, torch.randn(1_000_000)).range()
    assert max(-low, high) < 5, "of a million it hardly matters what one more would be"


@pytest.mark.parametrize(
    "x",
    [torch.rand(640), torch.randn(640).clamp(-1, 1), torch.randint(1, 4, (640,)).float(), torch.full((9,), 5.0)],
    ids=["uniform", "clamped", "discrete", "constant"],
)
def test_histogram_of_few_values_does_not_reach_beyond_a_bound(x):
    low, high = seen(Histogram, x).range()
    assert high <= 1.05 * x.max()
    assert low >= 1.05 * min(0.0, float(x.min()))


def test_histogram_range_doubles_to_either_side():
    observer = seen(Histogram, torch.tensor([1.0, 2.0]))
    assert observer.start == 0
    width = observer.width.item()
    observer(torch.tensor([-1.0]))
    assert (observer.start.item(), observer.width.item()) == (-width, 2 * width)
    observer(torch.tensor([7.0]))
    assert (observer.start.item(), observer.width.item()) == (-width, 8 * width / 1) or observer.width == 4 * width * 2
    values, counts = observer._values()
    assert counts.tolist() == [1, 1, 1, 1]
    assert np.abs(values - [-1, 1, 2, 7]).max() < observer.width.item() / BINS


def test_order_of_batches_hardly_matters():
    batches = [torch.randn(1000) * s for s in (0.1, 1, 10)]
    a, b = seen(Histogram, *batches).qparams(), seen(Histogram, *reversed(batches)).qparams()
    assert a.scale == pytest.approx(b.scale, rel=0.02)


@pytest.mark.parametrize("freedom", [3, 5])
def test_histogram_beats_min_max_on_heavy_tails(freedom):
    x = torch.distributions.StudentT(freedom).sample((1_000_000,))
    assert squared_error(seen(Histogram, x), x) < 0.95 * squared_error(seen(MinMax, x), x)


@pytest.mark.parametrize("count", [100, 10_000])
@pytest.mark.parametrize(
    "make",
    [torch.randn, torch.rand, lambda n: torch.randn(n).relu(), lambda n: 4 * torch.rand(n) - 3],
    ids=["normal", "uniform", "relu", "both signs"],
)
def test_histogram_is_no_worse_than_min_max_on_unseen_values(make, count):
    others, errors = make(100_000), {Histogram: 0.0, MinMax: 0.0}
    for _ in range(16):
        x = make(count)
        for kind in errors:
            errors[kind] += squared_error(seen(kind, x), others)
    assert errors[Histogram] <= 1.05 * errors[MinMax]


def test_percentile():
    x = torch.linspace(-1, 1, 100_000)
    x[0], x[-1] = -100.0, 50.0
    low, high = seen(Percentile, x).range()
    assert low == pytest.approx(-1, abs=0.05)
    assert high == pytest.approx(1, abs=0.05)
    assert seen(Percentile, torch.tensor([1.0, 2.0])).range()[1] == pytest.approx(2.0, abs=1e-3)


@given(npst.arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32)))
def test_weight_observer(w):
    for granularity, peaks in (("per_channel", np.abs(w).max(1)), ("per_tensor", np.abs(w).max().reshape(1))):
        observer = WeightObserver("weight fc.weight", granularity)
        tensor = torch.from_numpy(w)
        assert observer(tensor) is tensor
        scales = observer.scales_of(tensor).numpy()
        assert scales.dtype == np.float32
        assert scales.shape == peaks.shape
        expected = np.maximum((peaks.astype(np.float64) / 127).astype(np.float32), np.float32(SCALE_FLOOR))
        assert np.array_equal(scales, np.where(peaks == 0, np.float32(1), expected))


def test_weight_observer_of_nothing():
    assert WeightObserver("w", "per_channel")(torch.zeros(0, 4)).shape == (0, 4)
    assert WeightObserver("w", "per_tensor")(torch.zeros(2, 0)).shape == (2, 0)
