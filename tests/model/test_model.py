"""The border to the user's module: what is looked at, and that everything is left as it was."""

import copy
import types
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import advfeat as af
from advfeat import losses
from advfeat.model import attackable, device_of, logits_of


class Convolutional(nn.Module):
    """Conv, BatchNorm, Dropout, a frozen BatchNorm, a frozen parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(4 * 6 * 6, 7)
        self.frozen = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 5)
        self.register_buffer("scale", torch.ones(7))
        self.register_buffer("spare", torch.zeros(7))
        self.register_buffer("absent", None)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return self.head(self.frozen(self.hidden(self.drop(x.flatten(1))) * self.scale))


class Wrapped(nn.Module):
    """A module whose forward pass is any function of the inputs."""

    def __init__(self, forward, **children):
        super().__init__()
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


@pytest.fixture
def model():
    """A model in training, partly frozen, with gradients from a step that is not yet taken."""
    torch.manual_seed(0)
    model = Convolutional()
    for _ in range(3):
        model(torch.rand(8, 3, 8, 8))
    model.frozen.eval()
    model.hidden.bias.requires_grad_(False)
    model(torch.rand(8, 3, 8, 8)).sum().backward()
    model.head.weight.grad = None
    return model


def batch(count=4, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *(shape or (3, 8, 8)), generator=generator)


def labels(count=4):
    return torch.arange(count) % 5


def climb(count=4):
    return losses.objective("cross_entropy", labels(count), targeted=False)


def dense(width=6, classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, classes))


def look(net, kind, inputs):
    """One of the four ways to look at a model."""
    if kind == "logits":
        return net.logits(inputs)
    if kind == "features":
        return net.features(inputs)
    if kind == "logits_gradient":
        return net.logits_gradient(inputs, lambda z: z.square().sum(1))
    return net.features_gradient(inputs, lambda g: g.square().sum(1))


LOOKS = ["logits", "features", "logits_gradient", "features_gradient"]


class Snapshot:
    """All that must be as it was, to be compared bit for bit."""

    def __init__(self, model):
        self.model = model
        self.flags = [m.training for m in model.modules()]
        self.wanted = [p.requires_grad for p in model.parameters()]
        self.parameters = [(p, p.detach().clone()) for p in model.parameters()]
        self.grads = [(p.grad, copy.deepcopy(p.grad)) for p in model.parameters()]
        self.buffers = [
            (name, b, None if b is None else b.clone(), None if b is None else b.data_ptr())
            for m in model.modules()
            for name, b in m._buffers.items()
        ]
        self.hooks = self.hook_count()
        self.random = torch.get_rng_state()

    def hook_count(self):
        modules = self.model.modules()
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]

    def assert_unchanged(self):
        model = self.model
        assert [m.training for m in model.modules()] == self.flags
        assert [p.requires_grad for p in model.parameters()] == self.wanted
        for now, (before, value) in zip(model.parameters(), self.parameters, strict=True):
            assert now is before
            assert torch.equal(now, value)
        for now, (before, value) in zip(model.parameters(), self.grads, strict=True):
            assert now.grad is before
            assert before is None or torch.equal(before, value)
        found = [(name, b) for m in model.modules() for name, b in m._buffers.items()]
        assert [name for name, _ in found] == [name for name, *_ in self.buffers]
        for (name, now), (_, before, value, place) in zip(found, self.buffers, strict=True):
            assert now is before, name
            assert before is None or torch.equal(before, value), name
            assert before is None or before.data_ptr() == place, name
        assert self.hook_count() == self.hooks
        assert torch.equal(torch.get_rng_state(), self.random)


# --- Everything is left as it was ---


@pytest.mark.parametrize("kind", LOOKS)
def test_looking_leaves_the_model_bit_for_bit(model, kind):
    before = Snapshot(model)
    with attackable(model) as net:
        look(net, kind, net.prepare(batch()))
    before.assert_unchanged()


@pytest.mark.parametrize("kind", ["logits", "logits_gradient"])
def test_batch_statistics_are_put_back_after_a_look_in_training_mode(model, kind):
    model.drop.p = 0.0  # dropout in training draws from the global generator, as it should
    before = Snapshot(model)
    with attackable(model, train=True) as net:
        look(net, kind, net.prepare(batch()))
        assert not torch.equal(model.norm.running_mean, before_mean(before))
    before.assert_unchanged()


def before_mean(snapshot):
    return next(value for name, _, value, _ in snapshot.buffers if name == "running_mean")


@pytest.mark.parametrize("train", [False, True])
def test_an_exception_inside_the_model_leaves_it_as_it_was(model, train):
    model.drop.p = 0.0

    def fail(*_):
        raise RuntimeError("inside the model")

    handle = model.head.register_forward_hook(fail)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="inside"), attackable(model, train=train) as net:
        net.logits_gradient(net.prepare(batch()), climb())
    before.assert_unchanged()
    handle.remove()


def test_an_exception_outside_the_model_leaves_it_as_it_was(model):
    before = Snapshot(model)
    with pytest.raises(KeyError), attackable(model):
        raise KeyError
    before.assert_unchanged()


@pytest.mark.parametrize("train", [False, True])
def test_pgd_leaves_the_model_bit_for_bit(model, train):
    model.drop.p = 0.0
    before = Snapshot(model)
    attack = af.PGD(eps=0.3, norm="l2", steps=2, random_start=True, seed=0)
    attack(model, batch(), labels(), train=train)
    before.assert_unchanged()


def write_counted(module):
    module.spare.add_(1)


def write_uncounted(module):
    module.spare.data.add_(1)


def replace(module):
    module.spare = torch.zeros(3)


def fill_the_absent(module):
    module.absent = torch.zeros(3)


def add(module):
    module.register_buffer("added", torch.zeros(3))


def delete(module):
    del module.spare


@pytest.mark.parametrize(
    "change", [write_counted, write_uncounted, replace, fill_the_absent, add, delete]
)
@pytest.mark.parametrize("kind", ["logits", "logits_gradient"])
def test_a_module_that_changes_its_buffers_gets_them_back(model, change, kind):
    model.register_forward_pre_hook(lambda *_: change(model))
    before = Snapshot(model)
    with attackable(model) as net:
        look(net, kind, net.prepare(batch()))
    before.assert_unchanged()


class Counting(nn.Module):
    """Can be scripted; writes to one buffer and exchanges another."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("latest", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.latest = x.detach().mean(0)
        return self.linear(x)


