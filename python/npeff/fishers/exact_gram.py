"""Inner products of all rows of all examples, layer by layer, with no per-example gradient kept.

``K = A Aᵀ`` is a sum over parameters. For a matrix whose gradient is ``Σ_t δ_t ⊗ a_t`` an entry is
``Σ_tu (a_t·a'_u)(δ_t·δ'_u)``: with T = 1 the Hadamard product of two small Gram matrices. With T > 1 either that sum is
contracted, or the gradients are formed a few rows of the matrix at a time and forgotten, whichever takes fewer
operations. Parameters whose gradient is smaller than its factors (biases, norms, small convolutions) keep it.

What has been collected is held until K has taken it in; parameters that do not fit into the memory allowed wait for
another pass over the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from npeff.batches.batches import Batch, batch_digest
from npeff.batches.reading import FixedOrder, Repeats
from npeff.errors import ArgumentError, DataError
from npeff.fishers.file_format import example_fields, offsets_of
from npeff.fishers.fishers import Fishers, fishers_in
from npeff.fishers.layer_gram import LayerGram
from npeff.fishers.logits import Logits, joined, largest
from npeff.fishers.options import GramOnly
from npeff.fishers.parts import find_finished
from npeff.fishers.passes import Ids, Run
from npeff.fishers.rows import Array, GramRows
from npeff.gradients.blocks import Block, Pairs
from npeff.gradients.rules import Rule
from npeff.models.devices import format_bytes, parse_bytes
from npeff.models.parameters import ModelWatch, Parameter
from npeff.storage.container import open_container


def exact_gram(run: Run, data: Iterable[Any]) -> Fishers:
    """Compute Fishers that hold K; see :class:`npeff.GramOnly`. Where the options' ``out`` holds them, open that.

    Raises:
        ArgumentError: One parameter alone exceeds the memory allowed.
        DataError: The data is empty, cannot be read a second time, or gives non-finite logits or gradients.
        ResumeError: ``out`` holds other work.
        StorageError: ``out`` cannot be written.
    """
    options, out = run.options, None if run.options.out is None else Path(run.options.out)
    assert isinstance(options.compress, GramOnly)
    watch = ModelWatch(run.model)
    memory = parse_bytes(options.compress.memory)
    examples, waiting, K = list[dict[str, Array]](), set(run.parameters.names), None
    order = FixedOrder(data, lambda: run.batches(data))
    repeats, digests = Repeats(data), list[str]()
    while waiting:
        first_pass = K is None
        layers = {name: LayerGram(run.parameters.named(name)) for name in sorted(waiting)}
        n = 0
        with tqdm(run.batches(data), desc="inner products", unit="batch", disable=not options.progress) as bar:
            for number, batch in enumerate(bar):
                watch.check()
                digest = batch_digest(batch)
                if first_pass:
                    if number == 0:
                        order.check(batch)
                        run.choose_block_weights(batch)
                    repeats.add(digest)
                    digests.append(digest)
                elif number >= len(digests) or digest != digests[number]:
                    raise DataError(
                        f"data: batch {number} is another one in a second pass over it, which the inner products need; "
                        "pass data that keeps its order, or allow GramOnly more memory"
                    )
                _collect(run, batch, np.arange(n, n + batch.n_examples), layers, examples if first_pass else None)
                n += batch.n_examples
                _postpone(layers, memory)
        if first_pass:
            repeats.end()
            if not examples:
                raise DataError("data: it yielded no examples; if it is a generator it may be used up: pass a list")
            known = joined(examples)
            header = run.header(watch.digest, Logits.from_arrays(known).n_outputs)
            if out is not None and (found := find_finished(out, header)) is not None:
                return fishers_in(found)
            n_rows = int(known["row_counts"].sum())
            K = np.zeros((n_rows, n_rows), np.float32)
        elif n != len(known["ids"]):
            raise DataError(
                f"data: a second pass over it gave {n} examples, the first {len(known['ids'])}; pass a list or a "
                "DataLoader rather than a generator, or allow GramOnly more memory"
            )
        assert K is not None
        for name, layer in layers.items():
            layer.add_to(K)
            waiting.discard(name)
    try:
        run.check_function()
    finally:
        watch.check(thorough=True)
    assert K is not None
    fishers = _fishers(run, K, known, header)
    return fishers if out is None else fishers_in(open_container(fishers.save(out)))


def _collect(
    run: Run, batch: Batch, ids: Ids, layers: dict[str, LayerGram], examples: list[dict[str, Array]] | None
) -> None:
    """Give a batch's gradients to the layers; in the first pass, what is known of its examples to ``examples``."""
    with run.engine.recording():
        for one in run.passes(batch, ids):
            counts, n_columns, filled = one.factors.counts.cpu().numpy(), one.n_columns, one.filled
            if examples is not None:
                kept = [array.cpu().numpy() for array in largest(one.logits, run.options.over_classes)]
                known = {"row_counts": counts[filled], "scale": one.factors.scale.cpu().numpy()[filled], "ids": one.ids}
                known |= {"labels": one.stored_labels(), **Logits.kept(kept, one.logits.shape[1]).arrays()}
                examples.append(known if one.places is None else {**known, "places": one.places})
            for layer in layers.values():
                layer.begin(counts, n_columns)
            one.prepared.restrict(layers)
            for block in one.blocks(paired=partial(_factors_are_smaller, n_columns)):
                _check_finite(block, one.slot_ids)
                layers[block.parameter.name].take(run.weighted(block))
            for layer in layers.values():
                layer.end()


