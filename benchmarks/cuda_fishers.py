"""The parts of ``cuda_kernels.py`` about Fishers: MiniLM's architecture, and a language model beside bergson.

Weights are random: times do not depend on them. Every function takes the device as an argument, so that all of it runs
where there is no device. Tables are yielded line by line, as soon as a line is known; what fails costs its line alone.
"""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.util
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import machine
import npeff
from machine import synchronize

DTYPES = (torch.float32, torch.bfloat16)
LAYERS = "model.layers.*_proj.weight"
"""The weights of a Llama block's linear layers."""

HEAD = "| | s a call (calls) | s a further batch | quartiles | tokens/s | × plain | peak GB |"


# ---- timing -------------------------------------------------------------------------------------------------------


class Timed:
    """Batches that note when each is asked for: what a further batch costs, without what comes once per call."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches
        self.asked: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        asked = []
        for batch in self.batches:
            asked.append(time.perf_counter())
            yield batch
        self.asked = [*asked, time.perf_counter()]  # of a pass over all batches: not of a look at the first

    def __len__(self) -> int:
        return len(self.batches)

    def further(self) -> list[float]:
        """Seconds from one batch to the next, without the first two."""
        return np.diff(self.asked)[min(2, len(self.batches) - 1) :].tolist()


def release(device: torch.device) -> None:
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def failed(name: str, error: Exception) -> str:
    traceback.print_exc()
    return f"| {name}: FAILED, {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]} | | | | | | |"


def compared(
    sides: dict[str, Callable[[], object]], data: Timed, device: torch.device, rounds: int, seconds: float
) -> Iterator[str]:
    """Run the sides in turn; the first of them is what the others are compared with.

    Each call warms itself up: its first two batches are not counted.

    Args:
        sides: Each goes through ``data`` once, and ends when its work is done.
        data: Batches of tokens ``(b, length)``.
        device: Where.
        rounds: Most rounds.
        seconds: No round but the first begins that would end later.

    Yields:
        Lines of a table, the first side's first. A side that fails sits out the rounds and has a line that says so.
    """
    totals: dict[str, list[float]] = {name: [] for name in sides}
    further: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float] = {}
    start = last = time.perf_counter()
    for turn in range(rounds):
        began_round = time.perf_counter()
        if turn and 2 * began_round - last - start > seconds:
            break
        last = began_round
        for name in list(totals):
            release(device)
            try:
                began = time.perf_counter()
                result = sides[name]()
                took = time.perf_counter() - began
            except Exception as error:
                del totals[name]
                yield failed(name, error)
                continue
            between = data.further()
            print(f"  round {turn}, {name}: {took:.3f} s, {np.median(between):.4f} s per batch", flush=True)
            if isinstance(result, npeff.Fishers) and not turn:
                print_slow_rules(result)
            del result
            totals[name].append(took)
            further[name] += between
            if device.type == "cuda" and not turn:
                peaks[name] = torch.cuda.max_memory_allocated(device) / 1e9
    tokens = data.batches[0].numel()
    plain = machine.quartiles(further[next(iter(sides))] or [float("nan")])[1]
    for name, values in totals.items():
        low, middle, high = machine.quartiles(further[name])
        yield (
            f"| {name} | {machine.quartiles(values)[1]:.3f} ({len(values)}) | {middle:.4f} | {low:.4f} – {high:.4f} "
            f"| {tokens / middle:,.0f} | {middle / plain:.2f} | {peaks.get(name, 0):.1f} |"
        )


def print_slow_rules(fishers: npeff.Fishers) -> None:
    """Print which parameters no fast rule serves, and why."""
    for served in fishers.coverage:
        if served["rule"] in ("torch.func", "loop"):
            print(f"  SLOW {served['parameter']}: {served['rule']}, {served['reason']}", flush=True)


def explained(plain: str) -> list[str]:
    return [
        "",
        "A call's seconds contain what comes once per call (digests of the weights, the check of the rules); tokens/s "
        f"and × {plain} are of further batches: the time from one batch to the next, without the first two. Medians. "
        "float32 products are not rounded to TF32.",
        "",
        HEAD,
        "|---|---|---|---|---|---|---|",
    ]


# ---- MiniLM -------------------------------------------------------------------------------------------------------


def minilm(classes: int, share: float) -> nn.Module:
    """all-MiniLM-L6's architecture (22.7 M parameters)."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=max(100, int(30_522 * share)), hidden_size=12 * max(4, round(32 * share)),
        num_hidden_layers=max(1, round(6 * share)), num_attention_heads=12,
        intermediate_size=max(64, round(1536 * share)), num_labels=classes,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch).logits


