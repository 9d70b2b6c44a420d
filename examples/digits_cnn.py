"""A convolutional digits classifier in int8: uint8 from the first convolution to the last layer.

    python examples/digits_cnn.py

Trains a small residual network on scikit-learn's 8 x 8 digits (some ten seconds), quantizes it with training images as
calibration data, and compares both on the test images. Dumps and a plot of the noise go to build/digits_cnn.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxq

FOLDER = Path("build/digits_cnn")


class Block(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [B, channels, H, W]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


def network() -> nn.Sequential:
    """float32 [B, 1, H, W], pixels in 0..1, to logits, float32 [B, 10]."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    body = [Block(32), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), Block(64)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def data() -> tuple[TensorDataset, Tensor, Tensor]:
    """Training images with labels; test images, test labels."""
    x, y = load_digits(return_X_y=True)
    images = x.reshape(-1, 1, 8, 8) / 16
    pieces = train_test_split(images, y, test_size=0.3, random_state=0, stratify=y)
    x_train, x_test = (torch.tensor(piece, dtype=torch.float32) for piece in pieces[:2])
    y_train, y_test = (torch.tensor(piece) for piece in pieces[2:])
    return TensorDataset(x_train, y_train), x_test, y_test


def train(dataset: TensorDataset, epochs: int = 6) -> nn.Sequential:
    """A trained network in eval mode."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in DataLoader(dataset, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def main() -> None:
    """Train, quantize, compare."""
    torch.set_num_threads(1)
    dataset, x_test, y_test = data()
    start = time.perf_counter()
    model = train(dataset)
    trained = time.perf_counter() - start

    loader = DataLoader(dataset, batch_size=64)
    recipe = fxq.Recipe(judge_costs=False)  # every layer in integers, on any machine
    qmodel = fxq.quantize(model, dataset[:8][0], calibration_data=loader, recipe=recipe, strict=True, dump=FOLDER)
    with torch.inference_mode():
        logits, q_logits = model(x_test), qmodel(x_test)
    answers, q_answers = logits.argmax(1), q_logits.argmax(1)
    accuracy, q_accuracy = (100 * (a == y_test).float().mean().item() for a in (answers, q_answers))
    size, q_size = fxq.report(qmodel).weight_bytes
    comparison = fxq.compare(model, qmodel, x_test)
    same = (fxq.golden(qmodel)(x_test[:100].numpy()) == q_logits[:100].numpy()).all(1).sum()

    print(f"A residual network on handwritten digits, trained on {len(dataset)} images in {trained:.1f} s")
    print(f"{'':24}{'float32':>12}{'int8':>12}")
    print(f"{'accuracy':24}{accuracy:10.2f} %{q_accuracy:10.2f} %   ", end="")
    print(f"the same answer on {int((answers == q_answers).sum())} of {len(x_test)}")
    print(f"{'parameters':24}{size:10,} B{q_size:10,} B   {size / q_size:.1f}x smaller")
    print(f"{'SQNR of the logits':36}{comparison.output:9.1f} dB")
    print(f"{'same bits in NumPy':36}{f'{same} of 100':>12}\n")
    print(fxq.report(qmodel))
    print("\nWhere accuracy is lost, print(fxq.compare(model, qmodel, x_test)):\n")
    print(comparison)
    print(f"\nEvery step on the way lies in {FOLDER}")


if __name__ == "__main__":
    main()
