"""Shared by all tests."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the tests' networks are tiny: a second thread only waits for the first