@pytest.mark.parametrize("kind", ["logits", "logits_gradient"])
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, batch(2, 6))])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.slow
def test_a_scripted_module_gets_its_buffers_back(make, kind):
    module = make(Counting())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with attackable(module) as net:
        assert look(net, kind, net.prepare(batch(2, 6)))[0].shape[0] > 0
    assert module.training
    assert all(p.requires_grad for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_module_made_in_inference_mode_is_refused_and_left_alone():
    with torch.inference_mode():
        module = dense()
    wanted = [p.requires_grad for p in module.parameters()]
    with pytest.raises(ValueError, match=r"model='0.weight'.*inference_mode"), attackable(module):
        pass
    assert [p.requires_grad for p in module.parameters()] == wanted


def test_recurrent_layers_on_cuda_are_in_training_mode_without_dropout(monkeypatch):
    # cuDNN has no backward pass in evaluation mode. That it is CUDA is pretended.
    monkeypatch.setattr("advfeat.model.freezing.device_of", lambda module: torch.device("cuda"))
    module = nn.Sequential(nn.LSTM(6, 4, num_layers=2, dropout=0.5))
    x = batch(2, 3, 6)
    expected = module.eval()(x)[0][0]
    module.train()
    with attackable(module):
        assert module[0].training
        assert torch.equal(module(x)[0][0], expected)
    assert module[0].training
    assert module[0].dropout == 0.5


def test_an_expanded_buffer_does_no_harm(model):
    # Several of its entries share one place in memory, so it cannot be written to.
    model.register_buffer("expanded", torch.ones(1).expand(5))
    with attackable(model) as net:
        net.logits(net.prepare(batch()))
    assert torch.equal(model.expanded, torch.ones(5))


@pytest.mark.parametrize("train", [False, True])
def test_a_graph_of_the_user_can_still_go_backward(model, train):
    twin = copy.deepcopy(model)
    model.drop.p = twin.drop.p = 0.0
    model.zero_grad()
    twin.zero_grad()
    twin(batch()).square().sum().backward()

    loss = model(batch()).square().sum()
    attack = af.PGD(eps=0.3, norm="l2", steps=2)
    attack(model, batch(seed=2), labels(), train=train)
    loss.backward()
    for name, expected in twin.named_parameters():
        found = model.get_parameter(name)
        assert (found.grad is None) == (expected.grad is None)
        assert expected.grad is None or torch.equal(found.grad, expected.grad), name
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)


