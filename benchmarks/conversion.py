"""What tracing and converting cost, over the number of layers; the cost is linear.

    make conversion

Encoders of BERT with 6, 12, 24 and 48 layers of width 64, then MiniLM in full size (6 layers of 384, random weights),
each quantized on one batch. CPU seconds on one thread; `calibrate` is left out, since its cost is the model's own.
Exits with 1 where 48 layers cost more than 1.5 times as much per node as 12 do, or MiniLM takes more than 10 seconds.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fxq

LAYERS = (6, 12, 24, 48)
MOST_PER_NODE, MOST_FOR_MINILM = 1.5, 10.0


@dataclass(frozen=True)
class Cost:
    """Nodes of the float graph, and CPU seconds: of tracing alone, of `prepare` (which traces) and of `convert`."""

    nodes: int
    trace: float
    prepare: float
    convert: float

    @property
    def total(self) -> float:
        """Seconds for all but calibration."""
        return self.prepare + self.convert

    def __str__(self) -> str:
        each = 1000 * self.total / self.nodes
        return f"{self.nodes:7d}{self.trace:9.2f}{self.prepare:10.2f}{self.convert:10.2f}{self.total:9.2f}{each:14.2f}"


def bert(layers: int, width: int, vocabulary: int = 200) -> nn.Module:
    """An encoder with random weights."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
    )
    model: nn.Module = BertModel(config)
    return model.eval()


def measure(model: nn.Module, inputs: dict[str, Tensor]) -> Cost:
    """Trace, prepare, calibrate on the inputs, convert."""
    times = [time.process_time()]
    nodes = len(fxq.trace(model, inputs).graph.nodes)
    times.append(time.process_time())
    prepared = fxq.prepare(model, inputs)
    times.append(time.process_time())
    fxq.calibrate(prepared, [inputs], progress=False)
    begin = time.process_time()
    fxq.convert(prepared)
    return Cost(nodes, times[1] - times[0], times[2] - times[1], time.process_time() - begin)


def main() -> int:
    """Print the table; 1 where a promise is broken."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids = torch.randint(3, 200, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure(bert(1, 64), inputs)  # whatever is imported and built on first use
        print("layers             nodes  trace s prepare s convert s  total s   ms per node")
        costs = {}
        for layers in LAYERS:
            costs[layers] = measure(bert(layers, 64), inputs)
            print(f"{layers:<16d}{costs[layers]}", flush=True)
        minilm = measure(bert(6, 384, 30522), inputs)
        print(f"{'6, as MiniLM':<16s}{minilm}")
    growth = (costs[48].total / costs[48].nodes) / (costs[12].total / costs[12].nodes)
    print(f"\n48 layers cost {growth:.2f} times as much per node as 12 (at most {MOST_PER_NODE})")
    print(f"MiniLM takes {minilm.total:.1f} s (at most {MOST_FOR_MINILM})")
    return int(growth > MOST_PER_NODE or minilm.total > MOST_FOR_MINILM)


if __name__ == "__main__":
    sys.exit(main())
