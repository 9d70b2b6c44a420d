"""normalize_convolutions: one spelling for pools and batch norms, with the same bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

X = torch.randn(6, 8)

IMAGE = torch.randn(2, 3, 4, 8)

POOLS = {
    "max_pool1d": (lambda s, x: F.max_pool1d(x, 2), "max_pool1d(x, 2, 2, 0, 1, False)"),
    "nn.MaxPool1d": (lambda s, x: s.pool1(x), "max_pool1d(x, 3, 2, 1, 1, False)"),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools(name, model_of, normalized):
    forward, expected = POOLS[name]
    assert normalized(model_of(forward, pool1=nn.MaxPool1d(3, 2, 1)), X) == f"%0 = {expected}\nreturn %0"


def test_pools_of_pictures(model_of, normalized):
    model = model_of(lambda s, x: s.p(F.max_pool2d(x, (1, 2))), p=nn.MaxPool2d(2, stride=1, padding=1, ceil_mode=True))
    assert normalized(model, IMAGE) == (
        "%0 = max_pool2d(x, (1, 2), (1, 2), (0, 0), (1, 1), False)\n"
        "%1 = max_pool2d(%0, (2, 2), (1, 1), (1, 1), (1, 1), True)\n"
        "return %1"
    )


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: F.max_pool1d(x, 2, return_indices=True)[0],
        lambda s, x: F.batch_norm(x, None, None, training=True),
    ],
)
def test_what_has_no_spelling_keeps_its_own(forward, model_of, normalized):
    found = normalized(model_of(forward), X)
    assert "max_pool1d(x, 2, 2, 0, 1, False)" not in found
    assert "False, 0.1, 1e-05" not in found
