"""Fake quantization: modules that train a model on the numbers that it will have as integers.

    x^ = s * (clamp(rne(f32(x * f32(1 / s))) + z, 0, 255) - z)       activations: `quantize`, `dequantize`
    w^ = s[n] * clamp(rne(w / s[n]), -127, 127)                      weights: `quantize_weight`, `dequantize_weight`

by the very ops that the integer model is made of, so the bits are the same. Rounding has no useful gradient: it passes
straight through (Bengio et al. 2013), 1 where x lies inside the clamp, 0 where it is clipped. A learned step size
(LSQ, Esser et al. 2020) has the gradient

    dx^/ds = rne(x / s) - x / s inside, the bound (-z or 255 - z) where clipped;   times 1 / sqrt(numel * qmax)

Each stands where an `Observer` or `WeightObserver` stands in a graph that is calibrated, and is one;
`TrainedAttention` stands where an attention does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq import numerics
from fxq.errors import InputError
from fxq.observers import MovingAverage, WeightObserver
from fxq.qdq import dequantize, dequantize_weight, quantize, quantize_weight
from fxq.qtypes import ACT_QMAX, ACT_QMIN, SCALE_FLOOR, WEIGHT_QMAX, Granularity, QParams

NEVER = torch.iinfo(torch.int64).max


class _Activation(torch.autograd.Function):
    """x -> x^; gradients with respect to x and, where it is a tensor that wants one, to the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: int) -> Tensor:
        s = scale.item()
        _remember(ctx, x * (1 / scale), ACT_QMIN - zero_point, ACT_QMAX - zero_point)
        fake: Tensor = dequantize(quantize(x, s, zero_point), s, zero_point)
        return fake

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        inside, slope = ctx.saved_tensors
        by_scale = None
        if slope is not None:
            by_scale = (gradients[0] * slope).sum() / math.sqrt(max(slope.numel(), 1) * ACT_QMAX)
        return gradients[0] * inside, by_scale, None