def _factors_are_smaller(n_columns: int, parameter: Parameter, rules: list[Rule]) -> bool:
    if len(parameter.shape) != 2 or len(rules) != 1:
        return False
    n, k = parameter.shape
    t = rules[0].layout.positions
    return bool(t * (n_columns * max(n, k) + min(n, k)) < n_columns * n * k)


def _check_finite(block: Block | Pairs, ids: Ids) -> None:
    """Refuse gradients that are not finite.

    Raises:
        DataError: Naming the example and the parameter.
    """
    tensors: Iterator[Tensor] = iter((block.delta, block.inputs) if isinstance(block, Pairs) else (block.values,))
    for tensor in tensors:
        finite = torch.isfinite(tensor).flatten(1).all(dim=1)
        if not bool(finite.all()):
            example = ids[block.examples.start + int((~finite).to(torch.uint8).argmax())]
            raise DataError(
                f"gradients: example {example} has a gradient for {block.parameter.name} that is not finite; find what "
                "overflows in the model on that example, or leave it out of the data"
            )


def _postpone(layers: dict[str, LayerGram], memory: int) -> None:
    """Let the largest parameters wait for the next pass, until the rest fits into memory.

    Raises:
        ArgumentError: One alone does not.
    """
    while (total := sum(layer.nbytes for layer in layers.values())) > memory:
        if len(layers) == 1:
            raise ArgumentError(
                f"memory: {next(iter(layers))} alone keeps more than the {format_bytes(memory)} that GramOnly was "
                f"allowed ({format_bytes(total)} and growing); allow more, or leave the parameter out"
            )
        layers.pop(max(layers, key=lambda name: layers[name].nbytes))


def _fishers(run: Run, K: Array, known: dict[str, Array], header: dict[str, Any]) -> Fishers:
    counts, scale = known["row_counts"], known["scale"]
    offsets, norms = offsets_of([counts]), np.zeros(len(counts), np.float32)
    for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
        norms[i] = np.linalg.norm(K[start:stop, start:stop].astype(np.float64)) * scale[i] ** 2
    per_row = np.repeat(scale, counts).astype(np.float32)
    K *= per_row
    K *= per_row[:, None]
    found = Fishers(
        kind="low_rank",
        rows=GramRows(K),
        row_offsets=offsets,
        **example_fields({**known, "norms": norms}),
        parameters=run.parameters,
        provenance=header["provenance"],
        coverage=run.coverage(),
    )
    in_order = (np.diff(found.ids) > 0).all()  # places go backward some at a time
    return found if in_order else found[np.argsort(found.ids)]
