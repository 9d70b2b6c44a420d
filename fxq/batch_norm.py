"""Batch norms that train: folded into the product before them, as they will be, or on their own.

    g[n] = gamma[n] / sqrt(var[n] + eps);   w'[n, ...] = w[n, ...] * g[n];   b'[n] = (b[n] - mean[n]) * g[n] + beta[n]

While its statistics are still learned, a folded norm quantizes the weight that the running statistics give, takes the
running factor out of the result and normalises by the batch (Jacob et al. 2018, and Krishnamoorthi 2018 for the
correction):

    y = batch_norm(product(x, quantized(w * g)) / g + b)

which trains like a batch norm and quantizes the weights of inference. In eval mode, and once its statistics are frozen,
it computes product(x, quantized(w'), b').
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxq.fake_quantize import NEVER

FOLDED = "folded"
"""In a product's `meta`: the `Folded` that it has swallowed, where the model is to be trained."""


@dataclass(frozen=True)
class Folded:
    """Where the parts of a product with a folded norm are: the norm's module, the weight and bias from before."""

    norm: str
    weight: str | None
    bias: str | None


def folded(
    w: Tensor, b: Tensor | None, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """w' and b' of the formula above, in float64; w: [N, ...], the others [N]; a missing b or beta is 0, gamma 1."""
    gain = (1.0 if gamma is None else gamma.double()) / torch.sqrt(var.double() + eps)
    shift = (0.0 if b is None else b.double()) - mean.double()
    bias = shift * gain + (0.0 if beta is None else beta.double())
    return (w.double() * column(gain, w.dim())).to(w.dtype), bias.to(w.dtype)


def column(values: Tensor, rank: int) -> Tensor:
    """One number per output channel, shaped to scale a weight [N, ...] of `rank` dimensions."""
    return values.reshape(-1, *[1] * (rank - 1))


class BatchNorm(_BatchNorm):
    """A norm that has taken over another's parameters and statistics; the statistics stand still from `until` on.

    calls: how often one forward of the graph calls it.
    """

    until: Tensor

    def __init__(self, norm: nn.Module, calls: int = 1) -> None:
        assert isinstance(norm, _BatchNorm)
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.calls = calls
        self.register_buffer("until", torch.tensor(NEVER))

    @property
    def learning(self) -> bool:
        """Whether a forward normalises by its batch, and the statistics learn from it."""
        assert self.num_batches_tracked is not None
        return self.training and bool(self.num_batches_tracked < self.until)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x (float32 [B, N, ...])."""
        if self.learning:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def freeze(self, after: int) -> None:
        """Let the statistics stand after `after` more forwards in training mode."""
        assert self.num_batches_tracked is not None
        self.until.fill_(min(int(self.until), int(self.num_batches_tracked) + after * self.calls))

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank will do: the graph has run."""


class FoldedBatchNorm(BatchNorm):
    """A product and the batch norm behind it.

    product: called as product(x, weight, bias, *rest), with the channels in dimension 1 of its result and 0 of the
    weight. fake_quantize: what stands on the folded weight; None keeps it float.
    """

    def __init__(self, norm: nn.Module, product: Callable[..., Tensor], fake_quantize: nn.Module | None) -> None:
        super().__init__(norm)
        self.product = product
        self.fake_quantize = fake_quantize

    def folded(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of the product with the running statistics folded in."""
        assert self.running_mean is not None and self.running_var is not None
        return folded(w, b, self.running_mean, self.running_var, self.weight, self.bias, self.eps)

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None, *rest: Any) -> Tensor:  # type: ignore[override]
        """See the module's docstring."""
        if not self.learning:
            weight, bias = self.folded(w, b)
            return self.product(x, self._quantized(weight), bias, *rest)
        assert self.running_var is not None
        gain = torch.rsqrt(self.running_var + self.eps) * (1.0 if self.weight is None else self.weight)
        gain = torch.where(gain == 0, 1.0, gain)  # a channel that gamma switches off learns gamma all the same
        y = self.product(x, self._quantized(w * column(gain, w.dim())), None, *rest)
        y = y / column(gain, y.dim() - 1)
        return super().forward(y if b is None else y + column(b, y.dim() - 1))

    def _quantized(self, w: Tensor) -> Tensor:
        fake: Tensor = w if self.fake_quantize is None else self.fake_quantize(w)
        return fake