def test_a_graph_that_holds_a_buffer_can_still_go_backward(model):
    model.drop.p = 0.0
    loss = (model(batch()) * model.scale.sum()).sum()
    af.pgd(model, batch(), labels(), eps=0.3, norm="l2", steps=2)
    loss.backward()
    assert model.head.weight.grad is not None


# --- What the model is while it is looked at ---


def test_the_model_is_in_evaluation_mode_and_frozen(model):
    with attackable(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())


def test_training_mode_keeps_each_modules_own_flag(model):
    flags = [m.training for m in model.modules()]
    assert len(set(flags)) == 2
    with attackable(model, train=True):
        assert [m.training for m in model.modules()] == flags
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("train", [False, True])
def test_logits_are_those_of_the_model_in_that_mode(model, train):
    model.drop.p = 0.0
    with attackable(model, train=train) as net:
        found = net.logits(net.prepare(batch()))
    twin = copy.deepcopy(model)
    expected = (twin if train else twin.eval())(batch())
    torch.testing.assert_close(found, expected.detach())


def test_what_comes_out_holds_no_graph(model):
    with attackable(model) as net:
        inputs = net.prepare(batch().requires_grad_())
        evaluation = net.logits_gradient(inputs, climb())
        results = [inputs, net.logits(inputs), net.features(inputs), *evaluation]
    assert not any(tensor.requires_grad for tensor in results)


def test_prepared_inputs_are_a_copy():
    inputs = batch(2, 6)
    with attackable(dense()) as net:
        net.prepare(inputs).fill_(7)
    assert inputs.max() <= 1


def reaching(net):
    return Wrapped(lambda _, x: net(x))


