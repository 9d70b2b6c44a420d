"""cat: the channels of several images side by side, in one pass over channels-last memory.

    qcat(tensors) = torch.cat(tensors, 1)

tensors: uint8 [B, C_i, *spatial] with one scale and zero point; the result: [B, sum of C_i, *spatial], channels-last in
memory. `order_channels` puts it where its operands lie so; every other concatenation is torch's own. NumPy truth:
`np.concatenate`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import kernels
from fxq.layout import channels_last, empty
from fxq.qdq import expect_dtype


def _qcat(tensors: list[Tensor]) -> Tensor:
    for tensor in tensors:
        expect_dtype("qcat", "a tensor", tensor, torch.uint8)
    return channels_last(torch.cat(tensors, 1))


def _fake(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    return empty(first, sum(tensor.shape[1] for tensor in tensors), list(first.shape[2:]), torch.uint8)


qcat = kernels.define("qcat(Tensor[] tensors) -> Tensor", _qcat, _fake)
