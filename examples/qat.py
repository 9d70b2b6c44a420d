"""Training with int8 in mind: float, quantized after training, and quantized while training, on small data sets.

A 4-16-3 network on the iris flowers, that of a forum question, and two classifiers of handwritten digits with batch
norm and dropout, one of linears, one of convolutions. Each is trained in float, quantized (PTQ), then trained on for a
few epochs with fake quantization (QAT) and converted. At 8 bits there is little left to win; the last lines show that
the graph that was trained and the integer model that runs give the same answers.

    python examples/qat.py
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_iris
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import fxq

Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""Inputs to train on and to test on, labels to train on and to test on."""


def iris() -> Data:
    """Four measurements of 150 flowers, in units of their deviation; three kinds."""
    x, y = load_iris(return_X_y=True)
    return _split(StandardScaler().fit_transform(x), y)


def digits() -> Data:
    """1797 images of 8 x 8 pixels in 0..1; ten digits."""
    x, y = load_digits(return_X_y=True)
    return _split(x / 16, y)


def _split(x: npt.NDArray[np.float64], y: npt.NDArray[np.int64]) -> Data:
    pieces = train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
    x_train, x_test = (torch.tensor(piece, dtype=torch.float32) for piece in pieces[:2])
    y_train, y_test = (torch.tensor(piece) for piece in pieces[2:])
    return x_train, x_test, y_train, y_test


def iris_net() -> nn.Module:
    """The network of the question."""
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def digits_net() -> nn.Module:
    """Two hidden layers; batch norms train, and are folded into the linears before them."""
    return nn.Sequential(
        *(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2)),
        nn.Linear(32, 10),
    )


def digits_cnn() -> nn.Module:
    """Two convolutions and a depthwise one, each with its batch norm."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.1), nn.Linear(256, 10)),
    )


def train(model: nn.Module, data: Data, epochs: int, rate: float) -> None:
    """Cross entropy, Adam, batches of 32: nothing here knows of quantization."""
    x, _, y, _ = data
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(32):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def accuracy(model: nn.Module, data: Data) -> float:
    """Percent of right answers on the test data."""
    with torch.no_grad():
        right = model(data[1]).argmax(1) == data[3]
    return float(100 * right.float().mean())


def compare(name: str, model: nn.Module, data: Data, epochs: int) -> None:
    """Train, quantize, train on with fake quantization, convert; print the accuracy of each."""
    train(model, data, epochs, 3e-3)
    x, x_test = data[:2]
    print(f"{name}: accuracy on {len(x_test)} test samples")
    print(f"  float               {accuracy(model.eval(), data):6.2f} %")
    print(f"  int8 PTQ            {accuracy(fxq.quantize(model, x), data):6.2f} %")

    steps = -(-len(x) // 32)
    for label, recipe in (("ranges follow", fxq.Recipe()), ("learned steps", fxq.Recipe(learn_steps=True))):
        torch.manual_seed(1)
        qat = fxq.prepare_qat(model, x, recipe=recipe)
        fxq.freeze_observers(qat, after=3 * steps)
        fxq.freeze_batch_norm(qat, after=4 * steps)
        train(qat, data, 5, 3e-4)
        qmodel = fxq.convert(qat)
        print(f"  int8 QAT            {accuracy(qmodel, data):6.2f} %   {label}")

    with torch.no_grad():
        fake, integers = qat.eval()(x_test), qmodel(x_test)
    same = int((fake.argmax(1) == integers.argmax(1)).sum())
    peak, error = fake.abs().max().item(), (fake - integers).abs().max().item()
    print(f"  the trained graph and the integers: the same answer on {same} of {len(x_test)},", end="")
    print(f" logits up to {peak:.1f} differ by {error:.4f} at most\n")
    golden = fxq.golden(qmodel)(x_test.numpy())
    assert np.array_equal(golden, integers.numpy())


def main() -> None:
    """The three networks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    compare("iris 4-16-3", iris_net(), iris(), epochs=60)
    compare("digits 64-64-32-10", digits_net(), digits(), epochs=30)
    compare("digits, convolutions", digits_cnn(), digits(), epochs=12)


if __name__ == "__main__":
    main()
