"""Batches that are mappings: what forward takes by name goes with the samples (A9)."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, StackDataset

import advfeat as af
from advfeat import attacks
from advfeat.analysis import mistakes
from advfeat.metrics import diagnose, robustness_curve, transfer_matrix
from advfeat.training import Options

COUNT, LENGTH, WIDTH, CLASSES = 30, 6, 3, 3
EPS = 0.02

MARGIN = attacks.PGD(eps=EPS, norm="linf", steps=8, loss="margin")


class Masked(nn.Module):
    """Linear in the inputs that the mask keeps; without a mask, in all of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(LENGTH * WIDTH, CLASSES)

    def forward(self, x, attention_mask=None):
        if attention_mask is not None:
            x = x * attention_mask[:, :, None]
        return self.head(x.flatten(1))


class Recurrent(nn.Module):
    """The output of an LSTM at the last step of each sequence; at the first without lengths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(WIDTH, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, sequences, lengths=None):
        lengths = torch.ones(len(sequences), dtype=torch.int64) if lengths is None else lengths
        outputs, _ = self.lstm(sequences)
        return 20 * self.head(outputs[torch.arange(len(sequences)), lengths - 1])


class Entries(Dataset):
    """Samples that are mappings, with entries that no model takes."""

    def __init__(self, inputs, labels, **others):
        self.inputs, self.labels, self.others = inputs, labels, others

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        sample = {name: values[i] for name, values in self.others.items()}
        return {**sample, "inputs": self.inputs[i], "labels": self.labels[i], "name": f"no. {i}"}


def extra_name(model):
    return "attention_mask" if isinstance(model, Masked) else "lengths"


def case(make):
    """A model, its inputs, the argument by name, and its own predictions."""
    model, generator = make(), torch.Generator().manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(COUNT, LENGTH, WIDTH, generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (COUNT,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    extra = mask if make is Masked else lengths
    with torch.no_grad():
        # So that each class occurs.
        model.head.bias -= model(x, extra).mean(0) / (20 if make is Recurrent else 1)
        y = model(x, extra).argmax(1)
    return model, x, extra, y


def exact_distance(model, x, mask, y):
    """Distance in linf to the nearest of the other classes, in closed form."""
    weight = model.head.weight * mask.repeat_interleave(WIDTH, 1)[:, None]  # (N, C, D)
    logits = model(x, mask)
    rows = torch.arange(len(x))
    gap = logits[rows, y][:, None] - logits
    pull = (weight[rows, y][:, None] - weight).abs().sum(2)
    return (gap / pull).nan_to_num(torch.inf).scatter(1, y[:, None], torch.inf).amin(1).detach()


def robust_one_by_one(model, x, extra, y, attack):
    """Whether each sample is robust, each attacked alone by a model that has its argument."""

    class Bound(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.model, self.own = model, own

        def forward(self, x):
            return self.model(x, self.own.expand(len(x), *self.own.shape[1:]))

    found = []
    for i in range(len(x)):
        one = slice(i, i + 1)
        made = attack(Bound(extra[one]), x[one], y[one], index=torch.tensor([i]))
        found.append(bool(model(made, extra[one]).argmax(1) == y[one]))
    return torch.tensor(found)


def loader(model, x, extra, y, batch_size=8):
    data = Entries(x, y, **{extra_name(model): extra})
    return DataLoader(data, batch_size=batch_size, shuffle=True)


@pytest.mark.parametrize("batch_size", [4, 30])
def test_masked_model_has_its_exact_robust_accuracy(batch_size):
    model, x, mask, y = case(Masked)
    distance = exact_distance(model, x, mask, y)
    data = loader(model, x, mask, y, batch_size)
    assert af.accuracy(model, data) == 1.0
    assert (model(x).argmax(1) == y).float().mean() < 0.8  # without the mask
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        robust = af.robust_accuracy(model, data, attack=MARGIN)
    assert torch.equal(robust.correct, distance > EPS)
    assert 0.1 < robust < 0.9


def test_masked_model_has_its_exact_curve():
    model, x, mask, y = case(Masked)
    curve = robustness_curve(
        model, loader(model, x, mask, y), norm="linf", attack=attacks.FMN(norm="linf", steps=60)
    )
    torch.testing.assert_close(
        curve.distance, exact_distance(model, x, mask, y), rtol=0.02, atol=1e-4
    )


@pytest.mark.slow
def test_samples_keep_their_lengths_in_the_pool():
    """Samples leave one by one and others take their places; the result is that of each alone."""
    model, x, lengths, y = case(Recurrent)
    ball = {"eps": EPS, "norm": "l2"}
    several = [
        attacks.APGD(**ball, steps=5, targets=2, seed=1),
        attacks.SmoothedPGD(**ball, steps=5, seed=1),
        attacks.FMN(**ball, steps=8),
        attacks.Square(**ball, queries=20, seed=1),
    ]
    data = Entries(x, y, lengths=lengths)
    found = [
        af.robust_accuracy(model, data, attack=several, batch_size=size) for size in (5, COUNT)
    ]
    assert torch.equal(found[0].broken_by, found[1].broken_by)
    attack = attacks.PGD(**ball, steps=6)
    robust = af.robust_accuracy(model, data, attack=attack, batch_size=7)
    alone = robust_one_by_one(model, x, lengths, y, attack.stop_at_success())
    assert torch.equal(robust.correct, alone)
    assert 0 < robust.count < COUNT


FUNCTIONS = {
    "pgd": lambda *a, **k: af.pgd(*a, eps=EPS, norm="linf", steps=10, **k),
    "fgsm": lambda *a, **k: attacks.fgsm(*a, eps=EPS, norm="linf", **k),
    "apgd": lambda *a, **k: attacks.apgd(*a, eps=EPS, norm="linf", steps=10, **k),
    "square": lambda *a, **k: attacks.square(*a, eps=EPS, norm="linf", queries=300, seed=0, **k),
    "smoothed": lambda *a, **k: attacks.smoothed_pgd(
        *a, eps=EPS, norm="linf", steps=20, seed=0, **k
    ),
    "AutoAttack": lambda *a, **k: attacks.AutoAttack(
        eps=EPS, norm="linf", version="fast", seed=0
    )(*a, **k),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_extras_of_the_attack_functions(name):
    model, x, mask, y = case(Masked)
    made = FUNCTIONS[name](model, x, y, extras={"attention_mask": mask})
    assert (made - x).abs().max() <= EPS + 1e-6
    robust = model(made, mask).argmax(1) == y
    exact = exact_distance(model, x, mask, y) > EPS
    assert (robust == exact).float().mean() >= (0.85 if name == "square" else 0.95)
    assert not (exact & ~robust).any()


@pytest.mark.parametrize("name", ["fmn", "fab", "minimum_pgd"])
def test_extras_of_minimum_norm_attacks(name):
    model, x, mask, y = case(Masked)
    made = getattr(attacks, name)(model, x, y, norm="linf", extras={"attention_mask": mask})
    exact = exact_distance(model, x, mask, y)
    assert (((made - x).flatten(1).abs().amax(1) / exact).log().abs() < 0.05).float().mean() > 0.9


def test_extras_that_forward_does_not_take():
    model, x, mask, y = case(Masked)
    with pytest.raises(ValueError, match=r"did you mean 'attention_mask'"):
        af.pgd(model, x, y, eps=EPS, norm="linf", extras={"attn_mask": mask})
    with pytest.raises(ValueError, match=r"expected a tensor \(30, ...\)"):
        af.pgd(model, x, y, eps=EPS, norm="linf", extras={"attention_mask": mask[:3]})


def test_transfer_diagnose_and_mistakes():
    model, x, mask, y = case(Masked)
    data = Entries(x, y, attention_mask=mask)
    matrix = transfer_matrix(
        {"a": model}, {"a": model}, data, af.PGD(eps=EPS, norm="linf", loss="margin")
    )
    exact = exact_distance(model, x, mask, y) > EPS
    assert matrix.clean_error.item() == 0
    assert matrix.of_all.item() == pytest.approx(float((~exact).float().mean()), abs=0.03)
    found = diagnose(model, data, eps=EPS, norm="linf", samples=20, queries=10)
    assert "ok      random_predictions" in str(found)
    with pytest.raises(ValueError, match="makes no mistake"):
        mistakes(model, data)


@pytest.mark.slow
def test_constructions():
    model, x, mask, y = case(Masked)
    data = loader(model, x, mask, y)
    made = af.construct_det_dataset(model, data, eps=1.0, norm="l2", steps=40)
    targets = (y + 1) % CLASSES
    assert torch.equal(made.labels, targets)
    assert torch.equal(model(made.images, mask).argmax(1) == targets, made.field("success"))
    assert made.field("success").float().mean() > 0.6
    assert ((made.images - x) * (1 - mask)[:, :, None]).abs().max() == 0
    inverted = af.construct_robust_dataset(
        model, data, layer="head", start="noise", steps=400, step_size=0.02, seed=0
    )
    gap = (model(inverted.images, mask) - model(x, mask)).norm(dim=1)
    torch.testing.assert_close(gap.detach(), inverted.field("distance"), rtol=1e-4, atol=1e-5)
    assert gap.max() < 0.02 < inverted.field("distance_before").mean()


@pytest.mark.parametrize(
    "objective",
    [
        "fit",
        pytest.param("pgd", marks=pytest.mark.slow),
        pytest.param("trades", marks=pytest.mark.slow),
    ],
)
def test_training_passes_them_on(objective):
    """What the mask hides says the other label: without the mask nothing can be learned."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (96,), generator=generator)
    mask = torch.zeros(96, LENGTH)
    mask[torch.arange(96), torch.randint(LENGTH, (96,), generator=generator)] = 1
    mean = torch.where(mask.bool(), y[:, None].float(), 1 - y[:, None].float())
    x = (0.5 + 0.6 * (mean - 0.5))[:, :, None].expand(-1, -1, WIDTH).contiguous()
    model = Masked()
    data = Entries(x, y, attention_mask=mask)
    settings = {"epochs": 12, "optimizer": torch.optim.Adam(model.parameters(), 0.15), "seed": 0}
    if objective == "fit":
        options = Options(accumulate=2, ema=0.5)
        history = af.fit(model, data, options=options, validation=data, batch_size=16, **settings)
    else:
        loaded = DataLoader(data, batch_size=16, shuffle=True)
        history = af.adversarial_fit(
            model, loaded, objective=objective, eps=0.05, norm="linf", steps=2, validation=loaded,
            **settings,
        )  # fmt: skip
    assert history.rows[-1]["val_accuracy"] == af.accuracy(model, data) == 1.0
    assert af.robust_accuracy(model, data, eps=0.05, norm="linf", steps=5) == 1.0


