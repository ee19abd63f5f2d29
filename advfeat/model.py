"""The one border to the user's module: frozen while it is looked at, and left as it was found."""

from __future__ import annotations

import difflib
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from advfeat import checks, folding, threat

Precision: TypeAlias = Literal["float32", "bfloat16"]
Layer: TypeAlias = str | nn.Module | Callable[[Tensor], Tensor] | None

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
# Modules that failed on channels_last inputs (an x.view in them, say) get contiguous ones.
_contiguous_only: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Weights that training put in channels_last, and that go back where the module fails on it.
_in_channels_last: weakref.WeakKeyDictionary[nn.Module, list[nn.Parameter]] = (
    weakref.WeakKeyDictionary()
)
# A folded BatchNorm may differ by rounding, as a share of the largest output; bfloat16 has 4e-3.
_ROUNDING = 1e-3
# As many functions from the output a global pooling is looked for.
_NEAR_THE_OUTPUT = 8
# Size at which a row's gradient goes backward through a float16 model, which holds 6e-8 to 65504.
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
    ) -> None:
        self._module = module
        self._own: nn.Module = getattr(module, "_orig_mod", module)  # inside torch.compile's
        self._fold = fold
        self._folded: dict[object, folding.Forwards] = {}  # by the function that is called
        self._compile = compile
        self._logits_call = _Compiled(module) if compile else module
        self._layer = layer
        self._at_layer: Callable[[Tensor], object] | None = None
        tensors = itertools.chain(module.parameters(), module.buffers())
        example = next((t for t in tensors if t.is_floating_point()), None)
        self.device = None if example is None else example.device
        self.dtype = None if example is None else example.dtype
        self.low_precision = precision == "bfloat16"
        self._has_convolution = any(isinstance(m, _CONVOLUTIONS) for m in module.modules())
        self.classes: int | None = None
        self._largest_label, self._label_name = -1, "labels"
        # A compiler would meet the hook that looks.
        self._looked_for_strangers = compile or any(map(_is_compiled, module.modules()))

    def prepare(self, inputs: Tensor) -> Tensor:
        """Copy the user's inputs: detached, float32 at least, in the fastest memory format."""
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        memory_format = self._memory_format(inputs)
        return inputs.detach().to(dtype, copy=True).contiguous(memory_format=memory_format)

    def expect(self, labels: Tensor, name: str = "labels") -> None:
        """Check class indices against the number of logits, now or once it is known."""
        largest = int(labels.max())
        if self.classes is not None:
            checks.class_range(largest, self.classes, name)
        self._largest_label = max(self._largest_label, largest)
        self._label_name = name

    def class_count(self, inputs: Tensor) -> int:
        """Number of logits; looked up on the first row if no forward pass has told it yet."""
        if self.classes is None:
            self.logits(inputs[:1])
        assert self.classes is not None
        return self.classes

    def logits(self, inputs: Tensor, low_precision: bool = False) -> Tensor:
        """Return logits ``(N, C)`` without a gradient, computed in float32 (or float64).

        ``low_precision`` computes them as gradients are, for what is settled in float32 later.
        """
        with torch.no_grad():
            return self._logits(inputs, low_precision and self.low_precision)

    def features(self, inputs: Tensor) -> Tensor:
        """Activations at the layer, ``(N, F)``, without a gradient, in float32 (or float64)."""
        with torch.no_grad():
            return self._features(inputs, low_precision=False)

    def logits_gradient(self, inputs: Tensor, objective: Callable[[Tensor], Tensor]) -> Evaluation:
        """Gradient of a per-sample objective of the logits, by the inputs.

        Returned as ``gradient`` (like ``inputs``), ``value`` (the objective, ``(N,)``) and
        ``output`` (the logits, ``(N, C)``), in bfloat16's precision where the user asked for it.
        """
        return self._gradient(inputs, self._logits, objective)

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
        with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
            leaf = inputs.detach().requires_grad_()
            output = forward(leaf, low_precision=self.low_precision)
            value = objective(output)
            found = None
            if value.requires_grad and output.requires_grad:
                found = self._by_inputs(leaf, output, value)
            gradient = self._no_gradient(leaf) if found is None else found
        return Evaluation(gradient, value.detach(), output.detach())

    def _by_inputs(self, leaf: Tensor, output: Tensor, value: Tensor) -> Tensor | None:
        if not leaf.is_contiguous():
            _spread_in_channels_last(output)
        # A sum, never a mean: no sample's gradient depends on its batch.
        total = value.sum()
        if self.dtype != torch.float16:
            return torch.autograd.grad(total, leaf, allow_unused=True)[0]
        # float16 holds neither the tiny gradient of a sure answer nor a huge one (pitfall 12):
        # every row enters the model at one size, and has its own back in float32.
        (by_output,) = torch.autograd.grad(total, output)
        peak = by_output.abs().amax(1)
        unit = by_output / threat.per_sample(peak.clamp_min(torch.finfo(peak.dtype).tiny), output)
        (found,) = torch.autograd.grad(output, leaf, unit * _HALF_SCALE, allow_unused=True)
        return None if found is None else found * threat.per_sample(peak / _HALF_SCALE, leaf)

    @staticmethod
    def _no_gradient(leaf: Tensor) -> Tensor:
        warnings.warn(
            "the model's output has no gradient by its input (detached, or computed outside "
            "autograd): gradient attacks cannot move, and robustness measured so means nothing",
            stacklevel=2,
        )
        return torch.zeros_like(leaf)

    def _logits(self, inputs: Tensor, low_precision: bool) -> Tensor:
        output = self._call(self._logits_call, inputs, low_precision)
        output = checks.logits(logits_of(output), inputs)
        if self.classes is None:
            self.classes = output.shape[1]
            checks.class_range(self._largest_label, self.classes, self._label_name)
        return _at_least_float32(output)

    def _features(self, inputs: Tensor, low_precision: bool) -> Tensor:
        output = self._call(self._layer_call, inputs, low_precision)
        if not isinstance(output, Tensor) or output.shape[:1] != inputs.shape[:1]:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            checks.fail("layer", shape, "its activations must be a tensor (N, ...)")
        return _at_least_float32(output.flatten(1))

    def _layer_call(self, inputs: Tensor) -> object:
        if self._at_layer is None:
            self._at_layer = self._function_of_layer(inputs[:1])
        return self._at_layer(inputs)

    def _function_of_layer(self, example: Tensor) -> Callable[[Tensor], object]:
        layer = self._layer
        assert not isinstance(layer, str)
        if layer is None:
            last, calls = _last_linear(self._module, example)
            return _Tap(self._module, last, compile=self._compile, calls=calls, before=True)
        if isinstance(layer, nn.Module):
            return _Tap(self._module, layer, compile=self._compile)
        return _Compiled(layer) if self._compile else layer

    def _call(
        self, function: Callable[[Tensor], object], inputs: Tensor, low_precision: bool
    ) -> object:
        if self.dtype is not None and not low_precision:
            inputs = inputs.to(self.dtype)
        if self._fold and low_precision and function not in self._folded:
            self._folded[function] = self._checked_folding(function, inputs)
        forwards = self._folded.get(function, {}) if low_precision else {}
        looked, self._looked_for_strangers = self._looked_for_strangers, True
        # Set either way: the user's own autocast does not decide the attack's precision.
        with (
            nullcontext() if looked else _strangers_told(self._module),
            folding.answering(forwards),
            torch.autocast(inputs.device.type, torch.bfloat16, enabled=low_precision),
        ):
            # Images of one channel are contiguous in either format: then the weights decide.
            if inputs.is_contiguous() and self._own not in _in_channels_last:
                return function(inputs)
            try:
                return function(inputs)
            except RuntimeError as error:
                if "view size is not compatible" not in str(error):
                    raise
                _contiguous_only.add(self._own)
                _reformat(_in_channels_last.pop(self._own, []), torch.contiguous_format)
                return function(inputs.contiguous())

    def _checked_folding(
        self, function: Callable[[Tensor], object], inputs: Tensor
    ) -> folding.Forwards:
        """Forwards with BatchNorms folded in, if the function then gives the same in float32."""
        forwards = folding.folded(self._module)
        if not forwards:
            return {}
        row = inputs.detach()[:1]
        devices = [inputs.device] if inputs.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            own = logits_of(self._call(function, row, low_precision=False))
            with folding.answering(forwards):
                found = logits_of(self._call(function, row, low_precision=False))
        if not (isinstance(own, Tensor) and isinstance(found, Tensor)):
            return {}
        apart, size = (found - own).abs().max(), own.abs().max()
        return forwards if bool(apart <= _ROUNDING * size) else {}

    def _memory_format(self, inputs: Tensor) -> torch.memory_format:
        fits = inputs.ndim == 4 and self._has_convolution
        if fits and self._own not in _contiguous_only:
            return torch.channels_last
        return torch.contiguous_format


