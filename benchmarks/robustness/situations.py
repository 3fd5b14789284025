"""Models and data of public bug reports: what :mod:`models` computes Fishers of.

Each situation is a function that builds a :class:`Case`; ``@situation("title")`` puts it into the table.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, normalize
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import npeff

F, C = 5, 3


@dataclass
class Case:
    """A model, its data, and how to run it on one example alone.

    Attributes:
        model: The model.
        data: As a user passes it.
        examples: One item per example, in order; empty where a refusal is all that is right.
        alone: ``alone(model, example) -> (C,)`` logits, never in a batch.
        forward: ``forward=`` of the call.
        options: Further arguments of ``compute_fishers``.
        tolerance: Largest relative error in Frobenius norm that is rounding.
        double: Whether the oracle runs in float64; otherwise in the model's own precision.
        refusal: Whether a refusal is right.
    """

    model: nn.Module
    data: Any
    examples: list[Any] = field(default_factory=list)
    alone: Callable[[nn.Module, Any], Tensor] | None = None
    forward: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-3
    double: bool = True
    refusal: bool = False


SITUATIONS: dict[str, Callable[[], Case]] = {}


def situation(title: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Put a builder into the table."""

    def put(build: Callable[[], Case]) -> Callable[[], Case]:
        SITUATIONS[title] = build
        return build

    return put


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers that are the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(model: nn.Module, *batches: Any, **rest: Any) -> Case:
    """A case whose examples are the rows of the batches' tensors."""
    examples = []
    for batch in batches:
        parts = batch if isinstance(batch, tuple) else (batch,)
        examples += [tuple(part[i : i + 1] for part in parts) for i in range(len(parts[0]))]
    data = [(batch,) if isinstance(batch, tuple) else batch for batch in batches]
    return Case(model, data, examples, lambda m, example: m(*example)[0], **rest)