@pytest.mark.parametrize("look", ["logits", "features"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d(6), nn.Dropout(0.5)])
def test_a_module_in_training_mode_that_the_model_does_not_own_is_told(kind, look):
    net = nn.Sequential(kind, nn.Linear(6, 3)).train()
    model, name = reaching(net), type(kind).__name__
    with (
        attackable(model, layer=lambda x: model(x)) as view,
        pytest.warns(UserWarning, match=f"calls {name} in training mode.*no part of it"),
    ):
        getattr(view, look)(batch(4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attackable(nn.Sequential(net)) as view:
            view.logits(batch(4, 6))
        with attackable(reaching(net.eval())) as view:
            view.logits(batch(4, 6))


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_part_meets_no_hook(in_place):
    part = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    if in_place:
        part.compile(backend="eager")
    else:
        part = torch.compile(part, backend="eager")
    with warnings.catch_warnings(), attackable(nn.Sequential(part, nn.Linear(4, 3))) as view:
        warnings.simplefilter("error")  # torch warns of global hooks
        view.logits(batch(4, 6))


def test_a_data_parallel_wrapper_is_taken_off():
    model = dense()
    with attackable(nn.DataParallel(model), layer="1") as net:
        assert torch.equal(net.logits(batch(2, 6)), model(batch(2, 6)))


def test_a_model_without_parameters_works():
    model = Wrapped(lambda self, x: x @ torch.eye(6)[:, :3])
    with attackable(model) as net:
        evaluation = net.logits_gradient(batch(2, 6), lambda z: z.sum(1))
        assert net.device is None
    assert torch.equal(evaluation.gradient, torch.tensor([[1.0, 1, 1, 0, 0, 0]] * 2))
    assert device_of(model) == torch.device("cpu")


# --- Inside the user's own modes ---


MODES = [
    torch.no_grad,
    torch.enable_grad,
    torch.inference_mode,
    lambda: torch.autocast("cpu", torch.bfloat16),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", LOOKS)
def test_the_users_modes_do_not_change_what_is_seen(model, mode, kind):
    def seen():
        with attackable(model) as net:
            found = look(net, kind, net.prepare(batch()))
        return found if isinstance(found, tuple) else (found,)

    outside = seen()
    with mode():
        inside = seen()
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_an_attack_works_inside_the_users_modes(model, mode):
    expected = af.pgd(model, batch(), labels(), eps=0.3, norm="l2", steps=3)
    with mode():
        # Inference tensors, made inside, cannot enter a gradient as they are.
        found = af.pgd(model, batch(), labels(), eps=0.3, norm="l2", steps=3)
        assert torch.is_grad_enabled() == (mode not in MODES[::2])
    assert torch.equal(found, expected)


# --- Gradients ---


def test_the_gradient_is_that_of_the_objective():
    model, x, y = dense(), batch(3, 6), torch.tensor([0, 1, 2])
    leaf = x.clone().requires_grad_()
    expected = F.cross_entropy(model(leaf), y, reduction="none")
    expected.sum().backward()
    with attackable(model) as net:
        found = net.logits_gradient(x, losses.objective("cross_entropy", y, targeted=False))
    assert torch.equal(found.gradient, leaf.grad)
    assert torch.equal(found.value, expected)
    assert torch.equal(found.output, model(x))


def test_the_gradient_of_features_is_that_of_the_objective():
    model, x = dense(), batch(3, 6)
    leaf = x.clone().requires_grad_()
    features = torch.tanh(model[0](leaf))
    features.square().sum().backward()
    with attackable(model) as net:
        found = net.features_gradient(x, lambda g: g.square().sum(1))
    torch.testing.assert_close(found.gradient, leaf.grad)
    torch.testing.assert_close(found.output, features.detach())


def test_a_samples_gradient_does_not_depend_on_its_batch_mates(model):
    with attackable(model) as net:
        inputs = net.prepare(batch(8))
        together = net.logits_gradient(inputs, climb(8)).gradient
        for row in range(8):
            one = slice(row, row + 1)
            objective = losses.objective("cross_entropy", labels(8)[one], targeted=False)
            alone = net.logits_gradient(inputs[one], objective).gradient
            torch.testing.assert_close(alone, together[one])


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.body(x).detach(),
        lambda self, x: self.body(x.detach()),
        lambda self, x: torch.from_numpy(self.body(x.detach()).detach().numpy()),
        lambda self, x: F.one_hot(self.body(x).argmax(1), 3).float(),
    ],
)
def test_an_output_cut_off_from_the_input_warns_and_gives_zeros(forward):
    model = Wrapped(forward, body=dense())
    with attackable(model) as net, pytest.warns(UserWarning, match="no gradient by its input"):
        found = net.logits_gradient(batch(2, 6), climb(2))
    assert torch.equal(found.gradient, torch.zeros(2, 6))


# --- What models return ---


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: (z, "aux"),
        lambda z: [z, None],
        lambda z: {"loss": None, "logits": z},
        lambda z: types.SimpleNamespace(logits=z, loss=None),
    ],
    ids=["tensor", "tuple", "list", "dict", "attribute"],
)
def test_logits_are_found_in_whatever_a_model_returns(wrap):
    body = dense()
    with attackable(Wrapped(lambda self, x: wrap(self.body(x)), body=body)) as net:
        found = net.logits_gradient(batch(2, 6), climb(2))
        assert torch.equal(net.logits(batch(2, 6)), body(batch(2, 6)))
    assert found.gradient.any()


