"""remove_identities: what hands back its operand goes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

X = torch.randn(6, 8)


def test_nothings_go(model_of, normalized):
    def forward(self, x):
        x = F.dropout(self.d(self.i(x)), 0.1, self.training)
        return x.contiguous().detach().float().to(torch.float32).type_as(x)

    assert normalized(model_of(forward, d=nn.Dropout(), i=nn.Identity()), X) == "return x"


def test_what_nobody_reads_goes(model_of, normalized):
    """But for what works in place, and decisions."""

    def forward(self, x):
        y = torch.sin(x)
        (y * 2).mean(0)
        return y

    assert normalized(model_of(forward), X) == "%0 = sin(x)\nreturn %0"

    def changing(self, x):
        y = torch.sin(x)
        y[:, 0].zero_()
        return y

    assert "'zero_'" in normalized(model_of(changing), X)


def test_conversions_stay(model_of, normalized):
    found = normalized(model_of(lambda s, x: x.double().to(torch.float32)), X)
    assert found == "%0 = .double(x)\n%1 = .to(%0, torch.float32)\nreturn %1"


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: x.t().contiguous().as_strided((4, 4), (5, 1)),
        lambda s, x: x.t().contiguous().view_as(x),
        lambda s, x: x.t().contiguous().unsqueeze(0).view(torch.int32),
    ],
)
def test_contiguous_stays_where_strides_matter(forward, model_of, normalized):
    assert ".contiguous(" in normalized(model_of(forward), X)
