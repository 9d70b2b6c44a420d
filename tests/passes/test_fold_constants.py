"""fold_constants: parts of a constant are constants."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

X = torch.randn(6, 8)

WIDE, B = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24))

PARTS = {
    "slice": (lambda s, x: F.linear(x, s.wide[8:16], s.b[8:16]), "linear(x, wide_part, b_part)"),
    "index": (lambda s, x: x @ s.cube[1].t(), "linear(x, cube_part, None)"),
    "narrow": (lambda s, x: F.linear(x, s.wide.narrow(0, 8, 8)), "linear(x, wide_part, None)"),
    "chunk": (lambda s, x: F.linear(x, s.wide.chunk(3)[1]), "linear(x, wide_part, None)"),
    "split by size": (lambda s, x: F.linear(x, torch.split(s.wide, [8, 16])[0]), "linear(x, wide_part, None)"),
    "of a part": (lambda s, x: F.linear(x, s.wide[8:][:8]), "linear(x, wide_part_part, None)"),
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

    assert "_part" not in normalized(model_of(forward, state=torch.zeros(8, 8)), X)
