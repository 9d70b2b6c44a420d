"""A digits classifier in int8: accuracy, SQNR, size and speed beside float, and the pictures of how it came about.

    make demo

Trains 64-128-64-10 on scikit-learn's digits (a second or two), quantizes it with training images as calibration data,
and compares both on the test images. Dumps and pictures go to build/digits.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxq

FOLDER = Path("build/digits")


class Classifier(nn.Module):
    """Three linears, two relus."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.fc2 = nn.Linear(128, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [B, 64], pixels in 0..1; returns logits, float32 [B, 10]."""
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        logits: Tensor = self.head(x)
        return logits


def data() -> tuple[TensorDataset, Tensor, Tensor]:
    """Training images with labels; test images, test labels."""
    x, y = load_digits(return_X_y=True)
    pieces = train_test_split(x / 16, y, test_size=0.3, random_state=0, stratify=y)
    x_train, x_test = (torch.tensor(piece, dtype=torch.float32) for piece in pieces[:2])
    y_train, y_test = (torch.tensor(piece) for piece in pieces[2:])
    return TensorDataset(x_train, y_train), x_test, y_test


def train(dataset: TensorDataset, epochs: int = 30) -> Classifier:
    """A trained classifier in eval mode."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in DataLoader(dataset, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def latency(models: list[nn.Module], x: Tensor, seconds: float = 1.0) -> list[float]:
    """Median seconds of a call of each, called in turns so that a busy machine disturbs all alike."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for model in models:
            model(x)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model(x)
                taken.append(time.perf_counter() - start)
    return [median(taken) for taken in times]


def main() -> None:
    """Train, quantize, compare, say where things lie."""
    torch.set_num_threads(1)
    dataset, x_test, y_test = data()
    start = time.perf_counter()
    model = train(dataset)
    trained = time.perf_counter() - start

    start = time.perf_counter()
    loader = DataLoader(dataset, batch_size=64)
    qmodel = fxq.quantize(model, dataset[:8][0], calibration_data=loader, dump=FOLDER)
    quantized = time.perf_counter() - start

    with torch.inference_mode():
        logits, q_logits = model(x_test), qmodel(x_test)
    answers, q_answers = logits.argmax(1), q_logits.argmax(1)
    accuracy, q_accuracy = (100 * (a == y_test).float().mean().item() for a in (answers, q_answers))
    size, q_size = fxq.report(qmodel).weight_bytes

    print(f"Handwritten digits: 64-128-64-10, trained on {len(dataset)} images in {trained:.1f} s, ", end="")
    print(f"quantized in {quantized:.1f} s, tested on {len(x_test)} images\n")
    print(f"{'':24}{'float32':>12}{'int8':>12}")
    print(f"{'accuracy':24}{accuracy:10.2f} %{q_accuracy:10.2f} %   ", end="")
    print(f"the same answer on {int((answers == q_answers).sum())} of {len(x_test)}")
    print(f"{'parameters':24}{size:10,} B{q_size:10,} B   {size / q_size:.1f}x smaller")
    for batch in (1, 64):
        slow, fast = (1e6 * t for t in latency([model, qmodel], x_test[:batch]))
        print(f"{f'latency, batch {batch}':24}{slow:9.1f} us{fast:9.1f} us   {slow / fast:.1f}x faster, one thread")
    comparison = fxq.compare(model, qmodel, x_test)
    same = (fxq.golden(qmodel)(x_test.numpy()) == q_logits.numpy()).all(1).sum()
    print(f"{'SQNR of the logits':36}{comparison.output:9.1f} dB   signal to quantization noise, on the test images")
    print(f"{'same bits in NumPy':36}{f'{same} of {len(x_test)}':>12}   fxq.golden(qmodel), without torch")

    print("\nThe int8 model, print(qmodel.code):")
    print(qmodel.code)
    print("What became of every operation, print(fxq.report(qmodel)):\n")
    print(fxq.report(qmodel))
    print("\nWhere accuracy is lost, print(fxq.compare(model, qmodel, x_test)):\n")
    print(comparison)
    print(
        f"\nEvery step on the way, in {FOLDER}: the graph as text (.txt), what changed (.diff), a picture ({kind()}):\n"
    )
    texts = {str(path.with_suffix(kind())): path.read_text() for path in sorted(FOLDER.glob("*-*.txt"))}
    steps = {picture: text.partition("\n")[0].removeprefix("# ") for picture, text in texts.items()}
    for picture, title in steps.items():
        if ", 0 rewrites" not in title:
            print(f"  {picture.ljust(max(map(len, steps)))}  {title}")
    idle = sum(", 0 rewrites" in title for title in steps.values())
    print(f"\nand {idle} passes that found nothing to do in this model.")


def kind() -> str:
    """The suffix of the pictures: graphviz draws them, where it is installed."""
    return ".svg" if any(FOLDER.glob("*.svg")) else ".dot"


if __name__ == "__main__":
    main()