def test_named_logits_come_before_the_first_item():
    class Output(tuple):
        logits = torch.ones(1, 2)

    assert logits_of(Output((torch.zeros(1, 2),))) is Output.logits


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda x: "no tensor", TypeError, "returned str"),
        (lambda x: {"scores": x}, TypeError, r"returned dict with keys \['scores'\]"),
        (lambda x: (), TypeError, "returned tuple"),
        (lambda x: x.long(), TypeError, "int64"),
        (lambda x: x.sum(1), ValueError, r"\(2,\)"),
        (lambda x: x[:1], ValueError, r"\(1, 6\)"),
        (lambda x: x[:, :1], ValueError, "two classes"),
        (lambda x: x[:, :, None], ValueError, r"\(2, 6, 1\)"),
    ],
)
def test_what_is_no_row_of_logits_is_refused(output, error, message):
    with (
        attackable(Wrapped(lambda self, x: output(x))) as net,
        pytest.raises(error, match=message),
    ):
        net.logits(batch(2, 6))


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        attackable(lambda x: x).__enter__()


def test_labels_are_checked_against_the_classes_before_or_after_they_are_known():
    with attackable(dense()) as net:
        net.expect(torch.tensor([0, 3]))
        with pytest.raises(ValueError, match=r"labels=3: the model has 3 classes"):
            net.logits(batch(2, 6))
    with attackable(dense()) as net:
        assert net.class_count(batch(2, 6)) == 3
        with pytest.raises(ValueError, match=r"targets=5: the model has 3 classes"):
            net.expect(torch.tensor([5]), "targets")


# --- Layers ---


def reached(model, layer, x):
    """A layer's output, by a hook."""
    found = []
    handle = layer.register_forward_hook(lambda m, inputs, output: found.append(output.detach()))
    with torch.no_grad():
        copied = [m.training for m in model.modules()]
        model.eval()(x)
    for module, flag in zip(model.modules(), copied, strict=True):
        module.training = flag
    handle.remove()
    return found[0].flatten(1)


@pytest.mark.parametrize("name", ["conv", "norm", "hidden", "frozen", "head"])
def test_features_are_a_layers_output_by_name_and_by_module(model, name):
    expected = reached(model, model.get_submodule(name), batch())
    for layer in (name, model.get_submodule(name)):
        with attackable(model, layer=layer) as net:
            torch.testing.assert_close(net.features(net.prepare(batch())), expected)


def test_features_may_be_any_function_of_the_inputs(model):
    with attackable(model, layer=lambda x: model.conv(x)[:, :2]) as net:
        found = net.features(net.prepare(batch()))
    torch.testing.assert_close(found, model.conv(batch())[:, :2].flatten(1).detach())


def test_features_are_by_default_the_input_of_the_head(model):
    with attackable(model) as net:
        found = net.features(net.prepare(batch()))
    torch.testing.assert_close(found, reached(model, model.frozen, batch()))


def test_the_default_layer_is_the_linear_called_last_not_the_one_defined_last():
    torch.manual_seed(0)
    head, early = nn.Linear(4, 3), nn.Linear(6, 4)
    model = Wrapped(lambda self, x: self.head(self.early(x).relu()), head=head, early=early)
    with attackable(model) as net:
        assert torch.equal(net.features(batch(2, 6)), early(batch(2, 6)).relu())


def test_a_linear_that_is_called_twice_is_looked_at_the_second_time():
    shared = nn.Linear(6, 6)
    model = Wrapped(lambda self, x: self.shared(self.shared(x)), shared=shared)
    with attackable(model) as net:
        assert torch.equal(net.features(batch(2, 6)), shared(batch(2, 6)))


@pytest.mark.parametrize("layer", ["early", None])
def test_the_pass_ends_at_the_layer(layer):
    calls = []
    late = Wrapped(lambda self, x: calls.append(x) or x)
    early, head = nn.Linear(6, 4), nn.Linear(4, 3)
    model = Wrapped(
        lambda self, x: self.late(self.head(self.early(x))), early=early, head=head, late=late
    )
    with attackable(model, layer=layer) as net:
        net.features(batch(2, 6))
        calls.clear()
        net.features(batch(2, 6))
        net.features_gradient(batch(2, 6), lambda g: g.sum(1))
    assert calls == []


@pytest.mark.parametrize(
    ("layer", "near"), [("hiden", "hidden"), ("norms", "norm"), ("fc", "conv"), ("", "conv")]
)
def test_an_unknown_layer_is_refused_with_the_names_near_it(model, layer, near):
    before = Snapshot(model)
    with (
        pytest.raises(ValueError, match=f"layer={layer!r}.*near.*{near}"),
        attackable(model, layer=layer),
    ):
        pass
    before.assert_unchanged()


