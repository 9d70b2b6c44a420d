"""Draws the pictures of the README: one model before and after. `make pictures` runs it."""

from pathlib import Path

import torch
from torch import Tensor, nn

import fxq

FOLDER = Path(__file__).parent / "pictures"


class Block(nn.Module):
    """Two linears with a residual connection, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 64)
        self.fc2 = nn.Linear(64, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [N, 16]; returns class probabilities [N, 4]."""
        y = self.fc2(torch.relu(self.fc1(x)))
        return torch.softmax(self.head(torch.relu(x + y)), -1)


def main() -> None:
    """Write before.svg and after.svg."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(32, 16)
    fxq.draw(fxq.trace(model, x), FOLDER / "before.svg")
    qmodel = fxq.quantize(model, x, recipe=fxq.Recipe(judge_costs=False))
    fxq.draw(fxq.expand(qmodel), FOLDER / "after.svg")
    print(f"{FOLDER}/before.svg, after.svg")


if __name__ == "__main__":
    main()
