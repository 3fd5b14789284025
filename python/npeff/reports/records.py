"""The examples of a report as compact records, in parts of a few hundred."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.reports.study import Study
from npeff.reports.summary import known_predictions

Array = npt.NDArray[Any]

PER_PART = 300
MOST = 12  # components listed of an example; the rest is counted
LEAST = 0.005  # of its summed coefficients


def parts(study: Study) -> Iterator[tuple[int, list[list[Any]]]]:
    """Yield ``(number of the part, records)``.

    A record is ``[position, label, prediction, confidence, explained share, number of components with a coefficient,
    [[component, coefficient], …], [[component, what is drawn], …]]``, None for what is unknown.
    """
    components = study.components
    W, labels, predictions = components.coefficients, np.asarray(components.labels), known_predictions(components)
    drawn: dict[int, list[list[Any]]] = {}
    for j, items in study.attributions.items():
        for top, what in items:
            drawn.setdefault(top.index, []).append([j, what])
    for start in range(0, len(W), PER_PART):
        w = W[start : start + PER_PART]
        order = np.argsort(-w, axis=1, kind="stable")[:, :MOST]
        counts, sums = (w > 0).sum(1), w.sum(1, dtype=np.float64)
        confidence = _confidence(components.logits[start : start + PER_PART])
        records = []
        for k in range(len(w)):
            i = start + k
            listed = [[int(j), _round(w[k, j])] for j in order[k] if w[k, j] > LEAST * sums[k]]
            share = None if study.explained is None else study.explained[i]
            record = [
                int(components.ids[i]),
                int(labels[i]),
                int(predictions[i]),
                None if confidence is None else _round(confidence[k]),
                None if share is None or not np.isfinite(share) else _round(share),
                int(counts[k]),
                listed,
            ]
            records.append([*record, drawn[i]] if i in drawn else record)
        yield start // PER_PART, records


def pictures(study: Study) -> Iterator[tuple[int, list[Any]]]:
    """Yield ``(number of the part, what to show of each example)``, None for those that are not in the gallery."""
    ids = study.components.ids
    for start in range(0, len(ids), PER_PART):
        found = [study.gallery.encoded(int(position)) for position in ids[start : start + PER_PART]]
        if any(found):
            yield start // PER_PART, found


def _confidence(logits: Array) -> Array | None:
    """Probability of the predicted class; None where there are no two classes."""
    if logits.shape[1] < 2:
        return None
    shifted = np.asarray(logits, np.float64) - logits.max(1, keepdims=True)
    return np.asarray(1 / np.exp(shifted).sum(1))


def _round(value: Any) -> float:
    """Four significant digits: what a page can show."""
    return float(f"{float(value):.4g}")