class Embedded(nn.Module):
    """As a language model of transformers: tokens first, or embeddings by name."""

    def __init__(self, masked):
        super().__init__()
        self.masked, self.table = masked, nn.Embedding(5, WIDTH)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None):
        assert labels is None
        assert (input_ids is None) != (inputs_embeds is None)
        x = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        return {"logits": self.masked(x, attention_mask)}


class Passing(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, **kwargs):
        return self.module(x, **kwargs)


class Looking(nn.Module):
    """Takes what it needs out of the keywords."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, **kwargs):
        return self.module(x, kwargs.get("attention_mask"))


class Keywords(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, attention_mask, *, inputs):
        return self.module(inputs, attention_mask)


@pytest.mark.parametrize(
    "kind",
    [
        "embeddings",
        "kwargs",
        "kwargs.get",
        "normalised",
        "by name",
        pytest.param("compiled", marks=pytest.mark.slow),
    ],
)
def test_ways_to_name_arguments(kind):
    plain, x, mask, y = case(Masked)
    model = {
        "embeddings": lambda: Embedded(plain),
        "kwargs": lambda: Passing(plain),
        "kwargs.get": lambda: Looking(plain),
        "normalised": lambda: af.Normalize(plain, 0.0, 1.0),
        "compiled": lambda: torch.compile(plain, backend="eager"),
        "by name": lambda: Keywords(plain),
    }[kind]()
    data = Entries(x, y, attention_mask=mask.numpy())
    exact = exact_distance(plain, x, mask, y) > EPS
    robust = af.robust_accuracy(model, data, attack=MARGIN, batch_size=8)
    assert robust.standard == 1.0
    assert torch.equal(robust.correct, exact)
    if kind != "by name":
        made = af.pgd(
            model, x, y, eps=EPS, norm="linf", loss="margin", extras={"attention_mask": mask}
        )
        assert ((plain(made, mask).argmax(1) == y) == exact).float().mean() > 0.95


@pytest.mark.parametrize("batch_size", [4, LENGTH])
def test_lists_that_default_collate_turns_over(batch_size):
    plain, x, mask, y = case(Masked)
    data = Entries(x, y, attention_mask=[one.int().tolist() for one in mask])
    robust = af.robust_accuracy(plain, data, attack=MARGIN, batch_size=batch_size)
    assert robust.standard == 1.0
    assert torch.equal(robust.correct, exact_distance(plain, x, mask, y) > EPS)


def test_a_dataset_is_not_made_of_samples_of_two_shapes():
    def padded(samples):
        inputs = nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True)
        return inputs, torch.tensor([y for _, y in samples])

    data = StackDataset([torch.rand(4 + 2 * (n > 1), 2) for n in range(4)], [0, 1, 0, 1])
    loader = DataLoader(data, batch_size=2, collate_fn=padded)
    model = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"inputs.shape=\(6, 2\): the first sample has \(4, 2\)"):
        af.construct_det_dataset(model, loader, eps=0.1, steps=1)


def test_batches_padded_to_lengths_of_their_own():
    """Each batch is as long as its longest sequence; results are those of one long batch."""
    model, x, lengths, y = case(Recurrent)
    batches = []
    for i in range(0, COUNT, 2):
        part = slice(i, i + 2)
        longest = int(lengths[part].max())
        batches.append({"inputs": x[part, :longest], "labels": y[part], "lengths": lengths[part]})
    assert len({batch["inputs"].shape for batch in batches}) > 1
    data = Entries(x, y, lengths=lengths)
    attack = attacks.APGD(eps=EPS, norm="linf", steps=5, seed=0)
    found, expected = (
        af.robust_accuracy(model, given, attack=attack, batch_size=6) for given in (batches, data)
    )
    assert torch.equal(found.correct, expected.correct)
    assert 0 < found.count < COUNT
    with pytest.raises(ValueError, match="keep_inputs=True: inputs of two shapes"):
        af.robust_accuracy(model, batches, attack=attack, keep_inputs=True)
    fmn = attacks.FMN(norm="linf", steps=10)
    curves = (robustness_curve(model, given, norm="linf", attack=fmn) for given in (batches, data))
    torch.testing.assert_close(*(curve.distance for curve in curves))


def test_an_entry_that_is_no_tensor():
    model, x, _, y = case(Masked)
    data = Entries(x, y, attention_mask=["all"] * COUNT)
    with pytest.raises(ValueError, match="attention_mask of a batch='list'"):
        af.accuracy(model, data)


class OnlyKeywords(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **entries):
        return self.module(entries["inputs"])


def test_lists_of_numbers_and_inputs_among_keywords():
    plain, x, mask, y = case(Masked)
    batches = [{"inputs": x, "labels": y, "attention_mask": mask.float().tolist()}]
    assert af.accuracy(plain, batches) == 1.0
    with torch.no_grad():
        expected = (plain(x).argmax(1) == y).float().mean().item()
    assert af.accuracy(OnlyKeywords(plain), Entries(x, y)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("extras", "cause"),
    [([1], "expected a mapping"), ({"attention_mask": None}, "leave it out")],
)
def test_extras_that_are_no_tensors_by_name(extras, cause):
    model, x, _, y = case(Masked)
    with pytest.raises(TypeError, match=cause):
        af.pgd(model, x, y, eps=EPS, norm="linf", extras=extras)


@pytest.mark.parametrize("kind", [lambda t: t, lambda t: t.numpy()])
def test_training_on_a_pair_of_tensors(kind):
    model, x, _, y = case(Masked)
    pair = (kind(x), kind(y))
    history = af.fit(model, pair, epochs=2, batch_size=10, validation=pair, seed=0)
    assert history.rows[-1]["val_accuracy"] == af.accuracy(model, pair)
    af.adversarial_fit(
        model, pair, eps=EPS, norm="linf", steps=1, epochs=1, validation=pair, seed=0
    )
