"""Finds the weight matrices that a layer multiplies with tokens, including those of mixture-of-experts models."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn


class Matrix(NamedTuple):
    """A weight matrix of a layer. It may stand for the same matrix in all experts.

    Attributes:
        name: Name of the module or parameter in the layer.
        inputs: Number of features of an input row.
        outputs: Number of features of an output row.
        learns: Whether the weights are trained.
        number: Number of matrices that this entry stands for.
        active: Average number of these matrices that multiply a token, such as 8 of 128 experts.
        is_expert: Whether the matrix belongs to an expert.
    """

    name: str
    inputs: int
    outputs: int
    learns: bool
    number: int = 1
    active: float = 1
    is_expert: bool = False

    @property
    def weights(self) -> int:
        """Number of weights in all ``number`` matrices."""
        return self.number * self.inputs * self.outputs


def matrices(layer: nn.Module, experts_per_token: int | None) -> Iterator[Matrix]:
    """Yields the matrices of the linear layers, the routers and the experts in a layer.

    The experts are in a submodule with the name ``experts``. This submodule is a ``ModuleList`` with a module per
    expert, or it has 3-D parameters with an expert per index of the first axis. ``experts_per_token`` is the number of
    experts that process a token. None means all experts.
    """
    lists = {name: len(each) for name, each in layer.named_modules() if _is_experts(name) and _is_list(each)}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            of_experts = next((count for prefix, count in lists.items() if name.startswith(f"{prefix}.")), None)
            shape = (name, module.in_features, module.out_features, module.weight.requires_grad)
            if of_experts is None:
                yield Matrix(*shape)
            else:
                active = min(experts_per_token or of_experts, of_experts)
                yield Matrix(*shape, active=active / of_experts, is_expert=True)
        elif _is_experts(name) and not _is_list(module):
            yield from _expert_matrices(name, module, experts_per_token)
        elif type(module).__name__.endswith("Router"):
            weight: Any = getattr(module, "weight", None)
            if getattr(weight, "ndim", 0) == 2:
                yield Matrix(name, weight.shape[1], weight.shape[0], weight.requires_grad)


def _expert_matrices(name: str, module: nn.Module, experts_per_token: int | None) -> Iterator[Matrix]:
    parameters = {key: each for key, each in module.named_parameters(recurse=False) if each.ndim == 3}
    down = parameters.get("down_proj")
    for key, parameter in parameters.items():
        count, *sizes = parameter.shape
        inputs, outputs = sizes
        if down is not None:
            # Models differ in the order of the axes; the gate and the up projection may share a parameter.
            hidden = _common_size(parameters)
            other = parameter[0].numel() // hidden
            inputs, outputs = (other, hidden) if key == "down_proj" else (hidden, other)
        active = min(experts_per_token or count, count)
        yield Matrix(f"{name}.{key}", inputs, outputs, parameter.requires_grad, count, active, is_expert=True)


def _common_size(parameters: dict[str, nn.Parameter]) -> int:
    """Returns the hidden size: the largest axis size that all matrices of an expert have in common."""
    first, *others = [set(parameter.shape[1:]) for parameter in parameters.values()]
    return max(first.intersection(*others) or first)


def _is_experts(name: str) -> bool:
    return name.rpartition(".")[2] == "experts"


def _is_list(module: Any) -> bool:
    return isinstance(module, nn.ModuleList)
