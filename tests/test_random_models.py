"""Networks that nobody thought of: one integer program, whatever runs it.

Each is a random sequence of blocks, nested where a block holds two others. What `quantize` makes of it must equal its
golden model bit for bit on every instruction set and number of threads, as it is, saved and loaded, for a batch and for
sizes that it has not seen, empty ones too.
"""

import random

import numpy as np
import pytest
import torch
from torch import nn

import fxq
from fxq import kernels
from fxq.comparison import sqnr

ACTIVATIONS = nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Identity


class Join(nn.Module):
    """Two paths from the same input, joined: added, multiplied or concatenated."""

    def __init__(self, how, one, two):
        super().__init__()
        self.how, self.one, self.two = how, one, two

    def forward(self, x):
        one, two = self.one(x), self.two(x)
        if self.how == "add":
            return one + two
        return one * two if self.how == "mul" else torch.cat([one, two], 1 if x.dim() == 4 else -1)


class Attend(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.attention = nn.MultiheadAttention(n, 4, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


def convolution(rng, m, n):
    """Of any kind that keeps the size of its image."""
    kernel, dilation = rng.choice([(1, 1), (3, 1), (3, 2), (5, 1)])
    groups = rng.choice([1, 1, 2]) if m % 2 == n % 2 == 0 else 1
    border = rng.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    settings = {"padding": kernel // 2 * dilation, "dilation": dilation, "groups": groups, "padding_mode": border}
    layers = [nn.Conv2d(m, n, kernel, bias=rng.random() < 0.7, **settings)]
    if rng.random() < 0.4:
        layers.append(nn.BatchNorm2d(n))
        layers[-1].running_mean.normal_(0, 0.3)
        layers[-1].running_var.uniform_(0.5, 2)
    return nn.Sequential(*layers, rng.choice(ACTIVATIONS)())


def image_block(rng, m, depth=0):
    """A block, and the number of channels that it gives; all blocks inside of a block keep the size of the image."""
    kinds = ["conv", "conv", "depthwise", "gate"]
    kinds += ["add", "mul", "cat"] if depth < 2 else []
    kinds += ["pool", "stride", "up", "transposed"] if depth == 0 else []
    match rng.choice(kinds):
        case "conv":
            n = rng.choice([3, 4, 8, 10, 16])
            return convolution(rng, m, n), n
        case "depthwise":
            return nn.Conv2d(m, 2 * m, 3, padding=1, groups=m), 2 * m
        case "gate":
            squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(m, 4, 1), nn.ReLU(), nn.Conv2d(4, m, 1))
            return Join("mul", nn.Identity(), squeeze.append(rng.choice([nn.Sigmoid, nn.Hardsigmoid])())), m
        case "cat":
            (one, n), (two, k) = image_block(rng, m, depth + 1), image_block(rng, m, depth + 1)
            return Join("cat", one, two), n + k
        case "add" | "mul" as how:
            one, n = image_block(rng, m, depth + 1)
            return Join(how, one, nn.Identity() if n == m else nn.Conv2d(m, n, 1)), n
        case "pool":
            pools = nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 1)
            return rng.choice(pools), m
        case "stride":
            return nn.Conv2d(m, 8, 3, 2, 1), 8
        case "up":
            return nn.Upsample(scale_factor=2, mode=rng.choice(["nearest", "bilinear"])), m
        case _:
            return nn.ConvTranspose2d(m, 4, rng.choice([2, 4]), 2, 1), 4


def image_model(rng):
    m = channels = rng.choice([1, 3, 8])
    layers = []
    for _ in range(rng.randint(3, 7)):
        layer, m = image_block(rng, m)
        layers.append(layer)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(m, 5)
    inputs = [torch.randn(n, channels, side, side) for n, side in ((4, 12), (2, 12), (1, 17), (0, 12))]
    return nn.Sequential(nn.Conv2d(channels, channels, 1), *layers, *head), inputs


def token_block(rng, m, depth=0):
    """A block, and the number of features that it gives."""
    kinds = ["linear", "linear", "activation", "norm", "attention"]
    kinds += ["add", "mul", "cat"] if depth < 2 else []
    match rng.choice(kinds):
        case "linear":
            n = rng.choice([8, 16, 33, 48])
            return nn.Sequential(nn.Linear(m, n, bias=rng.random() < 0.8), rng.choice(ACTIVATIONS)()), n
        case "activation":
            return rng.choice(ACTIVATIONS)(), m
        case "norm":
            return rng.choice([nn.LayerNorm, nn.RMSNorm])(m), m
        case "attention":
            return (Attend(m), m) if m % 4 == 0 else (nn.Linear(m, 16), 16)
        case "cat":
            (one, n), (two, k) = token_block(rng, m, depth + 1), token_block(rng, m, depth + 1)
            return Join("cat", one, two), n + k
        case how:
            one, n = token_block(rng, m, depth + 1)
            return Join(how, one, nn.Identity() if n == m else nn.Linear(m, n)), n


def token_model(rng):
    m = features = rng.choice([16, 24])
    layers = []
    for _ in range(rng.randint(3, 8)):
        layer, m = token_block(rng, m)
        layers.append(layer)
    inputs = [torch.randn(n, length, features) for n, length in ((4, 7), (2, 7), (1, 12), (0, 7))]
    return nn.Sequential(*layers, nn.Linear(m, 5)), inputs


@pytest.mark.parametrize("make", [image_model, token_model])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_runs_it_a_random_network_gives_the_golden_bits(make, seed, tmp_path):
    torch.manual_seed(seed)
    model, (examples, *others) = make(random.Random(seed))
    data = [torch.randn_like(examples) for _ in range(3)]
    qmodel = fxq.quantize(model.eval(), examples, calibration_data=data)
    golden = fxq.golden(qmodel, islands="torch")  # norms that stay float
    fxq.save(qmodel, tmp_path / "model.fxq")
    loaded = fxq.load(tmp_path / "model.fxq")
    with torch.no_grad():
        assert sqnr(model(examples), qmodel(examples)) > 15
    for x in (examples, *others):
        expected = golden(x.numpy())
        for run in (qmodel, loaded):
            np.testing.assert_array_equal(run(x).numpy(), expected)
        for isa in kernels.info().available:
            with kernels.use_isa(isa):
                np.testing.assert_array_equal(qmodel(x).numpy(), expected)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            np.testing.assert_array_equal(qmodel(x).numpy(), expected)
        finally:
            torch.set_num_threads(threads)
