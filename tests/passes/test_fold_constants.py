"""fold_constants: what constants alone decide is one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import fold_constants

X = torch.randn(6, 8)

WIDE, B = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24))

PARTS = {
    "slice": (lambda s, x: F.linear(x, s.wide[8:16], s.b[8:16]), "linear(x, wide_folded, b_folded)"),
    "index": (lambda s, x: x @ s.cube[1].t(), "linear(x, cube_folded, None)"),
    "narrow": (lambda s, x: F.linear(x, s.wide.narrow(0, 8, 8)), "linear(x, wide_folded, None)"),
    "chunk": (lambda s, x: F.linear(x, s.wide.chunk(3)[1]), "linear(x, wide_folded, None)"),
    "split by size": (lambda s, x: F.linear(x, torch.split(s.wide, [8, 16])[0]), "linear(x, wide_folded, None)"),
    "scaled": (lambda s, x: F.linear(x, s.wide * 0.5), "linear(x, wide_folded, None)"),
    "product of two": (lambda s, x: x @ (s.wide[:8] @ s.cube[0]), "linear(x, wide_folded_t, None)"),
    "scaled and transposed": (lambda s, x: x @ (s.wide * 2).t(), "linear(x, wide_folded, None)"),
    "normalised": (lambda s, x: F.linear(x, F.normalize(s.wide, dim=1)), "linear(x, wide_folded, None)"),
    "joined": (lambda s, x: F.linear(x, torch.cat([s.cube[0], s.cube[1]])), "linear(x, cube_folded, None)"),
    "of a part": (lambda s, x: F.linear(x, s.wide[8:][:8]), "linear(x, wide_folded, None)"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_weight_are_constants(name, model_of, normalized):
    forward, expected = PARTS[name]
    model = model_of(forward, wide=WIDE, b=B, cube=WIDE.detach().reshape(3, 8, 8).clone())
    assert f"= {expected}\n" in normalized(model, X)


def test_a_part_of_a_buffer_that_changes_is_no_constant(model_of, normalized):
    def forward(self, x):
        self.state.add_(1)
        return F.linear(x, self.state[:4])

    assert "_folded" not in normalized(model_of(forward, state=torch.zeros(8, 8)), X)


KEPT = {
    "dropout in training": (lambda s, x: x @ F.dropout(s.square, 0.5, True), "dropout("),
    "random": (lambda s, x: x + (s.square[0] + torch.rand_like(s.square[0])), "rand_like("),
    "larger than what it is made of": (lambda s, x: x[:, :1] + s.square[0, :1].expand(100), ".expand("),
    "of a size": (lambda s, x: x + s.square[: x.shape[0]], ".size("),
    "a transposition": (lambda s, x: x @ s.square.t(), "t("),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_computed_at_each_call(name, model_of, staged, text):
    forward, expected = KEPT[name]
    gm, ctx = staged(model_of(forward, square=torch.randn(8, 8)), (X,), "fold-constants")
    fold_constants.PASS.run(gm, ctx)
    assert expected in text(gm)
    assert fold_constants.PASS.run(gm, ctx) == 0


def test_for_training_only_views_are_folded(model_of, staged, text):
    gm, ctx = staged(model_of(lambda s, x: x @ s.w[:4].t() + x @ (2 * s.w[:4]).t(), w=WIDE), (X,), "fold-constants")
    assert fold_constants.TRAINABLE.run(gm, ctx) == 1
    assert "mul" in text(gm)
