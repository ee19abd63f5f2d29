"""The optimiser: the one given, one that a callable makes, or SGD."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from advfeat import checks

OptimizerLike: TypeAlias = "Optimizer | Callable[[Any], Optimizer]"


def make_optimizer(
    model: nn.Module,
    optimizer: OptimizerLike | None,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Optimizer:
    """Return the optimiser given, one made by the callable given, or SGD."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(optimizer, Optimizer):
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            checks.fail(
                "optimizer",
                type(optimizer).__name__,
                "none of its parameters is the model's; was it made for a copy of the model?",
            )
        return optimizer
    if not parameters:
        checks.fail("model", type(model).__name__, "no parameter requires a gradient: all frozen?")
    if optimizer is not None:
        checks.function("optimizer", optimizer)
        made: object = optimizer(parameters)
        if not isinstance(made, Optimizer):
            raise TypeError(f"optimizer: made {type(made).__name__}; expected an Optimizer")
        return made
    checks.number("lr", lr, low=0.0, strict=True)
    checks.number("momentum", momentum, low=0.0)
    checks.number("weight_decay", weight_decay, low=0.0)
    return SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def set_mode(optimizer: Optimizer, mode: str) -> None:
    """Call ``optimizer.train()`` or ``.eval()``, which schedule-free optimisers have."""
    switch = getattr(optimizer, mode, None)
    if callable(switch):
        switch()


def has_modes(optimizer: Optimizer) -> bool:
    """Whether the weights of an optimiser differ between training and evaluation."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step`` evaluates the loss again: LBFGS, and SAM in its common form."""
    # Of the class: up to torch 2.4 a scheduler replaces the step of the instance by any arguments.
    step = inspect.signature(type(optimizer).step).parameters.get("closure")
    if step is not None and step.default is inspect.Parameter.empty:
        return True
    return all(callable(getattr(optimizer, f"{nth}_step", None)) for nth in ("first", "second"))


class OptimizerStepper:
    """Steps an optimiser, with a closure where it needs one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._needs_closure = needs_closure(optimizer)

    def step(self, loss: Callable[[], Tensor]) -> None:
        """Update the weights; ``loss`` computes it and the gradients once more."""
        if not self._needs_closure:
            try:
                self.optimizer.step()
                return
            except (TypeError, ValueError, AssertionError, RuntimeError) as error:
                if "closure" not in str(error).lower():
                    raise
                self._needs_closure = True

        def closure() -> Any:
            with torch.enable_grad():
                return loss()

        self.optimizer.step(closure)