def backward_passes(model: nn.Module, data: Timed, device: torch.device) -> None:
    """A forward pass and C − 1 backward passes to all parameters, for every batch; gradients are summed over it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch in data:
        logits = logits_of(model, batch.to(device))
        for column in range(logits.shape[1] - 1):
            cotangent = torch.zeros_like(logits)
            cotangent[:, column] = 1
            torch.autograd.grad(logits, parameters, cotangent, retain_graph=True, allow_unused=True)
        synchronize(device)


def fishers_lines(
    device: torch.device,
    folder: Path,
    share: float,
    rounds: int,
    classes: int = 3,
    size: int = 32,
    length: int = 128,
    profile: bool = False,
) -> Iterator[str]:
    """compute_fishers of MiniLM against a forward and C − 1 plain backward passes on the same batches, in turns."""
    model = minilm(classes, share)
    generator = torch.Generator().manual_seed(0)
    words: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    data = Timed([torch.randint(1, words, (size, length), generator=generator) for _ in range(max(2, int(16 * share)))])
    few, options = [data.batches[0][:2]], {"forward": logits_of, "progress": False}
    wanted = npeff.compute_fishers(model, few, **options)  # type: ignore[arg-type]
    path = folder / "fishers.h5"
    model = model.to(device)

    def ours(compress: Any) -> npeff.Fishers:
        path.unlink(missing_ok=True)
        return npeff.compute_fishers(model, data, compress=compress, out=path, **options)  # type: ignore[arg-type]

    plain = f"forward, {classes - 1} plain backward passes"
    sides: dict[str, Callable[[], object]] = {
        plain: lambda: backward_passes(model, data, device),
        "compute_fishers, TopK(65 536)": lambda: ours(npeff.TopK(65_536)),
        'compute_fishers, Sketch(4096, form="kronecker")': lambda: ours(npeff.Sketch(4096, form="kronecker")),
    }
    n = sum(len(batch) for batch in data.batches)
    yield f"## Fishers of MiniLM's architecture: {n} examples of {length} tokens, {classes} classes, batches of {size}"
    yield ""
    yield "Written to a file while they are computed. Target: at most 1.3 × the plain passes."
    for dtype in DTYPES:
        model = model.to(dtype)
        yield from ["", f"### {dtype}", ""]
        try:
            found = npeff.compute_fishers(model, few, **options)  # type: ignore[arg-type]
            if dtype == torch.float32:
                check_fishers(found, wanted)
            np.testing.assert_allclose(found.norms, wanted.norms, rtol=0.02 if dtype == torch.float32 else 0.2)
            yield "Checked: exact Fishers of two examples are the processor's in float32."
        except Exception as error:
            yield failed("check", error)
        yield from explained("the plain passes")
        yield from compared(sides, data, device, rounds, 8)
        if profile and dtype == torch.float32:
            for compress in (npeff.TopK(65_536), npeff.Sketch(4096, form="kronecker")):
                run = partial(npeff.compute_fishers, model, data.batches[:4], compress=compress, **options)
                machine.print_profile(f"4 batches with {compress}", run)
    yield ""


def check_fishers(found: npeff.Fishers, wanted: npeff.Fishers) -> None:
    """The same Fishers ``AᵀA``: rows may differ by signs, so that inner products with a common vector are compared."""
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=2e-2)
    probe = rng.standard_normal(wanted.rows.n_columns).astype(np.float32)
    for i in range(len(wanted)):
        start, stop = int(wanted.row_offsets[i]), int(wanted.row_offsets[i + 1])
        one, other = (np.square(f.rows.dense(start, stop) @ probe).sum() for f in (found, wanted))
        assert abs(one - other) <= 2e-2 * abs(other), f"the Fisher of example {i} differs: {one} and {other}"


# ---- a language model ---------------------------------------------------------------------------------------------


def smollm(share: float) -> nn.Module:
    """SmolLM2-135M's architecture (134.5 M parameters, embeddings tied)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=max(100, int(49_152 * share)), hidden_size=9 * 2 * max(4, round(32 * share)),
        num_hidden_layers=max(1, round(30 * share)), num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=max(64, round(1536 * share)), tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def last_logits(model: nn.Module, batch: Any) -> Tensor:
    """``(b, vocabulary)``: what follows each sequence. Takes the tokens, or (tokens, labels)."""
    tokens = batch[0] if isinstance(batch, list | tuple) else batch
    return model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]


def sampled_log_probability(logits: Tensor) -> Tensor:
    """``(b,)`` log-probabilities of one token for each sequence, drawn from the model's own predictions."""
    logits = logits.float()
    drawn = torch.multinomial(logits.detach().softmax(1), 1)
    return logits.log_softmax(1).gather(1, drawn)[:, 0]


def plain_pass(model: nn.Module, data: Timed, device: torch.device) -> None:
    """A forward pass and one backward pass to all parameters, for every batch."""
    parameters = list(model.parameters())
    for batch in data:
        torch.autograd.grad(sampled_log_probability(last_logits(model, batch.to(device))).sum(), parameters)
        synchronize(device)


