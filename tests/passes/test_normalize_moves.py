"""normalize_moves: one spelling for what moves numbers, with the same bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

X = torch.randn(6, 8)

MOVES = {
    "view": (lambda s, x: x.view(3, -1), "reshape(x, (3, -1))"),
    "view of a size": (lambda s, x: x.view((3, -1)), "reshape(x, (3, -1))"),
    "reshape": (lambda s, x: torch.reshape(input=x, shape=(3, -1)), "reshape(x, (3, -1))"),
    "flatten": (lambda s, x: x.flatten(1), "flatten(x, 1, -1)"),
    "nn.Flatten": (lambda s, x: s.flatten(x), "flatten(x, 1, -1)"),
    "unflatten": (lambda s, x: x.unflatten(1, (2, 4)), "unflatten(x, 1, (2, 4))"),
    "squeeze": (lambda s, x: x.squeeze(1), "squeeze(x, 1)"),
    "unsqueeze": (lambda s, x: x.unsqueeze(dim=1), "unsqueeze(x, 1)"),
    "t": (lambda s, x: x.t(), "transpose(x, 0, 1)"),
    "T": (lambda s, x: x.T, "permute(x, (1, 0))"),
    "swapaxes": (lambda s, x: x.swapaxes(0, 1), "transpose(x, 0, 1)"),
    "permute": (lambda s, x: x.permute(1, 0), "permute(x, (1, 0))"),
    "permute of a tuple": (lambda s, x: torch.permute(x, dims=(1, 0)), "permute(x, (1, 0))"),
    "movedim": (lambda s, x: torch.movedim(x, source=0, destination=1), "movedim(x, 0, 1)"),
    "flip": (lambda s, x: x.flip(0, 1), "flip(x, (0, 1))"),
    "flip with a keyword": (lambda s, x: torch.flip(x, dims=(1,)), "flip(x, (1,))"),
    "tile": (lambda s, x: torch.tile(x, dims=(2, 1)), "tile(x, (2, 1))"),
    "cat": (lambda s, x: torch.cat(dim=1, tensors=[x, x]), "cat([x, x], 1)"),
    "concat": (lambda s, x: torch.concat([x, x]), "cat([x, x], 0)"),
    "stack": (lambda s, x: torch.stack((x, x), dim=1), "stack((x, x), 1)"),
    "select": (lambda s, x: x.select(0, 1), "select(x, 0, 1)"),
    "narrow": (lambda s, x: x.narrow(dim=1, start=2, length=3), "narrow(x, 1, 2, 3)"),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name, model_of, normalized):
    forward, expected = MOVES[name]
    model = model_of(forward, flatten=nn.Flatten())
    assert normalized(model, X) == f"%0 = {expected}\nreturn %0"


def test_pixel_shuffle(model_of, normalized):
    model = model_of(lambda s, x: F.pixel_unshuffle(s.p(x), downscale_factor=2), p=nn.PixelShuffle(2))
    expected = "%0 = pixel_shuffle(x, 2)\n%1 = pixel_unshuffle(%0, 2)\nreturn %1"
    assert normalized(model, torch.randn(1, 4, 2, 2)) == expected


@pytest.mark.parametrize(
    "spelling", [lambda x: x.split(4, 1), lambda x: torch.split(x, split_size_or_sections=4, dim=1)]
)
def test_splits(spelling, model_of, normalized):
    first = normalized(model_of(lambda s, x: spelling(x)[0]), X).splitlines()[0]
    assert first == "%0 = split(x, 4, 1)"


def test_a_view_as_another_dtype_keeps_its_spelling(model_of, normalized):
    assert "reshape" not in normalized(model_of(lambda s, x: x.view(torch.int32)), X)


def test_all_of_the_zoo(zoo, normalized):
    normalized(zoo.model, *zoo.inputs)