@contextmanager
def attackable(
    module: nn.Module,
    *,
    precision: Precision = "float32",
    layer: Layer = None,
    train: bool = False,
    compile: bool = False,
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
        Where `Network.features` looks: a module's name or the module (its output), a callable
        of the inputs, or None for the input of the Linear that is called last.
    train
        Keep the training flags (BatchNorm uses batch statistics, dropout is on) instead of
        evaluation mode. Buffers are restored all the same.
    compile
        Go through ``torch.compile``; warns and goes on without it where it fails.
    """
    checks.model(module)
    checks.one_of("precision", precision, checks.PRECISIONS)
    module = unwrapped(module)
    _refuse_inference_tensors(module)
    layer = find_layer(module, layer)
    # Not in the user's inference mode: its tensors could not enter a gradient.
    with torch.inference_mode(False), torch.no_grad(), _frozen(module, train=train):
        fold = not (train or compile)  # a compiler does it itself
        yield Network(module, _affordable(precision, module), layer, compile, fold)


class Trainee(nn.Module):
    """A module as training calls it: the logits of several batches in one pass, for DDP counts it.

    Made by `trainable`.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.module = network._module
        self._network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Logits ``(N, C)`` of each batch, with a gradient, in float32 (or float64)."""
        network = self._network
        return tuple(
            network._logits(
                batch.contiguous(memory_format=network._memory_format(batch)),
                network.low_precision,
            )
            for batch in inputs
        )


@contextmanager
def trainable(
    module: nn.Module, *, precision: Precision = "float32", compile: bool = False
) -> Iterator[Trainee]:
    """Put a module in training mode, yield its `Trainee`, and leave its flags as they were.

    A module that is in training mode keeps its frozen parts. Weights of convolutions are in
    channels_last meanwhile, the fastest format on the CPU and on CUDA.
    """
    flags = [(m, m.training) for m in module.modules()]
    weights = [p for p in _kernels(module) if p.is_contiguous()]
    if not module.training:
        module.train()
    try:
        if module not in _contiguous_only:
            _reformat(weights, torch.channels_last)
            _in_channels_last[module] = weights
        called: Any = torch.compile(module) if compile else module
        yield Trainee(Network(called, _affordable(precision, module)))
    finally:
        for m, flag in flags:
            m.training = flag
        _reformat(weights, torch.contiguous_format)
        _in_channels_last.pop(module, None)


def averaging(module: nn.Module, like: nn.Module, precision: Precision) -> Trainee:
    """`Trainee` of a copy that learns nothing but BatchNorm statistics, where ``like`` does."""
    for own, other in zip(module.modules(), like.modules(), strict=True):
        own.training = other.training and isinstance(own, _BatchNorm)
    module.requires_grad_(False)
    _in_channels_last[module] = _kernels(module)
    return Trainee(Network(module, _affordable(precision, module)))


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put back the values of all buffers: a pass that is not to count in BatchNorm statistics."""
    # An expanded buffer (stride 0) cannot be written to, by anyone.
    values = [(b, b.clone()) for b in module.buffers() if 0 not in b.stride()]
    try:
        yield
    finally:
        for buffer, value in values:
            # Through .data: a counted write would break a graph the user holds. Always, for
            # BatchNorm does not count its own.
            buffer.data.copy_(value)


def refuse_wrapped(module: nn.Module) -> None:
    """Refuse a module that is distributed already: training does that itself."""
    names = {base.__name__ for m in module.modules() for base in type(m).__mro__}
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "model: a DistributedDataParallel; pass the module inside, model.module: "
            "training wraps it itself where torch.distributed is initialised"
        )
    if names & {"FullyShardedDataParallel", "FSDPModule"}:
        raise TypeError(
            "model: sharded by FSDP, and an attack would gather all weights at every step; pass "
            "the plain module: training makes it data parallel (DDP)"
        )