def language_lines(
    device: torch.device,
    share: float,
    rounds: int,
    batches: int = 6,
    size: int = 64,
    length: int = 128,
    sketch: npeff.Sketch | None = None,
    profile: bool = False,
) -> Iterator[str]:
    """compute_fishers of a language model at one sampled row per sequence, against one plain pass, and bergson."""
    model = smollm(share)
    sketch = npeff.Sketch(4096, form="kronecker") if sketch is None else sketch
    generator = torch.Generator().manual_seed(0)
    words: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    data = Timed([torch.randint(1, words, (size, length), generator=generator) for _ in range(batches)])
    few = (data.batches[0][:2, :16], torch.tensor([1, 2]))
    wanted = true_rows(model, few, sketch)
    model = model.to(device)
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and "layers." in name]

    def ours(parameters: str | None) -> Callable[[], object]:
        return lambda: npeff.compute_fishers(
            model, data, forward=last_logits, labels="sampled", n_samples=1, compress=sketch, parameters=parameters,
            progress=False,
        )  # fmt: skip

    name = f'compute_fishers, Sketch({sketch.d}, form="{sketch.form}")'
    sides: dict[str, Callable[[], object]] = {
        "forward and one plain backward pass, all parameters": lambda: plain_pass(model, data, device),
        f"{name}, all parameters": ours(None),
        f"{name}, the blocks' {len(layers)} linear layers": ours(LAYERS),
    }
    absent, fitting = bergson_absence(), max(1, round((sketch.d / len(layers)) ** 0.5))
    for side in () if absent else sorted({fitting, 16}):
        what = f"bergson, the same layers, {side} × {side} each: {side * side * len(layers):,} numbers"
        sides[what] = bergson_side(model, data, device, layers, side)
    yield (
        f"## Fishers of SmolLM2-135M's architecture: {size * batches} sequences of {length} tokens, batches of {size}, "
        "one sampled row each"
    )
    yield ""
    yield (
        "An example is a sequence, its row the gradient of the log-probability of one token drawn to follow it. Kept "
        "in memory, no file. Target: at most 1.17 × the plain pass."
    )
    yield ""
    yield absent or (
        "bergson collects with the same forward pass and loss; only the embedding requires gradients, as in its own "
        "pipeline. It stores projections in the model's dtype, of linear layers alone; compute_fishers stores float32, "
        "computes exact norms of the rows too, and checks its inputs and rules."
    )
    for dtype in DTYPES:
        model = model.to(dtype)
        yield from ["", f"### {dtype}", ""]
        try:
            error = np.linalg.norm(true_rows(model, few, sketch) - wanted) / np.linalg.norm(wanted)
            assert error <= (5e-3 if dtype == torch.float32 else 0.2), f"relative error {error:.1e}"
            yield f"Checked: sketches of two examples are the processor's in float32, relative error {error:.1e}."
        except Exception as error:
            yield failed("check", error)
        yield from explained("the plain pass")
        yield from compared(sides, data, device, rounds, 16)
        if profile and dtype == torch.float32:
            run = partial(
                npeff.compute_fishers, model, data.batches[:3], forward=last_logits, labels="sampled", compress=sketch,
                progress=False,
            )  # fmt: skip
            machine.print_profile("3 batches, all parameters", run)
    yield ""


def true_rows(model: nn.Module, batch: tuple[Tensor, Tensor], sketch: npeff.Sketch) -> npt.NDArray[Any]:
    """Sketches of the rows of given labels, which do not depend on draws."""
    found = npeff.compute_fishers(model, [batch], forward=last_logits, labels="true", compress=sketch, progress=False)
    return found.rows.dense(0, len(batch[1]))


def bergson_absence() -> str:
    """Why bergson cannot run here; empty where it can."""
    if importlib.util.find_spec("bergson") is None:
        return "bergson: not run, it is not installed."
    if importlib.util.find_spec("bitsandbytes") is None:  # imported for optimisers that nothing here uses
        stub = types.ModuleType("bitsandbytes")
        stub.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
        sys.modules["bitsandbytes"] = stub
    try:
        importlib.import_module("bergson")
    except Exception as error:
        traceback.print_exc()
        return f"bergson: not run, its import failed ({type(error).__name__}: {error})."
    return ""


def bergson_side(
    model: nn.Module, data: Timed, device: torch.device, layers: list[str], side: int
) -> Callable[[], object]:
    """bergson's in-memory collection of gradients, projected to side × side numbers for each layer."""
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    n = sum(len(batch) for batch in data.batches)
    base: Any = model.base_model
    names = {name.removeprefix("model.") for name in layers}

    def collect() -> Any:
        flags = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
        base.get_input_embeddings().requires_grad_(True)
        try:
            collector = InMemoryCollector(
                model=base, data=Dataset.from_dict({"example": list(range(n))}), cfg=IndexConfig(run_path="unused"),
                processor=GradientProcessor(projection_dim=side), target_modules=names,
            )  # fmt: skip
            done = 0
            for batch in data:
                with collector.with_batch(torch.ones(batch.shape, dtype=torch.bool, device=device)):
                    losses = -sampled_log_probability(last_logits(model, batch.to(device)))
                    losses.sum().backward()
                    model.zero_grad()
                    synchronize(device)
                collector.process_batch(list(range(done, done + len(batch))), losses=losses)
                done += len(batch)
            collector.teardown()
            return collector.gradients
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None

    return collect