class _Weight(torch.autograd.Function):
    """w -> w^, with scales [N] along axis 0 or [1]; gradients likewise."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scales: Tensor) -> Tensor:
        _remember(ctx, w / scales.reshape(-1, *[1] * (w.dim() - 1)), -WEIGHT_QMAX, WEIGHT_QMAX)
        ctx.count = len(scales)
        fake: Tensor = dequantize_weight(quantize_weight(w.contiguous(), scales), scales)
        return fake

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        inside, slope = ctx.saved_tensors
        by_scales = None
        if slope is not None:
            parts = (gradients[0] * slope).reshape(ctx.count, -1)
            by_scales = parts.sum(1) / math.sqrt(max(parts.shape[1], 1) * WEIGHT_QMAX)
        return gradients[0] * inside, by_scales


def _remember(ctx: Any, steps: Tensor, low: int, high: int) -> None:
    """Keep what the gradients need, and not the operand, which the model may go on to modify in place."""
    rounded = torch.round(steps)
    inside = (rounded >= low) & (rounded <= high)
    slope = torch.where(inside, rounded - steps, rounded.clamp(low, high)) if ctx.needs_input_grad[1] else None
    ctx.save_for_backward(inside, slope)


class FakeQuantize(MovingAverage):
    """Fakes the quantization of one activation, in a range that follows the data while training.

    The range is a moving average of each batch's extremes, whatever the recipe's observer: the others remember what the
    weights were. It moves in training mode, for as long as `steps` is below `until`, and while `fxq.calibrate` runs.
    Before any data has passed, so does x. calls: how often one forward of the graph calls this module.
    """

    steps: Tensor
    until: Tensor
    learning = False

    def __init__(self, where: str, calls: int = 1) -> None:
        super().__init__(where)
        self.calls = calls
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("until", torch.tensor(NEVER))

    def forward(self, x: Tensor) -> Tensor:
        """x^ of x (float32, any shape); raises `CalibrationError` on NaN or infinity while it learns or trains.

        What autocast has made narrower is widened first; raises `InputError` for another dtype.
        """
        if x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled("cpu"):
            x = x.float()
        _expect_float32(self.where, x)
        if (self.learning or self.training) and x.numel():
            extremes = self.extremes(x)
            if self.learning or self.steps < self.until:
                self._observe(x.detach(), *extremes)
        if self.training:
            self.steps += 1
        return self._fake(x) if self.seen else x

    def freeze(self, after: int) -> None:
        """Let the range stand after `after` more forwards in training mode."""
        self.until.fill_(min(int(self.until), int(self.steps) + after * self.calls))

    def _fake(self, x: Tensor) -> Tensor:
        qparams = self.qparams()
        return _apply(_Activation, x, torch.tensor(qparams.scale, dtype=torch.float32), qparams.zero_point)


class LearnedFakeQuantize(FakeQuantize):
    """The same with a step size that is a parameter; data sets it while `fxq.calibrate` runs, gradients from then on.

    The parameter is the step's logarithm (Jain et al. 2020): it stays positive under any optimizer, whose steps change
    it by a ratio, large or small as it may be.
    """

    zero_point: Tensor

    def __init__(self, where: str, calls: int = 1) -> None:
        super().__init__(where, calls)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int64))
        self.until.zero_()

    def qparams(self) -> QParams:
        """The learned scale, and the zero point that the data gave."""
        super().qparams()  # raises where no data has passed
        return QParams(_exp(self.log_scale).item(), int(self.zero_point))

    def _observe(self, x: Tensor, low: float, high: float) -> None:
        super()._observe(x, low, high)
        found = super().qparams()
        with torch.no_grad():
            self.log_scale.fill_(math.log(found.scale))
        self.zero_point.fill_(found.zero_point)

    def _fake(self, x: Tensor) -> Tensor:
        return _apply(_Activation, x, _exp(self.log_scale), int(self.zero_point))


class WeightFakeQuantize(WeightObserver):
    """Fakes the quantization of a weight, with the scales that its largest magnitudes have now."""

    scales: Tensor

    def __init__(self, where: str, granularity: Granularity, w: Tensor) -> None:
        super().__init__(where, granularity)
        self.register_buffer("scales", WeightObserver.scales_of(self, w))

    def forward(self, w: Tensor) -> Tensor:
        """w^ of w (float32 [N, ...]); raises `InputError` where the model has been converted to another dtype."""
        _expect_float32(self.where, w)
        return self._fake(w)

    def _fake(self, w: Tensor) -> Tensor:
        self.scales.copy_(self.scales_of(w))
        return _apply(_Weight, w, self.scales.clone())


class LearnedWeightFakeQuantize(WeightFakeQuantize):
    """The same with step sizes whose logarithms are parameters."""

    def __init__(self, where: str, granularity: Granularity, w: Tensor) -> None:
        super().__init__(where, granularity, w)
        self.log_scales = nn.Parameter(self.scales.log())

    def scales_of(self, w: Tensor) -> Tensor:
        """The scales that were learned."""
        return _exp(self.log_scales).detach()

    def _fake(self, w: Tensor) -> Tensor:
        scales = _exp(self.log_scales)
        self.scales.copy_(scales.detach())
        return _apply(_Weight, w, scales)


class TrainedAttention(nn.Module):
    """Attention as `fxq.spelling.attention` computes it, with the dropout that the model has on its weights.

    rounds: whether they are those of `qattention`, `numerics.softmax_weights` / 255, before they are divided by their
    sum; the gradient passes straight through to those of exp(x - max x).
    """

    def __init__(self, rounds: bool, dropout: float) -> None:
        super().__init__()
        self.rounds = rounds
        self.dropout = dropout

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        nan_if_masked: bool,
    ) -> Tensor:
        """q [B, H, T, D], k and v [B, G, S, D], H a multiple of G; or all without heads."""
        if q.dim() == 4 and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        top = scores.amax(-1, keepdim=True).detach()
        p = torch.exp(scores - top.masked_fill(top == -torch.inf, 0))
        if self.rounds:
            rounded = torch.from_numpy(numerics.softmax_weights(scores.detach().float().numpy()))
            p = p + (rounded.to(p.dtype) / ACT_QMAX - p.detach())
        total = p.sum(-1, keepdim=True)
        if not nan_if_masked:
            total = total.masked_fill(total == 0, 1)
        return F.dropout(p / total, self.dropout, self.training) @ v

    def extra_repr(self) -> str:
        return f"rounds={self.rounds}, dropout={self.dropout}"


def _expect_float32(where: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise InputError(
            f"{where} is {tensor.dtype}: a model of fxq.prepare_qat and its inputs are float32; make them so with "
            '.float(), and train in bfloat16 under torch.autocast("cpu", torch.bfloat16)'
        )


def _exp(log_scale: Tensor) -> Tensor:
    return log_scale.exp().clamp(min=SCALE_FLOOR)


def _apply(function: type[torch.autograd.Function], *operands: Any) -> Tensor:
    result: Tensor = function.apply(*operands)  # type: ignore[no-untyped-call]
    return result