def test_a_layer_of_another_model_is_refused(model):
    with (
        pytest.raises(ValueError, match="layer='Linear': this module is not part of the model"),
        attackable(model, layer=Convolutional().head),
    ):
        pass


def test_a_layer_of_another_kind_is_refused(model):
    with pytest.raises(TypeError, match="layer=3"), attackable(model, layer=3):
        pass


def test_a_model_without_linear_has_no_default_layer():
    with (
        attackable(nn.Sequential(nn.Flatten(), nn.ReLU())) as net,
        pytest.raises(ValueError, match=r"layer=None.*no nn\.Linear"),
    ):
        net.features(batch())


def test_a_layer_that_the_pass_does_not_reach_is_refused(model):
    model.add_module("unused", nn.Linear(3, 3))
    with (
        attackable(model, layer="unused") as net,
        pytest.raises(ValueError, match="did not reach this layer"),
    ):
        net.features(net.prepare(batch()))


@pytest.mark.parametrize("output", [lambda x: (x, x), lambda x: x.sum(0)])
def test_activations_that_are_no_tensor_with_a_sample_each_are_refused(output):
    model = Wrapped(lambda self, x: self.odd(x), odd=Wrapped(lambda self, x: output(x)))
    with (
        attackable(model, layer="odd") as net,
        pytest.raises(ValueError, match=r"layer=.*must be a tensor"),
    ):
        net.features(batch(2, 6))


# --- Data types ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LOOKS)
def test_models_of_any_precision_take_float32_inputs(dtype, kind):
    precise = dense()
    model = copy.deepcopy(precise).to(dtype)
    with attackable(precise) as net:
        expected = look(net, kind, batch(3, 6))
    with attackable(model) as net:
        found = look(net, kind, net.prepare(batch(3, 6)))
    pairs = zip(found, expected, strict=True) if "gradient" in kind else [(found, expected)]
    for one, other in pairs:
        assert one.dtype in (torch.float32, dtype)
        assert one.dtype.itemsize >= 4
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_inputs_are_prepared_in_float32_at_least(dtype):
    with attackable(dense()) as net:
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert net.prepare(batch(2, 6).to(dtype)).dtype == expected


def test_a_float64_model_and_inputs_give_float64():
    model = dense().double()
    with attackable(model) as net:
        found = net.logits_gradient(net.prepare(batch(2, 6).double()), climb(2))
    assert {tensor.dtype for tensor in found} == {torch.float64}


@pytest.mark.parametrize("sure", [1.0, 60.0])
def test_a_float16_model_has_gradients_however_sure_it_is(sure):
    # At 60 the gradient of the loss is below 1e-12: float16 would hold zeros.
    precise = dense()
    precise[2].weight.data.mul_(sure)
    x = batch(3, 6)
    objective = losses.objective("cross_entropy", precise(x).argmax(1), targeted=False)
    with attackable(precise) as net:
        expected = net.logits_gradient(x, objective).gradient
    with attackable(copy.deepcopy(precise).half()) as net:
        found = net.logits_gradient(x, objective).gradient
    assert sure == 1.0 or expected.abs().max() < 1e-12
    peak = expected.double().abs().amax(1, keepdim=True)
    # The logits themselves are rounded, which changes a row's length and hardly its direction.
    directions = F.normalize(found.double() / peak), F.normalize(expected.double() / peak)
    torch.testing.assert_close(*directions, rtol=0, atol=0.02)
    if sure == 1.0:
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-4)


def test_a_float16_model_has_finite_gradients_of_large_distances():
    # A squared distance of activations has gradients of thousands, too large to scale up.
    model, x = dense().half(), batch(3, 6)
    with attackable(model, layer="0") as net:
        found = net.features_gradient(x, lambda g: -(g - 5000).square().sum(1)).gradient
    expected = 1e4 * model[0].weight.float().sum(0).expand(3, 6)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=50.0)


