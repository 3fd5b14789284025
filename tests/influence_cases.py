"""Models and losses for tests of influence."""

from functools import cache

import torch
from torch import nn

from npeff.companions.influence import (
    CrossLossInfluence,
    cross_entropy,
)
from retraining import minimise

N, D = 30, 4


def batches(*tensors, size=7):
    return [tuple(t[i : i + size] for t in tensors) for i in range(0, len(tensors[0]), size)]


def flat_gradient(value, model):
    parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, create_graph=True)
    return torch.cat([part.reshape(-1) for part in parts])


@cache
def regression_case():
    """Least squares at its optimum: everything about it is known in closed form."""
    torch.manual_seed(0)
    x = torch.randn(N, D, dtype=torch.float64)
    y = x @ torch.randn(D, 1, dtype=torch.float64) + 0.3 * torch.randn(N, 1, dtype=torch.float64)
    model = nn.Linear(D, 1, bias=False).double()
    theta = torch.linalg.lstsq(x, y).solution
    model.weight.data.copy_(theta.T)
    tx, ty = torch.randn(5, D, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    return model, x, y, tx, ty


@cache
def classifier_case():
    """A small network with convolution, bias and no bias, trained to its optimum with weight decay."""
    torch.manual_seed(1)
    x = torch.randn(40, 1, 4, 4, dtype=torch.float64)
    y = (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 0.5).long()
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)
    )
    model = model.double()
    data = batches(x, y, size=16)
    found = minimise(model, cross_entropy, [(x, y)], weight_decay=1e-2, tolerance=1e-10)
    assert found.gradient_norm < 1e-8
    tx = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    return model, data, batches(tx, (tx.mean((1, 2, 3)) > 0).long(), size=4), x, y


def margin(model, batch):
    """Another loss than the one that is trained."""
    outputs = model(batch[0])
    return outputs[:, 0] - outputs.square().sum(1) / 5


def estimator(model, train_loss=cross_entropy, test_loss=margin, **options):
    return CrossLossInfluence(model, train_loss, test_loss, progress=False, **{"weight_decay": 1e-2, **options})
