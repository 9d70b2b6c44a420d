"""int8 weights beside float activations: fxq's weight-only linear against torch's float linear, in turns.

    python -m benchmarks.weight_only [--threads 1 2] [--seconds S]

Each line is a shape, x: [M, K], w: [N, K]; times are medians, ratios are medians of the ratios within a round: above 1
fxq is faster. Of w8a16 the peer is torch's float32 linear as well; its bfloat16 one stands beside it.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from benchmarks.timing import interleave, median_us, ratio
from fxq import kernels
from fxq.nn import W8A16Linear, W8A32Linear

SHAPES = (
    *((1, k, n) for k, n in ((512, 512), (1024, 1024), (2048, 2048), (1024, 4096), (4096, 4096), (4096, 11008))),
    *((m, 1024, 1024) for m in (2, 4, 8, 16, 32, 64, 128, 512)),
    *((m, 768, 3072) for m in (16, 128)),
)


def main() -> None:
    """Print the table for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape")
    arguments = parser.parse_args()
    info = kernels.info()
    print(f"{info.cpu}, {info.isa}, torch {torch.__version__}")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(f"\nthreads: {threads}\n{'M':>5} {'K':>5} {'N':>6} {'int8 weight':>12} {'float32 us':>11} {'bf16 us':>9}"
              f" {'w8a32 us':>9} {'ratio':>6} {'w8a16 us':>9} {'ratio':>6}")  # fmt: skip
        for shape in SHAPES:
            print(line(*shape, arguments.seconds), flush=True)


def line(m: int, k: int, n: int, seconds: float) -> str:
    """The measurements of one shape."""
    linear, x = torch.nn.Linear(k, n).requires_grad_(False), torch.randn(m, k)
    brain, narrow = torch.nn.Linear(k, n, dtype=torch.bfloat16).requires_grad_(False), x.bfloat16()
    w8a32, w8a16 = W8A32Linear.from_float(linear), W8A16Linear.from_float(brain)
    times = interleave(
        {
            "float32": lambda: F.linear(x, linear.weight, linear.bias),
            "w8a32": lambda: w8a32(x),
            "bfloat16": lambda: F.linear(narrow, brain.weight, brain.bias),
            "w8a16": lambda: w8a16(narrow),
        },
        seconds,
    )
    us = {name: median_us(own) for name, own in times.items()}
    gain = {name: ratio(times["float32"], times[name]) for name in ("w8a32", "w8a16")}
    return (
        f"{m:>5} {k:>5} {n:>6} {k * n / 2**20:>9.2f} MB {us['float32']:>11.1f} {us['bfloat16']:>9.1f}"
        f" {us['w8a32']:>9.1f} {gain['w8a32']:>6.2f} {us['w8a16']:>9.1f} {gain['w8a16']:>6.2f}"
    )


if __name__ == "__main__":
    main()
