"""A frozen module as attacks see it: logits, features and input gradients."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from advfeat import checks, seeding, threat
from advfeat.model import folding
from advfeat.model.access import innermost, logits_of, unwrapped
from advfeat.model.batches import BatchPadding
from advfeat.model.compiled import CompiledModule
from advfeat.model.extras import ByName, ExtraArguments, Extras, argument_names, input_name
from advfeat.model.formats import (
    CONVOLUTIONS,
    Precision,
    at_least_float32,
    contiguous_only,
    keep_pooled_gradient_in_channels_last,
    supported_precision,
)
from advfeat.model.freezing import (
    check_tensors,
    copy_for_thread,
    frozen,
    is_compiled,
    warn_about_training_submodules,
)
from advfeat.model.inputs import InputAdapter
from advfeat.model.inspection import NO_GRADIENT, Purpose, inspect_module
from advfeat.model.layers import Layer, LayerHook, StraightThrough, find_layer, logits_layer
from advfeat.model.straight_through import StraightThroughMode
from advfeat.threat import FeatureBounds

# A folded BatchNorm may differ by rounding, as a fraction of the largest output; bfloat16 has 4e-3.
_ROUNDING = 1e-3


# Size of a sample's gradient on its way back through a float16 model, which holds 6e-8 to 65504.
_HALF_SCALE = 64.0


class Evaluation(NamedTuple):
    """What one forward and backward pass gives, each with the sample first."""

    gradient: Tensor  # (N, ...) like the inputs, the objective's gradient
    value: Tensor  # (N,) the objective
    output: Tensor  # (N, C) logits or (N, F) features, float32 at least


class Network:
    """A frozen module as attacks see it: logits, features and input gradients, batch first.

    Made for an attack, and handed to its ``init`` and ``step``; not meant to outlive the call.
    """

    def __init__(
        self,
        module: nn.Module,
        precision: Precision = "float32",
        layer: Layer = None,
        compile: bool = False,
        fold: bool = False,
        straight_through: bool = False,
        train: bool = False,
        purpose: Purpose | None = None,
        expectation: int = 1,
    ) -> None:
        self._module = module
        self._own: nn.Module = innermost(module)  # inside torch.compile's
        self._inputs = InputAdapter(self._own)
        self._extras = ExtraArguments(module)
        self._fold = fold
        self._folded: dict[object, folding.Forwards] = {}  # by the function that is called
        self._compile = compile
        self._logits_call: Callable[..., object] = module
        self._layer = layer
        self._head: nn.Module | None = None  # where the layer is found by the logits
        self._straight_through = straight_through
        self._at_layer: Callable[..., object] | None = None
        tensors, modules = list(_tensors(module)), list(module.modules())
        example = next((t for t in tensors if t.is_floating_point()), None)
        self.device = None if example is None else example.device
        self.dtype = None if example is None else example.dtype
        types = {t.dtype for t in tensors if t.is_floating_point() and t.itemsize > 1}
        # Size of a rounding in the coarsest type of the module, as a fraction.
        self.rounding = max((torch.finfo(t).eps for t in types), default=0.0)
        self._takes_straight_through = True
        self._has_float16 = any(t.dtype == torch.float16 for t in tensors)
        self.low_precision = precision == "bfloat16"
        self._has_convolution = any(isinstance(m, CONVOLUTIONS) for m in modules)
        self._warned_of_no_gradient = False
        self._purpose, self._trains, self._expectation = purpose, train, expectation
        self._from_probabilities: Callable[[Tensor], Tensor] | None = None
        self.batches = BatchPadding(self.selected)
        # Called after every gradient, and after logits without one: progress of long attacks.
        self.on_gradient: Callable[[], object] = lambda: None
        self.on_logits: Callable[[], object] = lambda: None
        self.classes: int | None = None
        self._largest_label, self._label_name = -1, "labels"
        # A compiler would meet the hook that checks.
        self._checked_submodules = compile or any(map(is_compiled, modules))
        self._set_input_name(None)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Copy the user's inputs: detached, float32 at least, in the fastest memory format."""
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        memory_format = self._memory_format(inputs)
        return inputs.detach().to(dtype, copy=True).contiguous(memory_format=memory_format)

    def inspect(self, inputs: Tensor, bounds: FeatureBounds) -> None:
        """Warn of what makes a result doubtful, once, from the first prepared batch.

        Where the module returns probabilities, `logits` are their logarithms from then on.
        """
        if self._purpose is None:
            return
        purpose, self._purpose = self._purpose, None
        self._from_probabilities = inspect_module(
            lambda x: self._call(self._module, x, low_precision=False),
            self._own,
            inputs,
            bounds,
            purpose=purpose,
            train=self._trains or self._expectation > 1,  # random, and known to be
            select=self.selected,
            extras=self._extras.names,
        )

    # --- Further arguments of forward ---

    def expect_extras(self, extras: Mapping[str, Any] | None) -> None:
        """Raise an error for further arguments that the user gives and forward does not take."""
        self._extras.expect(extras)

    def choose_extras(self, entries: Mapping[str, Any] | None, inputs: Tensor) -> Extras | None:
        """Entries of a batch that forward takes by name, to be `given` with its samples.

        An entry that is None is the name of the inputs.
        """
        if entries:
            self._set_input_name(entries)
        return self._extras.choose(entries, inputs)

    def given(self, extras: Extras | None) -> AbstractContextManager[None]:
        """Context in which each sample of the inputs has these further arguments."""
        return self._extras.given(extras)

    def selected(self, chosen: Tensor | slice) -> AbstractContextManager[None]:
        """Context in which the inputs are these of the samples whose arguments were given."""
        return self._extras.selected(chosen)

    def _set_input_name(self, entries: Mapping[str, Any] | None) -> None:
        name = input_name(self._own, entries)
        if name is not None and not isinstance(self._module, ByName):
            self._module = ByName(self._module, name)
        self._logits_call = CompiledModule(self._module) if self._compile else self._module

    def expect(self, labels: Tensor, name: str = "labels") -> None:
        """Check class indices against the number of logits, now or once it is known."""
        largest = int(labels.max())
        if self.classes is not None:
            checks.class_range(largest, self.classes, name)
        self._largest_label = max(self._largest_label, largest)
        self._label_name = name

    def class_count(self, inputs: Tensor) -> int:
        """Number of logits; looked up on two samples if no forward pass has told it yet."""
        if self.classes is None:
            # Of a single one a BatchNorm without running statistics makes an error.
            with self.selected(slice(0, 2)):
                self.logits(inputs[:2])
        assert self.classes is not None
        return self.classes

    def logits(self, inputs: Tensor, low_precision: bool = False) -> Tensor:
        """Return logits ``(N, C)`` without a gradient, computed in float32 (or float64).

        ``low_precision`` computes them as gradients are, for what is settled in float32 later.
        """
        with torch.no_grad():
            low = low_precision and self.low_precision
            found = self.batches.call(lambda x: self._logits(x, low), inputs)
        self.on_logits()
        return found

    def features(self, inputs: Tensor) -> Tensor:
        """Activations at the layer, ``(N, F)``, without a gradient, in float32 (or float64)."""
        with torch.no_grad():
            return self.batches.call(lambda x: self._features(x, low_precision=False), inputs)

    def logits_gradient(
        self,
        inputs: Tensor,
        objective: Callable[[Tensor], Tensor],
        straight_through: bool = False,
    ) -> Evaluation:
        """Gradient of a per-sample objective of the logits, by the inputs.

        Returned as ``gradient`` (like ``inputs``), ``value`` (the objective, ``(N,)``) and
        ``output`` (the logits, ``(N, C)``), in bfloat16's precision where the user asked for it.
        With ``straight_through`` layers that round or compare pass gradients on, see
        `advfeat.model.straight_through`.
        """
        forward = self._straight_through_logits if straight_through else self._logits
        return self._gradient(inputs, forward, objective)

    def features_gradient(
        self, inputs: Tensor, objective: Callable[[Tensor], Tensor]
    ) -> Evaluation:
        """Gradient of a per-sample objective of the layer's activations, by the inputs.

        Returned as ``gradient``, ``value`` and ``output`` (the activations, ``(N, F)``).
        """
        return self._gradient(inputs, self._features, objective)

    def _gradient(
        self,
        inputs: Tensor,
        forward: Callable[..., Tensor],
        objective: Callable[[Tensor], Tensor],
    ) -> Evaluation:
        # The user's own autocast would decide the precision of the backward pass too.
        with torch.enable_grad(), _autocast(inputs.device.type, enabled=False):
            leaf = inputs.detach().requires_grad_()
            output = self.batches.call(lambda x: forward(x, low_precision=self.low_precision), leaf)
            value = objective(output)
            found = None
            if value.requires_grad and output.requires_grad:
                found = self._by_inputs(leaf, output, value)
            gradient = self._no_gradient(leaf) if found is None else threat.finite(found)
        self.on_gradient()
        return Evaluation(gradient, value.detach(), output.detach())

    def _by_inputs(self, leaf: Tensor, output: Tensor, value: Tensor) -> Tensor | None:
        if not leaf.is_contiguous():
            keep_pooled_gradient_in_channels_last(output)
        # A sum, never a mean: no sample's gradient depends on its batch.
        total = value.sum()
        if not self._has_float16:
            return torch.autograd.grad(total, leaf, allow_unused=True)[0]
        # float16 holds neither the tiny gradient of a sure answer nor a huge one (pitfall 12):
        # every sample enters the model at one size, and has its own back in float32.
        (by_output,) = torch.autograd.grad(total, output)
        peak = by_output.abs().amax(1)
        unit = by_output / threat.per_sample(peak.clamp_min(torch.finfo(peak.dtype).tiny), output)
        (found,) = torch.autograd.grad(output, leaf, unit * _HALF_SCALE, allow_unused=True)
        return None if found is None else found * threat.per_sample(peak / _HALF_SCALE, leaf)

    def _no_gradient(self, leaf: Tensor) -> Tensor:
        if not self._warned_of_no_gradient:
            self._warned_of_no_gradient = True
            checks.warn(NO_GRADIENT, topic="zero gradient")  # which is what comes of it
        return torch.zeros_like(leaf)

    def _logits(self, inputs: Tensor, low_precision: bool) -> Tensor:
        return self._mean_of_draws(self._one_draw, inputs, low_precision)

    def _mean_of_draws(
        self, draw: Callable[[Tensor, bool], Tensor], inputs: Tensor, low_precision: bool
    ) -> Tensor:
        if self._expectation == 1:
            return draw(inputs, low_precision)
        # The same draws in every call: the average is a function then, and verdicts repeat.
        with seeding.all_generators(0, 0, inputs.device):
            draws = [draw(inputs, low_precision) for _ in range(self._expectation)]
        return torch.stack(draws).mean(0)

    def _one_draw(self, inputs: Tensor, low_precision: bool) -> Tensor:
        output = self._call(self._logits_call, inputs, low_precision)
        output = checks.logits(logits_of(output), inputs)
        if self.classes is None:
            # In this order: where the check fails, it fails again in a padded batch.
            checks.class_range(self._largest_label, output.shape[1], self._label_name)
            self.classes = output.shape[1]
        output = at_least_float32(output)
        if self._from_probabilities is not None:
            output = self._from_probabilities(output)
        return output

    def _straight_through_logits(self, inputs: Tensor, low_precision: bool) -> Tensor:
        if self._takes_straight_through:
            try:
                with StraightThroughMode():
                    return self._logits(inputs, low_precision)
            except Exception:  # of operations that the mode does not know; others fail again
                self._takes_straight_through = False
        return self._logits(inputs, low_precision)

    def _features(self, inputs: Tensor, low_precision: bool) -> Tensor:
        return self._mean_of_draws(self._features_once, inputs, low_precision)

    def _features_once(self, inputs: Tensor, low_precision: bool) -> Tensor:
        output = self._call(self._layer_call, inputs, low_precision)
        if not isinstance(output, Tensor) or output.shape[:1] != inputs.shape[:1]:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            checks.fail("layer", shape, "its activations must be a tensor (N, ...)")
        return at_least_float32(output.flatten(1))

    def _layer_call(self, inputs: Tensor, **extras: Tensor) -> object:
        if self._at_layer is None:
            first = {name: value[:1] for name, value in extras.items()}
            at_layer = self._function_of_layer(inputs[:1], first)
            self._at_layer = StraightThrough(at_layer) if self._straight_through else at_layer
        return self._at_layer(inputs, **extras)

    def describe_layer(self, inputs: Tensor) -> dict[str, object]:
        """Where `features` are taken, and how many there are to a sample."""
        with self.selected(slice(0, 1)):
            width = self.features(inputs[:1]).shape[1]
        module = self._head if self._layer is None else self._layer
        if not isinstance(module, nn.Module):
            name = getattr(module, "__qualname__", type(module).__qualname__)
            return {"function": name, "width": width}
        names = {part: name for name, part in self._own.named_modules()}
        side = "input" if self._layer is None else "output"
        return {"module": names[module], "side": side, "width": width}

    def _function_of_layer(self, example: Tensor, extras: Extras) -> Callable[..., object]:
        layer = self._layer
        assert not isinstance(layer, str)
        if layer is None:
            head, calls = logits_layer(self._module, example, **extras)
            self._head = head
            return LayerHook(self._module, head, compile=self._compile, calls=calls, before=True)
        if isinstance(layer, nn.Module):
            return LayerHook(self._module, layer, compile=self._compile)
        call = CompiledModule(layer) if self._compile else layer
        accepted = argument_names(layer)
        return lambda x, **given: call(x, **{n: v for n, v in given.items() if n in accepted})

    def _call(self, function: Callable[..., object], inputs: Tensor, low_precision: bool) -> object:
        if self._fold and low_precision and function not in self._folded:
            self._folded[function] = self._checked_folding(function, inputs)
        forwards = self._folded.get(function, {}) if low_precision else {}
        checked, self._checked_submodules = self._checked_submodules, True
        # Set either way: the user's own autocast does not decide the attack's precision.
        with (
            nullcontext() if checked else warn_about_training_submodules(self._module),
            folding.forwards_replaced(forwards) if forwards else nullcontext(),
            _autocast(inputs.device.type, low_precision),
        ):
            extras = self._extras.of(inputs)
            return self._inputs.call(function, inputs, extras, cast=not low_precision)

    def _checked_folding(self, function: Callable[..., object], inputs: Tensor) -> folding.Forwards:
        """Forwards with BatchNorms folded in, if the function then gives the same in float32."""
        forwards = folding.fold_batchnorm(self._module)
        if not forwards or (function is self._module and folding.is_checked(self._module)):
            return forwards
        sample = inputs.detach()[:1]
        devices = [inputs.device] if inputs.is_cuda else []
        first = self.selected(slice(0, 1))
        with torch.no_grad(), torch.random.fork_rng(devices), first:
            own = logits_of(self._call(function, sample, low_precision=False))
            with folding.forwards_replaced(forwards):
                found = logits_of(self._call(function, sample, low_precision=False))
        if not (isinstance(own, Tensor) and isinstance(found, Tensor)):
            return {}
        apart, size = (found - own).abs().max(), own.abs().max()
        if not bool(apart <= _ROUNDING * size):
            return {}
        if function is self._module:
            folding.set_checked(self._module)
        return forwards

    def _memory_format(self, inputs: Tensor) -> torch.memory_format:
        fits = inputs.ndim == 4 and self._has_convolution
        if fits and self._own not in contiguous_only:
            return torch.channels_last
        return torch.contiguous_format


