"""Rounding learned by reconstruction (AdaRound): each weight goes up or down, so that the product errs least.

    minimize over V   tr(D H D^T) / mean(diag H) + WEIGHT sum_k (1 - |2 h_k - 1|^beta)
    D = floor(w / s) + h - w / s                        in steps of the scale
    h = clamp(1.2 sigmoid(V) - 0.1, 0, 1)               0: down, 1: up
    H = x^T x / rows                                    x: what the product reads

(Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020.) V begins where h rounds nothing; the
second term, whose beta falls, drives each h to 0 or 1. The gradient is written out: all rows of x act through H, so a
step of Adam costs one product with it, and nothing is drawn at random.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.qtypes import WEIGHT_QMAX

STEPS = 250
RATE = 0.1
WEIGHT = 0.5
"""Of the second term. With a tenth of it many h end between 0 and 1, and rounding those undoes what was found."""
WARM = STEPS // 10
"""Steps before the second term sets in."""
BETA = 10.0, 2.0
"""From, to."""
STRETCH = 1.2
"""A sigmoid alone has no gradient left where it comes to 0 and 1."""
DECAY = 0.9, 0.999
"""Of Adam's means."""


def reconstructed(w: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """The integers of `w` on the grid of its scales, int8.

    w: [G, n, K]; scales: [G, n]; hessian: H, [G, K, K]; all float32 or all float64.
    """
    steps = w / scales[:, :, None]
    floor = steps.floor()
    rest = steps - floor
    unit = hessian / hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    margin = (STRETCH - 1) / 2
    v = torch.logit(((rest + margin) / STRETCH).clamp_(1e-4, 1 - 1e-4))
    mean, square = torch.zeros_like(v), torch.zeros_like(v)
    for step in range(1, STEPS + 1):
        sigmoid = torch.sigmoid(v)
        h = (STRETCH * sigmoid - margin).clamp_(0, 1)
        gradient = 2 * ((h - rest) @ unit)
        if step > WARM:
            beta = BETA[0] + (BETA[1] - BETA[0]) * (step - WARM) / (STEPS - WARM)
            centred = 2 * h - 1
            gradient -= 2 * WEIGHT * beta * centred.sign() * centred.abs().pow_(beta - 1)
        gradient *= STRETCH * sigmoid * (1 - sigmoid)
        mean.lerp_(gradient, 1 - DECAY[0])
        square.lerp_(gradient.square(), 1 - DECAY[1])
        size, spread = mean / (1 - DECAY[0] ** step), square / (1 - DECAY[1] ** step)
        v -= RATE * size / (spread.sqrt_() + 1e-8)
    up = (STRETCH * torch.sigmoid(v) - margin >= 0.5).to(w.dtype)
    return (floor + up).clamp_(-WEIGHT_QMAX, WEIGHT_QMAX).to(torch.int8)
