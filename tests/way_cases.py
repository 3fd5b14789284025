"""A model, its data and short options, for the way from command to command."""

SOURCE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).double().float()
    return net.eval()

def data():
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
    return [(x[i : i + 12], (x[i : i + 12, 0] > 0).long()) for i in range(0, 48, 12)]

def train():
    return data()[:2]

def forward(model, batch):
    return model(batch[0])
"""
MODEL, DATA = "net.py:model", "net.py:data"
SEARCH = ["--n-init", "1", "--n-replacements", "0", "--max-iterations", "40", "--quiet"]
FREEZE = ["--smooth", "freeze"]
FEW = ["--n-random", "1", "--top", "12", "--quiet"]
