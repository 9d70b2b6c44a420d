"""Models that draw random numbers: fxq leaves the generators as they are."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.randomness import Randomness
from fxq.simulation import Simulation


class Draws(nn.Module):
    """Draws from torch in code that is traced, from all three generators in a leaf."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.leaf = nn.Linear(6, 6), nn.Linear(6, 6), Shakes()

    def forward(self, x):
        return self.last(F.dropout(self.leaf(self.first(x)), 0.1, training=True) + 0.01 * torch.rand(6))


class Shakes(nn.Module):
    def forward(self, x):
        return x + 0.01 * (torch.rand(1) + random.random() + float(np.random.rand()))


def generators():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
    )


@pytest.mark.filterwarnings("ignore::fxq.AccuracyWarning")
def test_nothing_is_drawn_from_the_users_generators():
    model, x = Draws().eval(), torch.randn(4, 6)
    options = {"leaves": (Shakes,)}
    qmodel, prepared = fxq.quantize(model, x, progress=False, **options), fxq.prepare(model, x, **options)
    calls = {
        "trace": lambda: fxq.trace(model, x, **options),
        "prepare": lambda: fxq.prepare(model, x, **options),
        "calibrate": lambda: fxq.calibrate(prepared, [x, x], progress=False),
        "convert": lambda: fxq.convert(prepared),
        "quantize": lambda: fxq.quantize(model, x, check=True, progress=False, **options),
        "prepare_qat": lambda: fxq.prepare_qat(model, x, **options),
        "compare": lambda: fxq.compare(model, qmodel, x, **options),
        "compare with remedies": lambda: fxq.compare(model, qmodel, x, calibration_data=[x], **options),
        "profile": lambda: fxq.profile(qmodel, x),
        "tune": lambda: fxq.tune(model, x, [x], lambda m: 1.0, 0.5, schemes=("w8a8",), progress=False, **options),
    }
    for name, call in calls.items():
        before = generators()
        call()
        assert generators() == before, name


def test_data_draw_from_the_users_generators():
    x = torch.randn(4, 6)
    prepared = fxq.prepare(Draws().eval(), x, leaves=(Shakes,))
    torch.manual_seed(3)
    expected, then = [torch.randn(4, 6) for _ in range(3)], torch.rand(())
    given = []

    def data():
        for _ in range(3):
            given.append(torch.randn(4, 6))
            yield given[-1]

    torch.manual_seed(3)
    fxq.calibrate(prepared, data(), progress=False)
    assert all(map(torch.equal, given, expected)) and torch.rand(()) == then


def test_draws_apart_go_on():
    own = Randomness()
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    drawn = []
    for _ in range(2):
        with own:
            drawn.append(torch.rand(2))
        torch.rand(3)
    assert torch.equal(torch.cat(drawn), expected)


class Drops(nn.Module):
    """Without its own noise the first layer costs the output nothing; with other drops, everything."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.last(F.dropout(torch.relu(self.first(x)), 0.5, training=True))


def test_the_float_and_the_integer_model_are_judged_by_the_same_random_numbers():
    model, x = Drops().eval(), torch.randn(64, 32)
    qmodel = fxq.quantize(model, x, on_low_sqnr="error", progress=False)
    assert qmodel.report.sqnr > 30
    assert qmodel.report.sqnr == fxq.compare(model, qmodel, x).output


def test_products_are_fitted_by_the_same_random_numbers():
    prepared = fxq.calibrate(fxq.prepare(Drops().eval(), x := torch.randn(64, 32)), [x], progress=False)
    simulation = Simulation(prepared, prepared.meta["fxq"])
    for _ in simulation.stops(set(), "simulating"):
        pass
    assert simulation.reached > 30


def test_effects_are_those_with_the_same_random_numbers():
    model, x = Drops().eval(), torch.randn(64, 32)
    recipe = fxq.Recipe(balance=False, judge_costs=False)
    qmodel = fxq.quantize(model, x, recipe=recipe, progress=False)
    found = fxq.compare(model, qmodel, x, calibration_data=[x], recipe=recipe, seconds=0, progress=False)
    assert {suspect.module for suspect in found.suspects} == {"first", "last"}
    assert all(suspect.without > found.output for suspect in found.suspects)


def test_a_guard_on_what_is_drawn_is_told_as_it_is(model_of):
    def forward(self, x):
        rows = self.a(x)[torch.nonzero(torch.rand(16) > 0.5)[:, 0]]
        return sum(self.b(row) for row in rows.unbind(0))

    model = model_of(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    torch.manual_seed(100)
    with pytest.raises(fxq.GuardError, match=r"^test_randomness.py:\d+ decided that `len\(unbind\)` is \d+ on the"):
        fxq.quantize(model, torch.randn(16, 8))