def _kernels(module: nn.Module) -> list[nn.Parameter]:
    """Weights of convolutions; others of four dimensions may be meant to be viewed."""
    own = (m.parameters(recurse=False) for m in module.modules() if isinstance(m, _CONVOLUTIONS))
    return list(dict.fromkeys(p for part in own for p in part if p.ndim == 4))


def _reformat(parameters: list[nn.Parameter], memory_format: torch.memory_format) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.contiguous(memory_format=memory_format)


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module below a data-parallel wrapper, which would synchronise gradients."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return module.module if isinstance(module, wrappers) else module


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter or buffer is; the CPU if it has none."""
    tensor = next(module.parameters(), next(module.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def logits_of(output: object) -> object:
    """Find the logits in what a module returned: tensor, tuple or list, mapping or ``.logits``."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output


def find_layer(module: nn.Module, layer: Layer) -> Layer:
    """Resolve a layer's name to the module, and refuse a layer that the module does not have."""
    if not isinstance(layer, (str, nn.Module)):
        if not (layer is None or callable(layer)):
            raise TypeError(f"layer={layer!r}: expected a name, a module, a callable or None")
        return layer
    named = dict(module.named_modules())
    if isinstance(layer, nn.Module):
        if not any(layer is m for m in named.values()):
            checks.fail("layer", type(layer).__name__, "this module is not part of the model")
        return layer
    if layer not in named or layer == "":
        names = [name for name in named if name]
        close = difflib.get_close_matches(layer, names, n=3, cutoff=0.3) or names[:5]
        checks.fail("layer", layer, f"the model has no layer of this name; near: {close}")
    found: nn.Module = named[layer]
    return found