class Model(nn.Module):
    """A model from its parts and a function of them."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._run = run
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Any) -> Tensor:
        """The function of the model and its inputs."""
        return self._run(self, *inputs)


def head(width: int = 6, inputs: int = F) -> dict[str, nn.Module]:
    """Two layers that most models here have."""
    return {"inner": nn.Linear(inputs, width), "outer": nn.Linear(width, C)}


# ---- which rows belong to which example ---------------------------------------------------------------------------


def _sorted_by(score: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        order = score(m, x).argsort()
        hidden = torch.tanh(m.inner(x[order]))
        return m.outer(hidden)[order.argsort()]

    return run


def _rising(x: Tensor) -> Tensor:
    return x[x[:, 0].argsort()]


@situation("sorts its batch by a column and back; first batch sorted")
def sorts() -> Case:
    return plain(Model(_sorted_by(lambda m, x: x[:, 0]), **head()), _rising(numbers(7, F)), numbers(7, F, seed=2))


@situation("sorts its batch by a column and back; no batch sorted")
def sorts_always() -> Case:
    return plain(Model(_sorted_by(lambda m, x: x[:, 0]), **head()), numbers(7, F), numbers(7, F, seed=2))


@situation("sorts by a score of its own")
def sorts_by_score() -> Case:
    return plain(
        Model(_sorted_by(lambda m, x: m.score(x)[:, 0].detach()), score=nn.Linear(F, 1), **head()),
        numbers(7, F),
        numbers(7, F, seed=2),
    )


@situation("ends and middle alike: a permutation that keeps the first and the last example")
def keeps_the_ends() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        order = torch.arange(len(x))
        order[1:-1] = order[1:-1].flip(0)
        return m.outer(torch.tanh(m.inner(x[order])))[order.argsort()]

    return plain(Model(run, **head()), numbers(7, F), numbers(7, F, seed=2))


@situation("reverses its batch and back")
def reverses() -> Case:
    return plain(
        Model(lambda m, x: m.outer(torch.tanh(m.inner(x.flip(0)))).flip(0), **head()), numbers(7, F), numbers(6, F)
    )


@situation("works on even and odd rows apart")
def even_and_odd() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        rows = torch.cat([torch.arange(0, len(x), 2), torch.arange(1, len(x), 2)])
        hidden = torch.cat([torch.tanh(m.inner(x[0::2])), torch.tanh(m.inner(x[1::2]))])
        return m.outer(hidden)[rows.argsort()]

    return plain(Model(run, **head()), numbers(8, F), numbers(7, F, seed=2))


@situation("works on its batch in two halves")
def halves() -> Case:
    return plain(
        Model(lambda m, x: torch.cat([m.outer(torch.tanh(m.inner(part))) for part in x.chunk(2)]), **head()),
        numbers(8, F),
        numbers(7, F, seed=2),
    )


def _tokens(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    x = numbers(len(lengths), max(lengths), F, seed=seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return x, mask


def _unpadded(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    rows = torch.tanh(m.inner(x[mask]))
    which = mask.nonzero()[:, 0]
    return m.outer(rows.new_zeros(len(x), rows.shape[1]).index_add(0, which, rows))


@situation("unpadded tokens of all examples in one long row")
def unpadded() -> Case:
    return plain(Model(_unpadded, **head()), _tokens([4, 2, 3, 1], 1), _tokens([1, 4, 4, 2], 2))


@situation("unpadded tokens; no padding in the first batch")
def unpadded_later() -> Case:
    return plain(Model(_unpadded, **head()), _tokens([3, 3, 3, 3], 1), _tokens([1, 4, 5, 2], 2))


@situation("unpadded tokens; as many in all as a padded batch would share out")
def unpadded_by_chance() -> Case:
    return plain(Model(_unpadded, **head()), _tokens([3, 3, 3, 3], 1), _tokens([1, 5, 2, 4], 2))


def _routed(top: int) -> Callable[..., Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        weights, experts = torch.softmax(m.router(x), 1).topk(top, 1)
        hidden = x.new_zeros(len(x), 6)
        for e, expert in enumerate((m.first, m.second)):
            rows, places = (experts == e).nonzero(as_tuple=True)
            if len(rows):
                hidden = hidden.index_add(0, rows, torch.tanh(expert(x[rows])) * weights[rows, places][:, None])
        return m.outer(hidden)

    return run


def _experts(bias: float) -> dict[str, nn.Module]:
    router = nn.Linear(F, 2)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([bias, -bias]))
    return {"router": router, "first": nn.Linear(F, 6), "second": nn.Linear(F, 6), "outer": nn.Linear(6, C)}


@situation("mixture of experts, one each")
def experts() -> Case:
    return plain(Model(_routed(1), **_experts(0.0)), numbers(8, F), numbers(8, F, seed=2))


@situation("mixture of experts, both")
def both_experts() -> Case:
    return plain(Model(_routed(2), **_experts(0.0)), numbers(8, F), numbers(8, F, seed=2))


@situation("mixture of experts; the first batch goes to one of them")
def one_expert_first() -> Case:
    model = Model(_routed(1), **_experts(0.0))
    x = numbers(40, F)
    first = torch.softmax(model.router(x), 1).argmax(1) == 0
    return plain(model, x[first][:5], numbers(8, F, seed=2))


@situation("experts with equal shares of the batch")
def equal_shares() -> Case:
    model = Model(_routed(1), **_experts(0.0))
    x = numbers(60, F)
    chosen = torch.softmax(model.router(x), 1).argmax(1)
    halves = torch.cat([x[chosen == 0][:3], x[chosen == 1][:3]])
    return plain(model, halves[torch.tensor([0, 3, 1, 4, 2, 5])], halves)


@situation("a branch that is switched off in the first batch")
def branch_off() -> Case:
    def run(m: Any, x: Tensor, on: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        side = torch.tanh(m.side(x[order]))[order.argsort()] * on
        return m.outer(torch.tanh(m.inner(x)) + side)

    parts = {**head(), "side": nn.Linear(F, 6)}
    return plain(Model(run, **parts), (numbers(6, F), torch.zeros(6, 1)), (numbers(6, F, seed=2), torch.ones(6, 1)))


@situation("a branch behind `if any(…)`")
def branch_if() -> Case:
    def run(m: Any, x: Tensor, on: Tensor) -> Tensor:
        hidden = torch.tanh(m.inner(x))
        if bool(on.any()):
            hidden = hidden + torch.tanh(m.side(x.flip(0))).flip(0) * on
        return m.outer(hidden)

    parts = {**head(), "side": nn.Linear(F, 6)}
    return plain(Model(run, **parts), (numbers(6, F), torch.zeros(6, 1)), (numbers(6, F, seed=2), torch.ones(6, 1)))


@situation("zero-initialised residual gate")
def zero_gate() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.inner(x))
        order = x[:, 0].argsort()
        return m.outer(hidden + m.gate * torch.tanh(m.side(hidden[order]))[order.argsort()])

    return plain(Model(run, gate=torch.zeros(1), side=nn.Linear(6, 6), **head()), numbers(6, F), numbers(5, F, seed=2))


@situation("looks duplicates up once (torch.unique)")
def deduplicates() -> Case:
    def run(m: Any, ids: Tensor) -> Tensor:
        distinct, places = torch.unique(ids, return_inverse=True)
        return m.outer(torch.tanh(m.inner(m.table(distinct)))[places].mean(1))

    ids = torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(1))
    return plain(Model(run, table=nn.Embedding(9, F), **head()), ids, ids.flip(0) // 2)


@situation("an input changed in place")
def in_place() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return m.outer(torch.tanh(m.inner(x)))

    case = plain(Model(run, **head()), numbers(6, F), numbers(6, F, seed=2))
    case.examples = [(x.clone(),) for (x,) in case.examples]
    case.alone = lambda m, example: m(example[0].clone())[0]
    return case


@situation("inputs filled in place through a mask")
def masked_in_place() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x[x < 0] = 0
        return m.outer(torch.tanh(m.inner(x)))

    case = plain(Model(run, **head()), numbers(6, F), numbers(6, F, seed=2))
    case.examples = [(x.clone(),) for (x,) in case.examples]
    case.alone = lambda m, example: m(example[0].clone())[0]
    return case


# ---- parameters and how they are used -----------------------------------------------------------------------------


@situation("logit_scale of no dimension (CLIP)")
def logit_scale() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        image, text = normalize(m.image(x), dim=1), normalize(m.text, dim=1)
        return m.logit_scale.exp() * image @ text.T

    model = Model(run, image=nn.Linear(F, 4), text=numbers(C, 4), logit_scale=torch.tensor(2.6593))
    return plain(model, numbers(6, F), numbers(5, F, seed=2))


@situation("temperature of no dimension, divided by")
def temperature() -> Case:
    model = Model(lambda m, x: m.outer(torch.tanh(m.inner(x))) / m.tau, tau=torch.tensor(0.7), **head())
    return plain(model, numbers(6, F), numbers(5, F, seed=2))


@situation("weight_norm of torch.nn.utils")
def weight_norm() -> Case:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [nn.utils.weight_norm(nn.Linear(F, 6)), nn.Tanh(), nn.utils.weight_norm(nn.Linear(6, C))]
    return plain(nn.Sequential(*parts), numbers(6, F), numbers(5, F, seed=2))


@situation("weight_norm of parametrizations")
def weight_norm_now() -> Case:
    made = nn.utils.parametrizations.weight_norm
    return plain(nn.Sequential(made(nn.Linear(F, 6)), nn.Tanh(), made(nn.Linear(6, C))), numbers(6, F), numbers(5, F))


@situation("weight_norm of convolutions")
def weight_norm_convolution() -> Case:
    made = nn.utils.parametrizations.weight_norm
    body = nn.Sequential(made(nn.Conv1d(2, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(24, C))
    return plain(body, numbers(5, 2, 8), numbers(4, 2, 8, seed=2))


@situation("spectral_norm in evaluation")
def spectral_norm() -> Case:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(F, 6))
    return plain(nn.Sequential(layer, nn.Tanh(), nn.Linear(6, C)).eval(), numbers(6, F), numbers(5, F, seed=2))


@situation("a sliced convolution kernel")
def sliced_kernel() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.outer(torch.relu(conv2d(x, m.kernel[:, :2, :2, :2])).flatten(1))

    model = Model(run, kernel=numbers(3, 4, 3, 3), outer=nn.Linear(48, C))
    return plain(model, numbers(5, 2, 5, 5), numbers(4, 2, 5, 5, seed=2))


@situation("a transposed convolution kernel")
def transposed_kernel() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.outer(torch.relu(conv2d(x, m.kernel.transpose(0, 1))).flatten(1))

    model = Model(run, kernel=numbers(2, 3, 3, 3), outer=nn.Linear(27, C))
    return plain(model, numbers(5, 2, 5, 5), numbers(4, 2, 5, 5, seed=2))


@situation("a flipped convolution kernel")
def flipped_kernel() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.outer(torch.relu(conv1d(x, m.kernel.flip(2))).flatten(1))

    return plain(Model(run, kernel=numbers(3, 2, 3), outer=nn.Linear(18, C)), numbers(5, 2, 8), numbers(4, 2, 8))


@situation("standardised convolution kernels")
def standardised() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        kernel = (m.kernel - m.kernel.mean((1, 2), keepdim=True)) / m.kernel.std((1, 2), keepdim=True)
        return m.outer(torch.relu(conv1d(x, kernel)).flatten(1))

    return plain(Model(run, kernel=numbers(3, 2, 3), outer=nn.Linear(18, C)), numbers(5, 2, 8), numbers(4, 2, 8))


@situation("one kernel for two convolutions")
def shared_kernel() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.outer(conv1d(torch.relu(conv1d(x, m.kernel, padding=1)), m.kernel, padding=1).flatten(1))

    return plain(Model(run, kernel=numbers(2, 2, 3), outer=nn.Linear(16, C)), numbers(5, 2, 8), numbers(4, 2, 8))


@situation("a parameter used through exp")
def through_exp() -> Case:
    model = Model(lambda m, x: m.outer(torch.tanh(m.inner(x)) * m.log_scale.exp()), log_scale=numbers(6), **head())
    return plain(model, numbers(6, F), numbers(5, F, seed=2))


@situation("a parameter used through exp, tiny")
def through_exp_tiny() -> Case:
    parts = {"log_scale": numbers(6) - 25, **head()}
    return plain(Model(lambda m, x: m.outer(torch.tanh(m.inner(x)) * m.log_scale.exp()), **parts), numbers(6, F))


@situation("low-rank update of a frozen weight (LoRA)")
def lora() -> Case:
    frozen = numbers(6, F)
    model = Model(
        lambda m, x: m.outer(torch.tanh(x @ (frozen.to(x) + m.up @ m.down).T)),
        up=torch.zeros(6, 2), down=numbers(2, F, seed=3), outer=nn.Linear(6, C),
    )  # fmt: skip
    return plain(model, numbers(6, F), numbers(5, F, seed=2))


@situation("tied input and output embeddings")
def tied() -> Case:
    model = Model(lambda m, ids: m.table(ids).mean(1) @ m.table.weight[:C].T, table=nn.Embedding(9, F))
    ids = torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(1))
    return plain(model, ids, ids.flip(0))


@situation("embedding with a padding index")
def padding_index() -> Case:
    model = Model(
        lambda m, ids: m.outer(m.table(ids).mean(1)), table=nn.Embedding(9, 6, padding_idx=0), outer=nn.Linear(6, C)
    )
    ids = torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(1))
    return plain(model, ids, ids // 3)


@situation("cosine head (normalised weights)")
def cosine() -> Case:
    model = Model(lambda m, x: 4 * normalize(torch.tanh(m.inner(x)), dim=1) @ normalize(m.centres, dim=1).T,
                  inner=nn.Linear(F, 6), centres=numbers(C, 6))  # fmt: skip
    return plain(model, numbers(6, F), numbers(5, F, seed=2))


@situation("weights in einsum")
def einsum() -> Case:
    model = Model(
        lambda m, x: m.outer(torch.tanh(torch.einsum("bi,oi->bo", x, m.weight))),
        weight=numbers(6, F),
        outer=nn.Linear(6, C),
    )
    return plain(model, numbers(6, F), numbers(5, F, seed=2))


@situation("a layer used twice")
def twice() -> Case:
    model = Model(
        lambda m, x: m.outer(torch.tanh(m.same(torch.tanh(m.same(x))))), same=nn.Linear(F, F), outer=nn.Linear(F, C)
    )
    return plain(model, numbers(6, F), numbers(5, F, seed=2))


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


@situation("an autograd.Function of its own")
def own_function() -> Case:
    return plain(Model(lambda m, x: m.outer(_Cube.apply(m.inner(x))), **head()), numbers(6, F), numbers(5, F, seed=2))


@situation("grouped and depthwise convolutions")
def depthwise() -> Case:
    body = [nn.Conv1d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv1d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(30, C)]
    return plain(nn.Sequential(*body), numbers(5, 4, 8), numbers(4, 4, 8, seed=2))


@situation("a parameter that nothing uses, and one that is frozen")
def unused() -> Case:
    model = Model(lambda m, x: m.outer(torch.tanh(m.inner(x))), idle=numbers(4), **head())
    model.inner.weight.requires_grad_(False)
    return plain(model, numbers(6, F), numbers(5, F, seed=2))


# ---- attention ----------------------------------------------------------------------------------------------------


def _encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@situation("TransformerEncoder with padding, mean over all positions")
def padded_encoder() -> Case:
    model = Model(
        lambda m, x, mask: m.outer(m.body(x, src_key_padding_mask=~mask).mean(1)),
        body=_encoder(),
        outer=nn.Linear(8, C),
    ).eval()
    batches = []
    for seed, lengths in ((1, [5, 3, 4]), (2, [2, 5, 5])):
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        batches.append((numbers(3, 5, 8, seed=seed), mask))
    return plain(model, *batches)


@situation("TransformerEncoder, batch second")
def batch_second() -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    model = Model(
        lambda m, x: m.outer(m.body(x.transpose(0, 1))[-1]), body=nn.TransformerEncoder(layer, 1), outer=nn.Linear(8, C)
    ).eval()
    return plain(model, numbers(4, 5, 8), numbers(3, 5, 8, seed=2))


@situation("MultiheadAttention: key biases, whose gradient is zero")
def key_biases() -> Case:
    model = Model(
        lambda m, x: m.outer(m.body(x, x, x, need_weights=False)[0].mean(1)),
        body=nn.MultiheadAttention(8, 2, batch_first=True),
        outer=nn.Linear(8, C),
    )
    return plain(model.eval(), numbers(4, 5, 8), numbers(3, 5, 8, seed=2))


@situation("key biases of their own")
def own_key_biases() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(m.query(x), m.key(x), m.value(x))
        return m.outer(attended.mean(1))

    parts = {name: nn.Linear(8, 8) for name in ("query", "key", "value")}
    return plain(Model(run, **parts, outer=nn.Linear(8, C)), numbers(4, 5, 8), numbers(3, 5, 8, seed=2))


@situation("key biases in float64")
def double_key_biases() -> Case:
    case = own_key_biases()
    case.model.double()
    case.data = [batch.double() for batch in case.data]
    case.examples = [tuple(part.double() for part in example) for example in case.examples]
    return case


@situation("a small BERT of transformers")
def bert() -> Case:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, num_labels=C, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(1, 20, (5, 6), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(6) < torch.tensor([6, 3, 4, 6, 2])[:, None]).long()
    data = [{"input_ids": ids[k], "attention_mask": mask[k], "labels": torch.zeros(len(ids[k]), dtype=torch.long)}
            for k in (slice(0, 3), slice(3, 5))]  # fmt: skip
    examples = [{"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(5)]
    return Case(model, data, examples, lambda m, example: m(**example).logits[0])


@situation("a small CLIP of transformers, texts fixed")
def clip() -> Case:
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 8,
                     "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1},
        vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=6,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    texts = torch.tensor([[0, 5, 6, 2], [0, 7, 8, 2], [0, 9, 4, 2]])
    images = numbers(4, 3, 8, 8)

    def forward(m: nn.Module, pixels: Tensor) -> Tensor:
        return m(input_ids=texts, pixel_values=pixels).logits_per_image

    return Case(
        model, [images[:2], images[2:]], [images[i : i + 1] for i in range(4)], lambda m, x: forward(m, x)[0], forward
    )


# ---- precision and batch size -------------------------------------------------------------------------------------


@situation("batches of one example")
def single() -> Case:
    return plain(Model(lambda m, x: m.outer(torch.tanh(m.inner(x))), **head()), *numbers(5, F).split(1))


@situation("batches of one example, sorted inside")
def single_sorted() -> Case:
    return plain(Model(_sorted_by(lambda m, x: x[:, 0]), **head()), *numbers(5, F).split(1))


@situation("float64")
def double() -> Case:
    model = Model(lambda m, x: m.outer(torch.tanh(m.inner(x))), **head()).double()
    return plain(model, numbers(6, F).double(), numbers(5, F).double(), tolerance=1e-6)


def _autocast(dtype: torch.dtype) -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return m.outer(torch.tanh(m.inner(x))).float()

    case = plain(Model(run, **head(32)), numbers(6, F), numbers(5, F, seed=2))
    case.double, case.tolerance = False, 0.1
    return case


@situation("autocast to bfloat16 inside forward")
def autocast_bfloat16() -> Case:
    return _autocast(torch.bfloat16)


@situation("autocast to float16 inside forward")
def autocast_float16() -> Case:
    return _autocast(torch.float16)


@situation("a model in bfloat16")
def bfloat16() -> Case:
    model = Model(lambda m, x: m.outer(torch.tanh(m.inner(x))), **head(32)).bfloat16()
    case = plain(model, numbers(6, F).bfloat16(), numbers(5, F, seed=2).bfloat16())
    case.double, case.tolerance = False, 0.1
    return case


# ---- data of other forms ------------------------------------------------------------------------------------------


def _graphs(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
    return m.outer(torch.tanh(adjacency @ m.inner(x)).mean(1))


def _square(n: int) -> tuple[nn.Module, Tensor, Tensor, list[Any]]:
    x, adjacency = numbers(n, 6, F), numbers(6, 6, seed=2)
    return Model(_graphs, **head()), x, adjacency, [(x[i : i + 1], adjacency) for i in range(n)]


@situation("a shared square matrix, as long as the batch")
def square() -> Case:
    model, x, adjacency, examples = _square(6)
    return Case(model, [((x, adjacency),)], examples, lambda m, e: m(*e)[0], refusal=True)


@situation("the same as npeff.Batch")
def square_batch() -> Case:
    model, x, adjacency, examples = _square(6)
    data = [npeff.Batch(((x, adjacency),), 6, lambda c, i: ((c[0][0][i], c[0][1]),))]
    return Case(model, data, examples, lambda m, e: m(*e)[0])


@situation("a shared square matrix, as long as the last batch")
def square_last() -> Case:
    model, x, adjacency, examples = _square(11)
    data = [((x[:5], adjacency),), ((x[5:], adjacency),)]
    return Case(model, data, examples, lambda m, e: m(*e)[0], options={"memory": 2_000})


def _bags() -> tuple[nn.Module, Any, list[Any], Callable[..., Any]]:
    model = Model(
        lambda m, tokens, offsets: m.outer(m.bag(tokens, offsets)), bag=nn.EmbeddingBag(10, F), outer=nn.Linear(F, C)
    )
    tokens, offsets = (
        torch.randint(0, 10, (12,), generator=torch.Generator().manual_seed(1)),
        torch.tensor([0, 3, 4, 9]),
    )

    def take(content: Any, positions: list[int]) -> Any:
        ((tokens, offsets),) = content
        ends = [*offsets.tolist()[1:], len(tokens)]
        parts = [tokens[offsets[i] : ends[i]] for i in positions]
        return ((torch.cat(parts), torch.tensor([0, *(len(part) for part in parts[:-1])]).cumsum(0)),)

    content = ((tokens, offsets),)
    return model, content, [take(content, [i])[0] for i in range(4)], take


@situation("EmbeddingBag with offsets")
def offsets() -> Case:
    model, content, examples, _ = _bags()
    return Case(model, [(content[0], torch.zeros(4, dtype=torch.long))], examples, lambda m, e: m(*e)[0], refusal=True)


@situation("EmbeddingBag with offsets as npeff.Batch")
def offsets_batch() -> Case:
    model, content, examples, take = _bags()
    return Case(model, [npeff.Batch(content, 4, take)], examples, lambda m, e: m(*e)[0])


@situation("lengths in a list, packed for an LSTM")
def lengths() -> Case:
    def run(m: Any, x: Tensor, lengths: Any) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return m.outer(m.body(packed)[1][0][-1])

    model, x, sizes = (
        Model(run, body=nn.LSTM(F, 4, batch_first=True), outer=nn.Linear(4, C)),
        numbers(4, 5, F),
        [5, 2, 3, 4],
    )
    examples = [(x[i : i + 1], sizes[i : i + 1]) for i in range(4)]
    return Case(model, [((x, sizes), torch.zeros(4, dtype=torch.long))], examples, lambda m, e: m(*e)[0])


@situation("GRU")
def gru() -> Case:
    model = Model(lambda m, x: m.outer(m.body(x)[0][:, -1]), body=nn.GRU(F, 4, batch_first=True), outer=nn.Linear(4, C))
    return plain(model, numbers(4, 5, F), numbers(3, 6, F, seed=2))


@situation("time-first sequences")
def time_first() -> Case:
    model = Model(lambda m, x: m.outer(m.body(x)[0][-1]), body=nn.LSTM(F, 4), outer=nn.Linear(4, C))
    x = numbers(7, 4, F)
    examples = [(x[:, i : i + 1],) for i in range(4)]
    return Case(model, [(x, torch.zeros(4, dtype=torch.long))], examples, lambda m, e: m(*e)[0], refusal=True)


@situation("time-first sequences as npeff.Batch")
def time_first_batch() -> Case:
    case = time_first()
    case.data = [npeff.Batch(case.data[0], take=lambda c, i: (c[0][:, i], c[1][i]))]
    case.refusal = False
    return case


def _each(m: Any, parts: Any) -> Tensor:
    parts = parts.unbind() if isinstance(parts, Tensor) else parts
    return m.outer(torch.stack([torch.tanh(m.inner(part)).mean(0) for part in parts]))


RAGGED = (3, 5, 2, 7)


def _ragged() -> list[Tensor]:
    return [numbers(n, F, seed=n) for n in RAGGED]


@situation("a ragged list")
def ragged() -> Case:
    parts = _ragged()
    return Case(Model(_each, **head()), [parts], parts, lambda m, e: m([e])[0], lambda m, b: m(b), refusal=True)


@situation("a ragged list as npeff.Batch")
def ragged_batch() -> Case:
    parts = _ragged()
    data = [npeff.Batch(parts, 4, lambda c, i: [c[k] for k in i])]
    return Case(Model(_each, **head()), data, parts, lambda m, e: m([e])[0], lambda m, b: m(b))


@situation("a jagged nested tensor")
def jagged() -> Case:
    parts = _ragged()
    data = [torch.nested.nested_tensor(parts, layout=torch.jagged)]
    return Case(Model(_each, **head()), data, parts, lambda m, e: m([e])[0])


@situation("a strided nested tensor")
def strided() -> Case:
    import warnings

    parts = _ragged()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = [torch.nested.nested_tensor(parts)]
    return Case(Model(_each, **head()), data, parts, lambda m, e: m([e])[0])


@dataclass
class Graphs:
    """As graph libraries have it: nodes of all graphs together, and the graph of each."""

    x: Tensor
    graph: Tensor


def _pooled(m: Any, batch: Graphs) -> Tensor:
    hidden = torch.tanh(m.inner(batch.x))
    n = int(batch.graph.max()) + 1
    return m.outer(hidden.new_zeros(n, hidden.shape[1]).index_add(0, batch.graph, hidden))


def _graph_batch() -> tuple[Graphs, list[Tensor], Callable[..., Graphs]]:
    batch = Graphs(numbers(9, F), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]))

    def take(content: Graphs, positions: list[int]) -> Graphs:
        parts = [content.x[content.graph == i] for i in positions]
        return Graphs(torch.cat(parts), torch.cat([torch.full((len(p),), k) for k, p in enumerate(parts)]))

    return batch, [batch.x[batch.graph == i] for i in range(3)], take


def _one_graph(m: nn.Module, x: Tensor) -> Tensor:
    return m(Graphs(x, torch.zeros(len(x), dtype=torch.long)))[0]


@situation("a dataclass of graphs")
def graphs() -> Case:
    batch, examples, _ = _graph_batch()
    return Case(Model(_pooled, **head()), [batch], examples, _one_graph, lambda m, b: m(b), refusal=True)


@situation("a dataclass of graphs as npeff.Batch")
def graphs_batch() -> Case:
    batch, examples, take = _graph_batch()
    return Case(Model(_pooled, **head()), [npeff.Batch(batch, 3, take)], examples, _one_graph)


@situation("nodes of one graph as npeff.Batch")
def nodes() -> Case:
    x, adjacency = numbers(7, F), torch.softmax(numbers(7, 7, seed=2), 1)
    model = Model(lambda m, x, a: m.outer(a @ torch.tanh(a @ m.inner(x))), **head())
    content = {"x": x, "adjacency": adjacency, "nodes": torch.arange(7)}
    data = [npeff.Batch(content, 7, lambda c, i: {**c, "nodes": c["nodes"][i]})]

    def alone(m: nn.Module, node: Tensor) -> Tensor:
        dtype = m.outer.weight.dtype
        return m(x.to(dtype), adjacency.to(dtype))[node]

    return Case(model, data, list(torch.arange(7)), alone, lambda m, c: m(c["x"], c["adjacency"])[c["nodes"]])


@situation("a mapping of its own class (BatchEncoding)")
def encoding() -> Case:
    class Encoding(UserDict[str, Any]):
        def __init__(self, data: Any = None, encodings: Any = None) -> None:
            super().__init__(data or {})
            self.encodings = encodings

    def forward(m: nn.Module, batch: Encoding) -> Tensor:
        assert batch.encodings == ["a"]
        return m(batch["x"])

    x = numbers(5, F)
    model = Model(lambda m, x: m.outer(torch.tanh(m.inner(x))), **head())
    return Case(model, [Encoding({"x": x}, ["a"])], [x[i : i + 1] for i in range(5)], lambda m, e: m(e)[0], forward)


@situation("texts beside the tensors")
def texts() -> Case:
    x = numbers(5, F)
    model = Model(lambda m, x: m.outer(torch.tanh(m.inner(x))), **head())
    data = [{"x": x, "texts": list("abcde")}]
    return Case(
        model, data, [x[i : i + 1] for i in range(5)], lambda m, e: m(e)[0], lambda m, b: m(b["x"][: len(b["texts"])])
    )


# ---- what has to be said ------------------------------------------------------------------------------------------


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(F, 6), nn.Tanh(), nn.Linear(6, C))


@situation("lazy parameters")
def lazy() -> Case:
    return Case(nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(C)), [numbers(4, F)], refusal=True)


@situation("a complex parameter beside real ones")
def complex_parameter() -> Case:
    weight = torch.complex(numbers(F, C), numbers(F, C, seed=2))
    model = Model(
        lambda m, x: m.outer(torch.tanh(m.inner(x))) + (x.to(m.weight.dtype) @ m.weight).real, weight=weight, **head()
    )
    case = plain(model, numbers(5, F), numbers(4, F))
    case.double = False
    return case


@situation("quantised modules")
def quantised() -> Case:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LayerNorm(F), _mlp()), {nn.Linear})
    return Case(model, [numbers(4, F)], refusal=True)


@situation("a model that ends in a softmax")
def softmax() -> Case:
    return Case(nn.Sequential(*_mlp(), nn.Softmax(1)), [numbers(5, F)], refusal=True)


@situation("a softmax, likelihood='probabilities'")
def probabilities() -> Case:
    case = plain(nn.Sequential(*_mlp(), nn.Softmax(1)), numbers(5, F), numbers(4, F, seed=2))
    case.alone, case.options = lambda m, example: m(*example)[0].log(), {"likelihood": "probabilities"}
    return case


@situation("a model that ends in a log-softmax")
def log_softmax() -> Case:
    return plain(nn.Sequential(*_mlp(), nn.LogSoftmax(1)), numbers(5, F), numbers(4, F, seed=2))


SET = TensorDataset(numbers(12, F), torch.arange(12) % C)


@situation("a DataLoader that shuffles")
def shuffles() -> Case:
    return Case(_mlp(), DataLoader(SET, 4, shuffle=True), refusal=True)


@situation("a batch sampler that shuffles")
def batch_sampler() -> Case:
    return Case(_mlp(), DataLoader(SET, batch_sampler=BatchSampler(RandomSampler(SET), 4, False)), refusal=True)


class _Hidden:
    def __iter__(self) -> Iterator[Any]:
        for places in torch.randperm(12).split(4):
            yield SET[places]


@situation("data that shuffles unseen")
def hidden_shuffle() -> Case:
    return Case(_mlp(), _Hidden(), refusal=True)


class _Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        yield from (SET[i] for i in range(12))


@situation("an IterableDataset whose workers repeat it")
def repeats() -> Case:
    return Case(_mlp(), DataLoader(_Stream(), 4, num_workers=2), refusal=True)


@situation("batch normalisation in training")
def batch_norm() -> Case:
    return Case(nn.Sequential(nn.Linear(F, 6), nn.BatchNorm1d(6), nn.Linear(6, C)), [numbers(5, F)], refusal=True)


@situation("batch normalisation in evaluation")
def batch_norm_eval() -> Case:
    model = nn.Sequential(nn.Linear(F, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, C)).eval()
    return plain(model, numbers(5, F), numbers(4, F, seed=2))


@situation("active dropout")
def dropout() -> Case:
    return Case(nn.Sequential(nn.Linear(F, 6), nn.Dropout(0.5), nn.Linear(6, C)), [numbers(5, F)], refusal=True)


@situation("noise in forward")
def noise() -> Case:
    return Case(
        Model(lambda m, x: m.outer(torch.tanh(m.inner(x + torch.randn_like(x)))), **head()),
        [numbers(5, F)],
        refusal=True,
    )


@situation("a batch mean that is subtracted")
def batch_mean() -> Case:
    return Case(
        Model(lambda m, x: m.outer(torch.tanh(m.inner(x - x.mean(0)))), **head()), [numbers(5, F)], refusal=True
    )


@situation("reentrant checkpoints")
def reentrant() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.outer(torch.utils.checkpoint.checkpoint(m.inner, x.requires_grad_(), use_reentrant=True))

    import torch.utils.checkpoint

    return Case(Model(run, **head()), [numbers(5, F)], refusal=True)


@situation("checkpoints that are not reentrant")
def checkpoints() -> Case:
    import torch.utils.checkpoint

    def run(m: Any, x: Tensor) -> Tensor:
        return m.outer(torch.tanh(torch.utils.checkpoint.checkpoint(m.inner, x, use_reentrant=False)))

    return plain(Model(run, **head()), numbers(5, F), numbers(4, F, seed=2))


@situation("3 000 classes, energy=0.9, 64 MB")
def many_classes() -> Case:
    model = nn.Linear(2, 3000)
    with torch.no_grad():
        model.weight.mul_(6)
    case = plain(model, numbers(3, 2))
    case.options = {"energy": 0.9, "memory": "64MB", "parameters": "bias"}
    case.tolerance = 0.1  # what the energy leaves out
    return case