def _autocast(device: str, enabled: bool) -> AbstractContextManager[object]:
    """Autocast to bfloat16 or, against the user's own, to nothing; to enter it takes its time."""
    if not enabled and not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


@contextmanager
def attackable(
    module: nn.Module,
    *,
    precision: Precision = "float32",
    layer: Layer = None,
    train: bool = False,
    compile: bool = False,
    straight_through: bool = False,
    purpose: Purpose | None = "attack",
    expectation: int = 1,
) -> Iterator[Network]:
    """Freeze a module, yield its `Network`, and leave the module as it was found.

    Parameters
    ----------
    module
        Any module; a DataParallel or DistributedDataParallel wrapper is taken off.
    precision
        ``"bfloat16"`` takes gradients under autocast where the hardware computes in bfloat16, and
        warns and stays in float32 where it does not. BatchNorm is then folded into the
        convolution before it, where that is sure to give the same.
    layer
        Where `Network.features` are taken: a module's name or the module (its output), a callable
        of the inputs, or None for the input of the Linear that gives the logits.
    train
        Keep the training flags (BatchNorm uses batch statistics, dropout is on) instead of
        evaluation mode. Buffers are restored all the same.
    compile
        Go through ``torch.compile``; warns and continues without it where it fails.
    straight_through
        Let gradients of `Network.features` pass the last ReLU before the layer unchanged.
    purpose
        What `Network.inspect` warns of: what makes an attack doubtful, or ``"predictions"``, or
        ``"training"``, or a layer's ``"features"``; nothing if None.
    expectation
        Logits, and their gradients, are means over so many calls of a random model.
    """
    checks.model(module)
    if straight_through and compile:
        checks.fail("straight_through", True, "not with compile=True; leave one of them out")
    checks.one_of("precision", precision, checks.PRECISIONS)
    checks.count("expectation", expectation, low=1)
    module = unwrapped(module)
    check_tensors(module)
    layer = find_layer(module, layer)
    if threading.current_thread() is not threading.main_thread():
        module, layer = copy_for_thread(module, layer)
    # Not in the user's inference mode: its tensors could not enter a gradient.
    with torch.inference_mode(False), torch.no_grad(), frozen(module, train=train):
        fold = not (train or compile)  # a compiler does it itself
        precision = supported_precision(precision, module)
        yield Network(
            module, precision, layer, compile, fold, straight_through, train, purpose, expectation
        )
