"""What a step of training changes: the weights, the optimiser, the average of the weights."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from advfeat import checks
from advfeat.model import Trainee, buffers_kept
from advfeat.training._batches import TrainBatch
from advfeat.training._checkpoint import State
from advfeat.training._method import Example, TrainingMethod
from advfeat.training._optimizer import OptimizerStepper, has_modes, set_mode
from advfeat.training._plan import Plan, as_called
from advfeat.training._totals import StepResult
from advfeat.training._weights import Average, perturbed

_NO_GRADIENT = (
    "model: the loss has no gradient by the weights: detached or computed under torch.no_grad in "
    "forward or in loss=, or the logits are another part of the output: pass output="
)


class Learner:
    """Updates the weights of a model from batches, by a method of training."""

    def __init__(self, plan: Plan, method: TrainingMethod, trainee: Trainee) -> None:
        self._module, self._optimizer, self._device = plan.module, plan.optimizer, plan.device
        self._options, self._process = plan.settings.options, plan.process
        self._method = method
        self.trainee = trainee
        self._stepper = OptimizerStepper(plan.optimizer)
        self._parameters: list[nn.Parameter] = [
            p for group in plan.optimizer.param_groups for p in group["params"]
        ]
        self._all_parameters = list(plan.module.parameters())
        options = self._options
        self.average: Average | None = None
        if options.ema:
            settings = plan.settings
            self.average = Average(
                plan.module, options.ema, settings.precision, partial(as_called, settings)
            )
        weights = options.class_weights
        self._class_weights = (
            None if weights is None else torch.as_tensor(weights).to(self._device, torch.float32)
        )
        self._called: Any = trainee
        if self._process.world_size > 1:
            devices = [self._device] if self._device.type == "cuda" else None
            self._called = DistributedDataParallel(trainee, device_ids=devices)

    @property
    def result_module(self) -> nn.Module:
        """The model that is measured, saved as ``model``, and left at the end."""
        return self._module if self.average is None else self.average.module

    def check_classes(self, classes: int) -> None:
        """Check that there is a weight for each class."""
        weights = self._class_weights
        if weights is not None and len(weights) != classes:
            checks.fail("class_weights", len(weights), f"the model has {classes} classes")

    def update(self, batch: TrainBatch, step: int, largest: int) -> StepResult:
        """Update the weights from a batch; ``largest`` is the size of the epoch's largest."""
        options = self._options
        for _ in range(self._method.updates_per_batch):
            examples = [
                self._method.example(self.trainee.module, part, step)
                for part in batch.parts(options.accumulate, largest)
            ]
            scale = self._scale(examples, batch)
            if options.awp:
                with buffers_kept(self._module):
                    result = self._backward(examples, scale)
                with perturbed(self._parameters, options.awp):
                    self._backward(examples, scale)
            else:
                result = self._backward(examples, scale)
            self._clip()
            self._stepper.step(lambda: self._loss_again(examples, scale))  # noqa: B023
            self.forget_gradients()
            if self.average is not None:
                seen = [(example.inputs, example.extras) for example in examples]
                self.average.update(self._module, step, seen)
        return result.without_idle() if batch.idle else result

    def _backward(self, examples: list[Example], scale: float | Tensor) -> StepResult:
        """Compute the gradient of the mean loss of a batch, its examples one after another."""
        self.forget_gradients()
        result: StepResult | None = None
        for example in examples:
            with self._synchronised(example is examples[-1]):
                logits = self._called(*example.inputs, **example.extras)
                losses = self._method.losses(logits, example)
                weights = self._weights(example)
                if weights is not None:
                    losses = losses * weights
                total = losses.sum()
                if not total.requires_grad:
                    raise ValueError(_NO_GRADIENT)
                (total * scale).backward()  # type: ignore[no-untyped-call]
            self._method.after_backward(example)
            hits = logits[-1].detach().argmax(1) == example.labels
            own = StepResult(
                total.detach(),
                hits.sum(),
                len(losses),
                None if weights is None else weights.sum(),
            )
            result = own if result is None else result.plus(own)
        assert result is not None
        return result

    def _weights(self, example: Example) -> Tensor | None:
        weights = example.weights
        if self._class_weights is not None:
            of_class = (
                example.targets.to(self._class_weights.dtype) @ self._class_weights
                if example.targets.is_floating_point()
                else self._class_weights[example.labels]
            )
            weights = of_class if weights is None else weights * of_class
        return weights

    def _scale(self, examples: list[Example], batch: TrainBatch) -> float | Tensor:
        """What the sum of losses is multiplied by, to be the mean over the batch of all ranks."""
        # DDP takes the mean over ranks, which may have unequal parts of the batch.
        ranks = self._process.world_size
        weights = [self._weights(example) for example in examples]
        own = [w.sum() for w in weights if w is not None]
        if not own:
            return 0.0 if batch.idle else ranks / batch.total
        total = torch.stack(own).sum() * (0.0 if batch.idle else 1.0)
        total = self._process.all_reduce_sum(total).clamp_min(torch.finfo(total.dtype).tiny)
        return 0.0 * total if batch.idle else ranks / total

    def _loss_again(self, examples: list[Example], scale: float | Tensor) -> Tensor:
        """Compute loss and gradients once more, for an optimiser that asks for them."""
        result = self._backward(examples, scale)
        self._clip()
        ranks = self._process.world_size
        return self._process.all_reduce_sum(result.loss * scale) / ranks

    def _clip(self) -> None:
        if self._options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._options.clip_norm)

    def forget_gradients(self) -> None:
        """Drop all gradients of the model: an optimiser may have only some of its parameters.

        Several times a step, so without torch's ``zero_grad``, which goes through all modules.
        """
        if type(self._optimizer).zero_grad is not Optimizer.zero_grad:
            self._optimizer.zero_grad()
        for parameter in self._all_parameters:
            parameter.grad = None
        for group in self._optimizer.param_groups:  # which a callback may add to
            for parameter in group["params"]:
                parameter.grad = None

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        if isinstance(self._called, DistributedDataParallel) and not last:
            found: AbstractContextManager[None] = self._called.no_sync()
            return found
        return nullcontext()

    # --- State ---

    def set_mode(self, mode: str) -> None:
        """Put an optimiser that has modes in ``"train"`` or ``"eval"`` mode."""
        set_mode(self._optimizer, mode)

    def snapshot(self) -> State:
        """Return what steps change, apart from the rate; the tensors are not copied."""
        optimizer = self._optimizer.state_dict()
        state = {
            "raw": full_state(self._module),
            "optimizer": {k: v for k, v in optimizer.items() if k != "param_groups"},
        }
        if self.average is not None:
            state["average"] = full_state(self.average.module)
        return state

    def restore(self, state: State, groups: Any = None) -> None:
        """Go back to a snapshot; with other groups of parameters, where given."""
        load_full_state(self._module, state["raw"])
        if groups is None:
            groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        if self.average is not None:
            load_full_state(self.average.module, state["average"])

    def result_state(self, *, in_training: bool) -> State:
        """Return the state of the model as it is to be used, also in the middle of an epoch."""
        module = self.result_module
        if not (in_training and has_modes(self._optimizer)):
            return module.state_dict()
        # The weights of evaluation, and then the very bits that training continues from.
        before = copy.deepcopy(self.snapshot())
        self.set_mode("eval")
        found = copy.deepcopy(module.state_dict())
        self.set_mode("train")
        self.restore(before)
        return found


def full_state(module: nn.Module) -> State:
    """Return the state of a module with the buffers that its ``state_dict`` leaves out."""
    state = module.state_dict()
    own = {name: value for name, value in module.named_buffers() if name not in state}
    return {"state": state, "buffers": own}


def load_full_state(module: nn.Module, state: State) -> None:
    """Load what `full_state` returned."""
    module.load_state_dict(state["state"])
    buffers = dict(module.named_buffers())
    with torch.no_grad():
        for name, value in state["buffers"].items():
            if name in buffers:
                buffers[name].copy_(value)
