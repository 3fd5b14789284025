"""Per-example gradients of a batch, block by block: one forward pass, one backward pass per cotangent column.

The backward passes go to the outputs of the operations in which parameters meet data, never to the
parameters. Then, parameter by parameter and tile by tile, the rules make the per-example gradients. The
caller compresses each block before it asks for the next, so that no (batch, rank, parameters) tensor ever exists.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from npeff.batches.batches import Batch
from npeff.errors import ModelError
from npeff.gradients import blocks
from npeff.gradients.backward import Cotangents, backward, small_products
from npeff.gradients.blocks import Block, Pairs
from npeff.gradients.eligibility import check_deterministic, check_eligible, check_independence
from npeff.gradients.fallback import Fallback, Logits, groups
from npeff.gradients.graph import Graph, Value
from npeff.gradients.rules import Found, Rule, Unsupported, find_uses
from npeff.gradients.rules.base import Scratch
from npeff.gradients.selfcheck import EVERY, Form, check_rules, misplaced, powers_of_two, rows_follow
from npeff.models.devices import memory_explained
from npeff.models.parameters import Parameter, Parameters

_KNOWN_GRAPHS = 64
"""Of so many fingerprints of graphs it is remembered which rules serve them."""
_FUSED_RECURRENT = frozenset({"MkldnnRnnLayerBackward0", "CudnnRnnBackward0", "MiopenRnnBackward0"})


@dataclass(frozen=True)
class KnownGraph:
    """The uses of parameters that hold for every batch whose graph has a certain fingerprint.

    Attributes:
        found: Per parameter, its uses with their rules and layouts.
        form: What the checks found for graphs of its form.
        precision: The coarsest dtype in the graph.
        routed: The graph can move rows by the values of a tensor.
    """

    found: dict[str, list[Found]]
    form: Form
    precision: torch.dtype
    routed: bool


@dataclass
class Prepared:
    """A batch's logits, and the rules that its graph calls for.

    Attributes:
        batch: The batch.
        logits: ``(b, C)`` with their graph.
        rules: Per parameter, the rules of its uses.
        others: Parameters that the fallback serves.
        graph: The batch's graph.
        known: What is known of graphs with its fingerprint.
        checked: The backward passes have to check which rows belong to which example.
    """

    batch: Batch
    logits: Tensor
    rules: dict[str, list[Rule]]
    others: list[str]
    graph: Graph
    known: KnownGraph
    checked: bool

    @property
    def n_sequences(self) -> int:
        """Examples that the model, and the rules, know."""
        return self.batch.n_sequences

    def restrict(self, names: Container[str]) -> None:
        """Leave out all parameters but these."""
        self.rules = {name: rules for name, rules in self.rules.items() if name in names}
        self.others = [name for name in self.others if name in names]

    def kept_bytes(self, n_columns: int) -> int:
        """Return the bytes that the backward passes will keep for so many columns, of the whole batch."""
        n_columns += 2 if self.checked else 0
        return n_columns * sum(rule.bytes_per_column() for rules in self.rules.values() for rule in rules)


class PerExampleGradients:
    """Per-example gradients of the selected parameters of a model.

    Args:
        model: The model, left as it was after each ``recording``.
        parameters: The selected parameters' places in the flat vector.
        call: Runs the model on a batch.

    Attributes:
        precision: The coarsest dtype in the graph of the last batch.

    Raises:
        ModelError: The model has no per-example gradients as it stands.
    """

    def __init__(self, model: nn.Module, parameters: Parameters, call: Logits) -> None:
        check_eligible(model)
        self.model, self.parameters = model, parameters
        named = dict(model.named_parameters())
        self.tensors: dict[str, Tensor] = {name: named[name] for name in parameters.names}
        self.fallback = Fallback(model, self._run, self.tensors)
        self.moved: dict[str, str] = {}
        self.served: dict[str, str] = {}
        self.scratch = Scratch()
        self.precision: torch.dtype | None = None
        self._call = call
        self._decompose = False
        self._numbers = {id(tensor): number for number, tensor in enumerate(self.tensors.values())}
        self._graph: Graph | None = None
        self._known: OrderedDict[tuple[int, int], KnownGraph] = OrderedDict()
        self._forms: dict[tuple[object, ...], Form] = {}
        self._compared = 0  # sequences of the largest batch that was compared with its half

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Let autograd record the selected parameters alone within the block; restore all flags at its end.

        Raises:
            ModelError: The model was made under ``torch.inference_mode()``, or overwrites what its gradients need.
            OutOfMemoryError: There is too little memory for a batch.
            RuntimeError: Whatever the work within raises.
        """
        before = [(tensor, tensor.requires_grad) for tensor in self.model.parameters()]
        chosen = {id(tensor) for tensor in self.tensors.values()}
        try:
            for tensor, _ in before:
                if tensor.requires_grad != (id(tensor) in chosen):
                    tensor.requires_grad_(id(tensor) in chosen)
            with memory_explained(), torch.inference_mode(False), torch.enable_grad():
                yield
        except RuntimeError as error:
            if "inference tensor" in str(error).lower():
                raise ModelError(
                    "model: made under torch.inference_mode(), so autograd cannot record it; make or load "
                    f"it outside ({error})"
                ) from error
            if "modified by an inplace operation" in str(error):
                raise ModelError(
                    "model: it overwrites a tensor in place that its gradients need; replace the operation by one that "
                    f"makes a new tensor ({error})"
                ) from error
            raise
        finally:
            self._graph = None
            for tensor, flag in before:
                if tensor.requires_grad != flag:
                    tensor.requires_grad_(flag)

    def forward(self, batch: Batch) -> Tensor:
        """Compute the logits ``(b, C)`` with their graph.

        Raises:
            ModelError: Autograd recorded nothing, or the logits are random.
        """
        self._graph = None
        before = _random_state(batch)
        logits = self.run(batch)
        if not torch.equal(before, _random_state(batch)):  # the numbers drawn need not have an effect
            with torch.no_grad():
                check_deterministic(self.run, batch, logits.detach(), self.precision or logits.dtype)
        if logits.requires_grad and not self._decompose:
            graph = self._graph = self._graph_of(batch, logits)
            if (graph.fingerprint, batch.n_sequences) not in self._known and _FUSED_RECURRENT.intersection(graph.names):
                # Fused recurrent kernels hide their steps; the plain ones are matrix products, which have a rule.
                self._decompose, self._graph = True, None
                del graph
                logits = self.run(batch)
        if not logits.requires_grad:
            raise ModelError(
                "model: the logits do not depend on any selected parameter as far as autograd can see; "
                "remove torch.no_grad(), .detach() or .data from the forward pass, or select other parameters"
            )
        return logits

    def _graph_of(self, batch: Batch, logits: Tensor) -> Graph:
        selected = batch.places is not None or batch.outputs is not None
        return Graph(logits, self._numbers, batch.n_sequences, selected)

    def run(self, batch: Batch) -> Tensor:
        """Compute the logits ``(b, C)``, whatever autograd records."""
        return self._run(self.model, batch)

    def _run(self, model: nn.Module, batch: Batch) -> Tensor:
        if not self._decompose:
            return self._call(model, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the flags themselves warn about devices that are not here
            with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
                return self._call(model, batch)

    def prepare(self, batch: Batch, logits: Tensor) -> Prepared:
        """Find every use of every parameter in the graph, checking the rules when the graph has a new form.

        Raises:
            ModelError: Examples influence each other, or checkpoints hide parameters.
        """
        graph, self._graph = self._graph, None
        if graph is None or graph.logits is not logits.grad_fn:
            graph = self._graph_of(batch, logits)
        key = (graph.fingerprint, batch.n_sequences)
        known, checked = self._known.get(key), True
        if known is None:
            known, checked = self._survey(batch, logits, graph)
            self._known[key] = known
            if len(self._known) > _KNOWN_GRAPHS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        self.precision = known.precision
        checked = checked and batch.n_sequences > 1 and known.form.due(graph.fingerprint, known.routed)
        return self._with_rules(Prepared(batch, logits, {}, [], graph, known, checked))

    def again(self, prepared: Prepared) -> Prepared:
        """Prepare the same batch for more backward passes over its graph, without a check."""
        return self._with_rules(replace(prepared, rules={}, checked=False))

    def _with_rules(self, prepared: Prepared) -> Prepared:
        known, graph, rules = prepared.known, prepared.graph, prepared.rules
        for name, choice in known.form.layouts.items():
            if name in self.moved:
                continue
            try:
                rules[name] = [
                    rule(use, graph.nodes, layouts[i], self.scratch)
                    for (rule, use, layouts), i in zip(known.found[name], choice, strict=True)
                ]
            except Unsupported as reason:
                self.moved[name] = str(reason)
                continue
            if name not in self.served:
                self.served[name] = "+".join(dict.fromkeys(rule.name for rule in rules[name]))
        prepared.others = [name for name in self.tensors if name in self.moved] if self.moved else []
        return prepared

    def _survey(self, batch: Batch, logits: Tensor, graph: Graph) -> tuple[KnownGraph, bool]:
        """Find every use of every parameter in a graph with a new fingerprint.

        Returns:
            What was found, and whether graphs of its form were seen before; otherwise this batch has been checked.

        Raises:
            ModelError: Examples influence each other, or checkpoints hide parameters.
        """
        self.precision = graph.precision
        if "CheckpointFunctionBackward" in graph.names:
            raise ModelError(
                "model: it calls torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside "
                "from autograd; pass use_reentrant=False, or switch checkpointing off"
            )
        found: dict[str, list[Found]] = {}
        unused = []
        for number, (name, tensor) in enumerate(self.tensors.items()):
            if name in self.moved:
                continue
            if tensor.numel() == 0 or number not in graph.leaves:
                unused.append(name)
                continue
            try:
                found[name] = find_uses(graph, Value(graph.leaves[number], 0, tuple(tensor.shape)), batch.n_sequences)
            except Unsupported as reason:
                self.moved[name] = str(reason)
        key = (graph.form, *_choices(found, batch.n_sequences))
        form = self._forms.get(key)
        seen = form is not None
        if form is None:
            check_independence(self.run, batch, logits, graph.precision)
        if batch.n_sequences > max(2, self._compared):
            self._compared = batch.n_sequences
            check_independence(self.run, batch, logits, graph.precision, half=True)
        if form is None:
            form = self._forms[key] = check_rules(self, batch, logits, found, unused, graph)
        return KnownGraph(found, form, graph.precision, graph.routed), seen

    def backward(
        self, prepared: Prepared, columns: Tensor, whole: Container[int] = (), slots: Tensor | None = None
    ) -> None:
        """Run the backward passes: afterwards the rules hold what they need of δ.

        Where the batch is to be checked, parameters whose rows belong to other examples than their rules assume move to
        the fallback, in this batch already. ``whole`` holds the ``id`` of the rules that will be asked for blocks of
        everything; the other arguments are those of :meth:`blocks`.

        Raises:
            ModelError: Rows are misplaced, and may have been in batches that were not checked.
        """
        every = [rule for rules in prepared.rules.values() for rule in rules]
        cotangents = Cotangents(prepared.batch, prepared.graph, columns, slots, [rule.edge for rule in every])
        weights = weighted = None
        if prepared.checked:
            weights = powers_of_two(prepared.n_sequences, prepared.known.precision).to(columns.device)
            weighted = cotangents.summed(weights)
        checked = backward(cotangents, every, whole, small_products(every), weighted)
        if weights is not None:
            self._check_rows(prepared, checked, weights)

    def _check_rows(
        self, prepared: Prepared, checked: Mapping[tuple[Node, int], tuple[Tensor, Tensor]], weights: Tensor
    ) -> None:
        form, sizes = prepared.known.form, prepared.graph.fingerprint
        for name, rules in list(prepared.rules.items()):
            deltas = [checked[rule.edge.node, rule.edge.output_nr] for rule in rules]
            wrong = next(
                (
                    rule
                    for rule, delta in zip(rules, deltas, strict=True)
                    if not rows_follow(rule, *delta, weights, prepared.known.precision)
                ),
                None,
            )
            if wrong is None:
                if all(bool(delta.any()) for delta, _ in deltas):
                    form.undecided.discard(name)
                continue
            reason = misplaced(wrong.use.operation, wrong.use.output_shape)
            if 0 < form.unchecked[sizes] < EVERY:
                raise ModelError(
                    f"model: {reason} (parameter {name}). They were in earlier batches, so the model moves rows by "
                    f"values, in a way that its graph does not show, and {form.unchecked[sizes]} batches since the "
                    "last check may be wrong. Pass batches of one example, and another out="
                )
            self.moved[name] = reason
            del prepared.rules[name]
            prepared.others.append(name)
        form.unchecked[sizes] = 0

    def blocks(
        self,
        prepared: Prepared,
        columns: Tensor,
        *,
        slots: Tensor | None = None,
        squared: bool = False,
        paired: Callable[[Parameter, list[Rule]], bool] | None = None,
        last_first: bool = False,
        gathered: bool = False,
    ) -> Iterator[Block | Pairs]:
        """Run the backward passes, then yield the per-example gradients.

        Args:
            prepared: From :meth:`prepare`.
            columns: ``(b, C, R)`` cotangents; of all slots, ``(b·K, C, R)``.
            slots: ``(b, K)`` which examples of the batch the K slots of each sequence hold, −1 for none. Where examples
                are places, blocks come per slot, sequence by sequence. None: the examples are what the model takes.
            squared: Yield Σ over columns of the squares instead.
            paired: Says of which parameters the factors are wanted rather than their products, where there are any.
            last_first: Begin with the last parameters.
            gathered: Gather small parameters of one size in one block; give a large table that is used as embedding and
                as output layer partly as runs, partly as factors, where ``paired`` says so of the output layer.

        Yields:
            Blocks that together cover every element of every selected parameter, except where gradients are
            zero.
        """
        n_slots = 1 if slots is None else slots.shape[1]
        n_columns, elements = n_slots * columns.shape[2], blocks.tile_elements(columns.device)
        tiling = blocks.Tiling(prepared.n_sequences, n_columns, elements, squared, n_slots)
        heads = {
            name: tiling.head_of_tied(self.parameters.named(name), rules) if gathered else None
            for name, rules in prepared.rules.items()
        }
        as_factors = {
            name: paired is not None and paired(self.parameters.named(name), [head] if (head := heads[name]) else rules)
            for name, rules in prepared.rules.items()
        }
        whole = {id(rule) for name, rules in prepared.rules.items() if not as_factors[name] for rule in rules}
        self.backward(prepared, columns, whole, slots)
        small = list[tuple[Parameter, Rule]]()
        # The last layers first: they mostly have the largest gradients, so that a selection's threshold rises early.
        for name in reversed(list(prepared.rules)) if last_first else list(prepared.rules):
            parameter, rules = self.parameters.named(name), prepared.rules.pop(name)
            if gathered and tiling.is_small(parameter, rules):
                small.append((parameter, rules[0]))
            elif as_factors[name] and heads[name] is not None:
                yield from tiling.tied(parameter, rules)
            else:
                factors = tiling.pairs(parameter, rules) if as_factors[name] else None
                yield from tiling.tiles(parameter, rules) if factors is None else factors
        yield from tiling.gathered(small)
        if prepared.others:
            yield from self._others(prepared, columns, slots, squared, elements)

    def _others(
        self, prepared: Prepared, columns: Tensor, slots: Tensor | None, squared: bool, elements: int
    ) -> Iterator[Block]:
        """The gradients of the parameters that no rule serves.

        Raises:
            ModelError: A parameter has a hook on its gradient.
        """
        batch, logits = prepared.batch, prepared.logits
        columns, filled = columns.to(logits.dtype), torch.arange(len(columns))
        hooked = [name for name in prepared.others if self.tensors[name]._backward_hooks]
        if hooked:
            raise ModelError(
                f"model: a hook on the gradient of {hooked[0]} may change it, and is no part of the model; remove it "
                "(what register_hook returned has remove())"
            )
        if slots is not None:
            filled = (slots.reshape(-1) >= 0).nonzero()[:, 0].cpu()
            held = slots.reshape(-1)[filled.to(slots.device)]
            batch, logits, columns = batch.take(held), logits[held], columns[filled.to(columns.device)]
        others = {name: self.tensors[name] for name in prepared.others}
        for group in groups(others, columns.shape[2], elements):
            for name, examples, gradient in self.fallback.gradients(
                batch, logits, columns, group, elements, prepared.known.precision
            ):
                parameter, at = self.parameters.named(name), filled[examples].tolist()
                values = gradient.reshape(*gradient.shape[:2], 1, -1)
                values = blocks.squares(values, self.scratch)[:, None] if squared else values
                cuts = [0, *(i for i in range(1, len(at)) if at[i] != at[i - 1] + 1), len(at)]
                for start, stop in pairwise(cuts):
                    where = slice(at[start], at[stop - 1] + 1)
                    yield Block(parameter, where, values[start:stop], parameter.offset)

    def coverage(self) -> list[dict[str, str]]:
        """List the rule that serves each parameter, and why."""
        lines = []
        for name in self.tensors:
            if name in self.moved:
                reason = "; ".join(filter(None, (self.moved[name], self.fallback.loop_reason)))
                lines.append(
                    {
                        "parameter": name,
                        "rule": "loop" if self.fallback.loop_reason else "torch.func",
                        "reason": reason,
                    }
                )
            elif name in self.served:
                lines.append({"parameter": name, "rule": self.served[name], "reason": "agrees with autograd"})
            else:
                lines.append({"parameter": name, "rule": "zero", "reason": "the logits do not depend on it"})
        return lines


def _random_state(batch: Batch) -> Tensor:
    """The state of torch's generator where the batch is."""
    there = batch.device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state(batch.device) if there else torch.get_rng_state()


def _choices(found: Mapping[str, list[Found]], n_examples: int) -> tuple[object, ...]:
    uses = (
        (
            name,
            *((rule, layouts[0].positions > 1, *(layout.order for layout in layouts)) for rule, _, layouts in entries),
        )
        for name, entries in found.items()
    )
    return (n_examples > 1, *uses)