@contextmanager
def _frozen(module: nn.Module, *, train: bool) -> Iterator[None]:
    """Freeze flags and parameters; put back flags, ``requires_grad`` and every buffer's value."""
    flags = [(m, m.training) for m in module.modules()]
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    owned = [(m, dict(m._buffers.items())) for m in module.modules()]
    recurrent = [(m, m.dropout) for m in module.modules() if isinstance(m, nn.RNNBase)]
    try:
        for m, _ in flags:
            m.training = m.training and train
        for m, _ in recurrent:
            # cuDNN goes backward in training mode alone, which is the same without dropout.
            if not train and device_of(m).type == "cuda":
                m.training, m.dropout = True, 0.0
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        with buffers_kept(module):
            yield
    finally:
        for m, flag in flags:
            m.training = flag
        for m, dropout in recurrent:
            m.dropout = dropout
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        for owner, own in owned:
            if isinstance(owner, torch.jit.ScriptModule):  # shows a view of its buffers
                for name, buffer in own.items():
                    setattr(owner, name, buffer)
                continue
            owner._buffers.clear()
            owner._buffers.update(own)


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` made it, or ``module.compile()`` was called."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


@contextmanager
def _strangers_told(module: nn.Module) -> Iterator[None]:
    """Warn of what is random, or looks at other rows, and was not put in evaluation mode.

    A module that ``forward`` reaches as a global, or through a closure, is no part of the model.
    """
    own, found = set(module.modules()), set()

    def look(called: nn.Module, _: object) -> None:
        if called.training and called not in own and isinstance(called, (_BatchNorm, _DropoutNd)):
            found.add(type(called).__name__)

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
    if found:
        warnings.warn(
            f"the model calls {' and '.join(sorted(found))} in training mode, in a module that is "
            "no part of it (a global?): results depend on the batch or on chance, and statistics "
            "move; make that module an attribute of the model, or call its .eval()",
            stacklevel=2,
        )


def _refuse_inference_tensors(module: nn.Module) -> None:
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_inference():
            checks.fail(
                "model",
                name,
                "made in torch.inference_mode, so it can enter no gradient; make the model, or "
                "copy.deepcopy it, outside of that mode",
            )


def _spread_in_channels_last(output: Tensor) -> None:
    """Have the gradient of a global pooling laid out like the activations that were pooled.

    Torch spreads it over the image in the contiguous format, and on the CPU the backward pass of a
    ReLU takes ten times as long on two formats: some percent of a small network's step.
    """
    node = output.grad_fn
    for _ in range(_NEAR_THE_OUTPUT):
        if node is None:
            return
        if node.name() == "MeanBackward1":
            node.register_hook(lambda by_inputs, _: tuple(map(_channels_last, by_inputs)))
            return
        node = next((n for n, _ in node.next_functions if n is not None), None)


def _channels_last(gradient: Tensor) -> Tensor:
    fits = gradient.ndim == 4
    return gradient.contiguous(memory_format=torch.channels_last) if fits else gradient


def _affordable(precision: Precision, module: nn.Module) -> Precision:
    if precision == "bfloat16" and not _computes_bfloat16(device_of(module)):
        warnings.warn(
            "precision='bfloat16': this processor only emulates bfloat16, many times slower "
            "than float32; gradients are taken in float32",
            stacklevel=4,
        )
        return "float32"
    return precision


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


class _Compiled:
    """A compiled module that meets few batch sizes: rows are padded to a power of two.

    Without a compiler, or with a module that it cannot do, the module itself is called.
    """

    def __init__(self, module: Callable[[Tensor], object]) -> None:
        self._module = module
        self._compiled: Callable[[Tensor], object] | None = torch.compile(module, dynamic=False)

    def __call__(self, inputs: Tensor) -> object:
        if self._compiled is None:
            return self._module(inputs)
        count = len(inputs)
        missing = (1 << (count - 1).bit_length()) - count
        padded = torch.cat([inputs, inputs[:1].expand(missing, *inputs.shape[1:])])
        try:
            # Without guards on hooks, code that was compiled for another layer would be run.
            guards = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
            with guards, warnings.catch_warnings():
                # The compiler looks at every input's gradient, and torch warns of that.
                warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor")
                output = logits_of(self._compiled(padded))
        except Exception as error:
            if not type(error).__module__.startswith("torch._"):
                raise
            warnings.warn(f"compile=True: goes on without, for {error}", stacklevel=2)
            self._compiled = None
            return self._module(inputs)
        return output[:count] if isinstance(output, Tensor) else output


class _Reached(Exception):  # noqa: N818 - not an error
    """Ends a forward pass at the layer that was asked for."""


class _Tap:
    """Activations at a layer: its output in its first call, or its input in its last.

    The forward pass ends there, unless it is compiled: a compiler leaves out by itself what
    nobody looks at.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: nn.Module,
        *,
        compile: bool,
        calls: int = 1,
        before: bool = False,
    ) -> None:
        self._module, self._layer, self._calls, self._before = module, layer, calls, before
        self._call = _Compiled(module) if compile else module

    def __call__(self, inputs: Tensor) -> Tensor:
        found: list[Tensor] = []
        to_the_end = self._call is not self._module

        def keep(value: Tensor) -> None:
            found.append(value)
            if len(found) == self._calls and not to_the_end:
                raise _Reached

        if self._before:
            handle = self._layer.register_forward_pre_hook(lambda _, given: keep(given[0]))
        else:
            handle = self._layer.register_forward_hook(lambda _, __, output: keep(output))
        try:
            self._call(inputs)
        except _Reached:
            pass
        finally:
            handle.remove()
        if len(found) < self._calls and to_the_end:
            # Code that the user had compiled before, perhaps, and that calls no hook.
            warnings.warn("compile=True: goes on without, for the layer was lost", stacklevel=2)
            self._call = self._module
            return self(inputs)
        if len(found) < self._calls:
            checks.fail("layer", None, "a forward pass of the model did not reach this layer")
        value = found[self._calls - 1]
        # A compiled module is given more rows than these.
        return value[: len(inputs)] if to_the_end else value


def _last_linear(module: nn.Module, example: Tensor) -> tuple[nn.Module, int]:
    """Find the Linear that a forward pass calls last, and how often it is called."""
    called: list[nn.Module] = []
    handles = [
        m.register_forward_pre_hook(lambda m, _: called.append(m))
        for m in module.modules()
        if isinstance(m, nn.Linear)
    ]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        checks.fail(
            "layer",
            None,
            "the model calls no nn.Linear, so its penultimate layer cannot be found; "
            "name one: layer='features'",
        )
    return called[-1], sum(m is called[-1] for m in called)
