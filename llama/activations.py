"""`hidden_act`: the reference's activation functions as PyTorch modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Activation(nn.Module):
    """A tensor function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _gelu_10(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x).clip(-10, 10)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _laplace(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5)))


def _sqrtsoftplus(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x).sqrt()


def _gelu_tanh() -> nn.Module:
    return nn.GELU(approximate="tanh")


# Same names as `reference.ACTIVATIONS`, which has the formulas; a test compares the two.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_python": nn.GELU,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_10": lambda: Activation(_gelu_10),
    "quick_gelu": lambda: Activation(_quick_gelu),
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu2": lambda: Activation(_relu2),
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "hardswish": nn.Hardswish,
    "laplace": lambda: Activation(_laplace),
    "sqrtsoftplus": lambda: Activation(_sqrtsoftplus),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "linear": nn.Identity,
}


def activation(name: Any) -> nn.Module:
    """The module for `hidden_act`: one of the names above, or a function of a tensor."""
    if isinstance(name, nn.Module):
        return name
    return Activation(name) if callable(name) else ACTIVATIONS[name]()
