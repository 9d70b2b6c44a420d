"""remove_identities: what hands back its operand goes."""

import torch
import torch.nn.functional as F
from torch import nn

X = torch.randn(6, 8)


def test_nothings_go(model_of, normalized):
    def forward(self, x):
        x = F.dropout(self.d(self.i(x)), 0.1, self.training)
        return x.contiguous().detach().float().to(torch.float32).type_as(x)

    assert normalized(model_of(forward, d=nn.Dropout(), i=nn.Identity()), X) == "return x"


def test_conversions_stay(model_of, normalized):
    found = normalized(model_of(lambda s, x: x.double().to(torch.float32)), X)
    assert found == "%0 = .double(x)\n%1 = .to(%0, torch.float32)\nreturn %1"
