"""What a model decides by the number of rows binds nobody where it would compute the same in any case."""

import pytest
import torch
from torch import nn

import fxq
from fxq.tracing import guards

X = torch.randn(6, 8)


def positions(s, x):
    """Libraries of transformers: one row of positions, expanded where there are more rows of data."""
    rows = torch.arange(8).unsqueeze(0)
    if x.shape[0] != rows.shape[0]:
        rows = rows.expand(x.shape[0], -1)
    return s.l(x + rows)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_a_decision_that_only_expands_is_no_guard(rows, model_of):
    model = model_of(positions, l=nn.Linear(8, 8))
    gm = fxq.trace(model, X[:rows])
    assert not [text for text in guards(gm) if "decided" in text]
    for n in (1, 2, 3, 6):
        assert torch.equal(gm(X[:n]), model(X[:n]))
    qmodel = fxq.quantize(model, X[:rows])
    assert qmodel(X).shape == (6, 8)


GUARDED = {
    "another value": lambda s, x: s.l(x) if x.shape[0] > 1 else s.l(x) * 2,
    "a difference that the examples do not show": lambda s, x: s.l(x).clamp(-1e9, 1e9) if x.shape[0] > 1 else s.l(x),
    "another bound": lambda s, x: s.l(x).clamp_max(1e9 if x.shape[0] > 1 else 1e8),
    "another module": lambda s, x: s.l(x) if x.shape[0] > 1 else s.k(x),
    "two rows alone": lambda s, x: s.l(x).clamp(-1e9, 1e9) if x.shape[0] == 2 else s.l(x),
    "as often as rows": lambda s, x: torch.stack([s.l(x[i]) for i in range(x.shape[0])]),
}


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_a_decision_that_changes_numbers_is_a_guard(name, rows, model_of):
    model = model_of(GUARDED[name], l=nn.Linear(8, 8), k=nn.Linear(8, 8))
    with torch.no_grad():
        for own, other in zip(model.l.parameters(), model.k.parameters(), strict=True):
            own.copy_(other)
    gm = fxq.trace(model, X[:rows])
    assert any("shape[0]" in text for text in guards(gm))
    with pytest.raises(fxq.GuardError, match=r"shape\[0\]"):
        [gm(X[:n]) for n in (1, 2, 3)]


def nested(s, x):
    if x.shape[0] != 2:
        return s.l(x) * 2 if x.shape[0] > 4 else s.l(x)
    return s.l(x)


def together(s, x):
    first = bool(x.shape[0] % 3 == 1)
    return s.l(x) * 2 if x.shape[0] > 2 and first else s.l(x)


@pytest.mark.parametrize("forward", [nested, together])
def test_decisions_that_nobody_has_seen_the_other_way_of_bind(forward, model_of):
    """Beside 2 rows, 1 and 3 compute the same, one decision at a time; 7 would not."""
    gm = fxq.trace(model_of(forward, l=nn.Linear(8, 8)), X[:2])
    with pytest.raises(fxq.GuardError, match=r"shape\[0\]"):
        gm(torch.randn(7, 8))
