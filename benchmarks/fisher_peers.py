"""The sides of benchmarks/fishers.py: per-example Fishers by what people use today, each in its best way.

Every side gives, batch by batch, pieces ``(b, R, …)`` of the rows in the order of the parameters (diagonal: R = 1);
``torch.topk`` over an example's pieces then selects. BackPACK's factors are in the class basis (C rows), all others
take the same C − 1 columns as npeff.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fisher_cases import Case

Pieces = list[Tensor]
Rows = Callable[[], Pieces]


def select(pieces: Pieces, k: int) -> list[tuple[Tensor, Tensor]]:
    """The k largest |values| of every example's rows together: flat indices and values."""
    found = []
    for i in range(len(pieces[0])):
        flat = torch.cat([piece[i].flatten(1) for piece in pieces], dim=1).view(-1)
        index = torch.topk(flat.abs(), k, sorted=False).indices
        found.append((index, flat[index]))
    return found


def _columns(case: Case) -> Tensor:
    return case.columns("reduced").float()


def _squared(pieces: Pieces) -> Pieces:
    return [piece.square().sum(dim=1, keepdim=True) for piece in pieces]


def backpack_second_order(case: Case, kind: str) -> Rows:
    """BatchDiagGGNExact, or SqrtGGNExact (class basis): one backward pass of a C-column matrix."""
    from backpack import backpack, extend
    from backpack.extensions import BatchDiagGGNExact, SqrtGGNExact

    model = extend(copy.deepcopy(case.model))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    targets = torch.zeros(case.n, dtype=torch.long)
    extension, field = (
        (BatchDiagGGNExact(), "diag_ggn_exact_batch") if kind == "diagonal" else (SqrtGGNExact(), "sqrt_ggn_exact")
    )

    def rows() -> Pieces:
        with backpack(extension):
            loss(model(case.inputs), targets).backward()
        pieces = []
        for parameter in model.parameters():
            value = getattr(parameter, field)
            pieces.append(value[:, None] if kind == "diagonal" else value.transpose(0, 1))
            delattr(parameter, field)
            parameter.grad = None
        return pieces

    return rows


def backpack_first_order(case: Case, kind: str) -> Rows:
    """BatchGrad: per-example gradients, C − 1 backward passes."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model, columns = extend(copy.deepcopy(case.model)), _columns(case)

    def rows() -> Pieces:
        passes: list[Pieces] = []
        for column in range(columns.shape[2]):
            with backpack(BatchGrad()):
                model(case.inputs).backward(columns[:, :, column])
            passes.append([parameter.grad_batch for parameter in model.parameters()])
            for parameter in model.parameters():
                del parameter.grad_batch
                parameter.grad = None
        return _collected(passes, kind)

    return rows


def _collected(passes: list[Pieces], kind: str) -> Pieces:
    if kind == "diagonal":
        total = [piece.square() for piece in passes[0]]
        for later in passes[1:]:
            for sum_, piece in zip(total, later, strict=True):
                sum_.addcmul_(piece, piece)
        return [piece[:, None] for piece in total]
    return [torch.stack(group, dim=1) for group in zip(*passes, strict=True)]


def opacus_samplers(case: Case, kind: str) -> Rows:
    """GradSampleModule: per-example gradients by hooks, C − 1 backward passes of one graph each."""
    from opacus import GradSampleModule

    twin = copy.deepcopy(case.model).train()  # it refuses to record in evaluation mode
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = GradSampleModule(twin, loss_reduction="sum", strict=False)
    columns = _columns(case)

    def rows() -> Pieces:
        passes: list[Pieces] = []
        for column in range(columns.shape[2]):
            output = model(**case.inputs) if isinstance(case.inputs, dict) else model(case.inputs)
            (output.logits if isinstance(case.inputs, dict) else output).backward(columns[:, :, column])
            passes.append([parameter.grad_sample for parameter in model.parameters()])
            model.zero_grad(set_to_none=True)
            for parameter in model.parameters():
                parameter.grad_sample = None
        return _collected(passes, kind)

    return rows


def vmap_jacrev(case: Case, kind: str) -> Rows:
    """torch.func: vmap over examples of jacrev of Sᵀ·logits."""
    parameters = {name: tensor.detach() for name, tensor in case.model.named_parameters()}
    columns, model, given = _columns(case), copy.deepcopy(case.model), case.inputs
    if isinstance(given, dict):  # the library's own masks are made by looking at values, which vmap cannot
        model.set_attn_implementation("eager")
        hidden = (1 - given["attention_mask"][:, None, None, :].float()) * torch.finfo(torch.float32).min
        given = {**given, "attention_mask": hidden.expand(-1, -1, hidden.shape[3], -1).contiguous()}

    def projected(theta: dict[str, Tensor], inputs: Tensor | dict[str, Tensor], s: Tensor) -> Tensor:
        if isinstance(inputs, dict):
            batch = {name: tensor[None] for name, tensor in inputs.items()}
            logits = torch.func.functional_call(model, theta, (), batch).logits
        else:
            logits = torch.func.functional_call(model, theta, (inputs[None],))
        return s.T @ logits[0]

    def rows() -> Pieces:
        jacobians = torch.func.vmap(torch.func.jacrev(projected), in_dims=(None, 0, 0))(parameters, given, columns)
        pieces = list(jacobians.values())
        return _squared(pieces) if kind == "diagonal" else pieces

    return rows


def nngeometry_jacobian(case: Case, kind: str) -> Rows:
    """PFMapDense of Sᵀ·logits: dense rows (C − 1, b, m) by hooks, C − 1 backward passes."""
    from nngeometry.jacobian import Jacobian
    from torch.utils.data import DataLoader, TensorDataset

    assert isinstance(case.inputs, Tensor)
    columns, model = _columns(case), copy.deepcopy(case.model)
    loader = DataLoader(TensorDataset(case.inputs, columns), batch_size=case.n)

    def projected(inputs: Tensor, s: Tensor) -> Tensor:
        return torch.einsum("bc,bcr->br", model(inputs), s)

    def rows() -> Pieces:
        pieces = [Jacobian(model, loader, function=projected).to_torch().transpose(0, 1)]
        return _squared(pieces) if kind == "diagonal" else pieces

    return rows


PEERS: dict[str, Callable[[Case, str], Rows]] = {
    "BackPACK, second order": backpack_second_order,
    "BackPACK, BatchGrad": backpack_first_order,
    "opacus GradSampleModule": opacus_samplers,
    "vmap(jacrev)": vmap_jacrev,
    "nngeometry PFMapDense": nngeometry_jacobian,
}


def plain_passes(case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass, and the C − 1 batched backward passes to the parameters alone (no per-example gradient)."""
    columns = _columns(case)
    parameters = list(case.model.parameters())
    logits = case.logits()

    def passes() -> None:
        for column in range(columns.shape[2]):
            torch.autograd.grad(logits, parameters, columns[:, :, column], retain_graph=True)

    return case.logits, passes