def test_bfloat16_where_it_is_only_emulated_warns_and_stays_in_float32(monkeypatch):
    monkeypatch.setattr("advfeat.model.formats.supports_bfloat16", lambda device: False)
    model, seen = dense(), []
    model[0].register_forward_hook(lambda m, inputs, output: seen.append(output.dtype))
    with pytest.warns(UserWarning, match="bfloat16"):
        af.pgd(model, batch(2, 6), labels(2), eps=0.1, norm="l2", steps=2, precision="bfloat16")
    assert set(seen) == {torch.float32}


def test_bfloat16_takes_gradients_in_bfloat16_and_verdicts_in_float32(monkeypatch):
    monkeypatch.setattr("advfeat.model.formats.supports_bfloat16", lambda device: True)
    model, seen = dense(), []
    model[0].register_forward_hook(lambda m, inputs, output: seen.append(output.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attackable(model, precision="bfloat16") as net:
            found = net.logits_gradient(batch(2, 6), climb(2))
            assert seen == [torch.bfloat16]
            verdict = net.logits(batch(2, 6))
    assert seen == [torch.bfloat16, torch.float32]
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert torch.equal(verdict, model(batch(2, 6)))


def test_an_unknown_precision_is_refused(model):
    with pytest.raises(ValueError, match="precision='half'"), attackable(model, precision="half"):
        pass


# --- Memory format ---


def test_a_convolutional_model_gets_channels_last_inputs(model):
    with attackable(model) as net:
        prepared = net.prepare(batch())
    assert prepared.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(prepared, batch())


@pytest.mark.parametrize("shape", [(6,), (3, 8), (3, 8, 8)])
def test_a_model_without_convolutions_gets_contiguous_inputs(shape):
    with attackable(nn.Flatten()) as net:
        assert net.prepare(batch(2, *shape)).is_contiguous()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_that_views_its_activations_gets_contiguous_inputs(channels):
    torch.manual_seed(0)
    conv, head = nn.Conv2d(channels, 4, 3), nn.Linear(4 * 6 * 6, 5)
    model = Wrapped(lambda self, x: self.head(self.conv(x).view(len(x), -1)), conv=conv, head=head)
    inputs = batch(4, channels, 8, 8)
    leaf = inputs.clone().requires_grad_()
    losses.cross_entropy(model(leaf), labels()).sum().backward()
    for _ in range(2):
        with attackable(model) as net:
            found = net.logits_gradient(net.prepare(inputs), climb())
        torch.testing.assert_close(found.gradient, leaf.grad)
    with attackable(model) as net:
        # Learned from the first failure: from now on nothing is tried in vain.
        assert net.prepare(inputs).is_contiguous()


def test_any_other_error_of_the_model_reaches_the_user_at_once():
    tries = []

    def fail(self, x):
        tries.append(x)
        raise RuntimeError("out of memory")

    model = Wrapped(fail, conv=nn.Conv2d(3, 4, 3))
    with attackable(model) as net, pytest.raises(RuntimeError, match="out of memory"):
        net.logits(net.prepare(batch()))
    assert len(tries) == 1


# --- Nesting ---


@pytest.mark.parametrize("outer", [nullcontext, attackable])
def test_looks_may_be_nested(model, outer):
    before = Snapshot(model)
    with outer(model), attackable(model) as net:
        net.logits(net.prepare(batch()))
    before.assert_unchanged()


@pytest.mark.parametrize(
    "pool",
    [
        lambda a: a.mean((2, 3)),
        lambda a: F.adaptive_avg_pool2d(a, 1).flatten(1),
        lambda a: a.mean((2, 3), keepdim=True).flatten(1) + a.amax((2, 3)),
        lambda a: a.flatten(2).mean(2),
    ],
)
def test_the_gradient_behind_a_global_pooling_is_the_plain_one(pool):
    torch.manual_seed(0)
    model = Wrapped(
        lambda m, x: m.head(pool(F.relu(m.conv(x)))), conv=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 5)
    ).double()
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 5
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    with attackable(model) as net:
        climbed = losses.objective("cross_entropy", y, targeted=False)
        found = net.logits_gradient(net.prepare(x), climbed).gradient
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
