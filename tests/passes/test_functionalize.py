"""functionalize: out of place where nobody can see the difference, marked where somebody can."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.pipeline import run
from passes import PREPARE, functionalize

X = torch.randn(6, 8)


def in_place(self, x):
    y = self.l(x)
    y.relu_()
    y += x
    return y


def test_in_place_becomes_out_of_place_where_nobody_sees(model_of, normalized):
    expected = "%0 = linear(x, l.weight, l.bias)\n%1 = relu(%0)\n%2 = add(%1, x)\nreturn %2"
    assert normalized(model_of(in_place, l=nn.Linear(8, 8)), X) == expected


def test_both_readers_see_what_was_done_in_place(model_of, normalized):
    def forward(self, x):
        y = self.l(x)
        r = F.relu_(y)
        return y + r

    expected = "%0 = linear(x, l.weight, l.bias)\n%1 = relu(%0)\n%2 = add(%1, %1)\nreturn %2"
    assert normalized(model_of(forward, l=nn.Linear(8, 8)), X) == expected


def through_a_view(self, x):
    y = self.l(x)
    y[:, :4].relu_()
    return y


def view_read_later(self, x):
    y = self.l(x)
    v = y.view(-1, 4)
    y.relu_()
    return v


def write_an_item(self, x):
    y = self.l(x)
    y[:, 0] = 0
    return y


def write_the_input(self, x):
    x.relu_()
    return self.l(x)


def write_a_buffer(self, x):
    self.seen.add_(1)
    return self.l(x) + self.seen


@pytest.mark.parametrize("forward", [through_a_view, view_read_later, write_an_item, write_the_input, write_a_buffer])
def test_memory_that_others_see_is_left_alone_and_marked(forward, model_of, staged):
    gm, ctx = staged(model_of(forward, l=nn.Linear(8, 8), seen=torch.zeros(1)), (X,), "functionalize")
    run((functionalize.PASS,), gm, ctx)  # checks that outputs are the same bits
    assert any("aliases" in node.meta for node in gm.graph.nodes)
    run(PREPARE[1:-1], gm, ctx)
    assert [node.target for node in gm.graph.nodes].count(F.linear) == 1


def test_what_an_identity_hands_back_is_written_out_of_place_too(model_of, normalized):
    def forward(self, x):
        y = self.l(x)
        z = self.nothing(y)
        z += x
        return z.mul_(2)

    expected = "%0 = linear(x, l.weight, l.bias)\n%1 = add(%0, x)\n%2 = mul(%1, 2)\nreturn %2"
    assert normalized(model_of(forward, l=nn.Linear(8, 8), nothing=nn.Identity()), X) == expected
