"""D_R, D_NR, D_det and D_rand: rows, labels, pairing, provenance, and training on them."""

import functools
import importlib.metadata
import json
import os
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, TensorDataset

import advfeat as af

CLASSES = 4
ORDER = {"l1": 1, "l2": 2, "linf": np.inf}
INVERTED = {"D_R": af.construct_robust_dataset, "D_NR": af.construct_nonrobust_dataset}
TARGETED = {"D_det": af.construct_det_dataset, "D_rand": af.construct_rand_dataset}
FIELDS = {
    "D_R": {"images", "labels", "index", "distance", "distance_before", "size", "start_index"},
    "D_det": {"images", "labels", "index", "source_labels", "success", "size"},
}
FIELDS |= {"D_NR": FIELDS["D_R"], "D_rand": FIELDS["D_det"]}


def dataset(count=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 1, 3, 3, generator=generator, dtype=dtype)
    # Not sorted, so that a mispairing of rows and labels shows.
    return TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator))


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(9, 12),
        nn.Tanh(),
        nn.Linear(12, 7),
        nn.ReLU(),
        nn.Linear(7, CLASSES),
    ).to(dtype)


def made(method, data=None, model=None, **options):
    data = dataset() if data is None else data
    model = network() if model is None else model
    options.setdefault("steps", 5)
    if method in INVERTED:
        return INVERTED[method](model, data, **({"seed": 3} | options))
    options.setdefault("eps", 0.4)
    if method == "D_rand":
        options.setdefault("seed", 3)
    return TARGETED[method](model, data, **options)


METHODS = [*INVERTED, *TARGETED]


# --- What all four share ---


@pytest.mark.parametrize("method", METHODS)
def test_a_set_has_a_sample_for_each_source_sample(method):
    found, (x, y) = made(method), dataset().tensors
    assert len(found) == 24
    assert set(found.fields) == FIELDS[method]
    assert (found.images.shape, found.images.dtype) == (x.shape, torch.float32)
    assert (found.labels.shape, found.labels.dtype) == (y.shape, torch.int64)
    assert found.field("index").tolist() == list(range(24))
    assert {len(array) for array in found.fields.values()} == {24}
    image, label = found[5]
    assert torch.equal(image, found.images[5])
    assert label == found.labels[5]
    assert ((found.images >= 0) & (found.images <= 1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_set_goes_into_a_loader_and_a_model_learns_it(method):
    loader = DataLoader(made(method), batch_size=8, shuffle=True)
    torch.manual_seed(1)
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    history = af.fit(fresh, loader, epochs=60, optimizer=lambda p: torch.optim.Adam(p, lr=0.02))
    assert history.rows[-1]["loss"] < 0.6 * history.rows[0]["loss"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["shuffled", "dropping", "workers", "batch sampler", "dictionary"])
@pytest.mark.slow
def test_the_order_and_kind_of_loader_do_not_matter(method, kind):
    rows = dataset()
    loader = {
        "shuffled": lambda: DataLoader(rows, batch_size=24, shuffle=True),
        "dropping": lambda: DataLoader(rows, batch_size=24, drop_last=True, shuffle=True),
        "workers": lambda: DataLoader(rows, batch_size=24, num_workers=1),
        "batch sampler": lambda: DataLoader(
            rows, batch_sampler=BatchSampler(RandomSampler(rows), 24, drop_last=False)
        ),
        "dictionary": lambda: [{"image": x, "label": int(y)} for x, y in rows],
    }[kind]()
    if kind == "dictionary":
        loader = DataLoader(loader, batch_size=24, shuffle=True)
    found, expected = made(method, loader), made(method)
    for name, array in expected.fields.items():
        np.testing.assert_array_equal(found.fields[name], array)


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_size_does_not_matter(method):
    rows, model = dataset(dtype=torch.float64), network(torch.float64)
    whole = made(method, rows, model)
    for size in (1, 7):
        found = made(method, rows, model, batch_size=size)
        for name, array in whole.fields.items():
            np.testing.assert_allclose(found.fields[name], array, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_float64_images_of_a_float32_model_make_float32_sets(method):
    # NumPy's own precision; the model reads it in float32.
    found, expected = made(method, dataset(dtype=torch.float64)), made(method, dataset())
    assert found.images.dtype == torch.float32
    assert made(method, dataset(dtype=torch.float64), network(torch.float64)).images.dtype == (
        torch.float64
    )
    assert found.field("index").tolist() == expected.field("index").tolist()
    network()(found.images)  # as any training loop does


@pytest.mark.parametrize("method", METHODS)
def test_a_subset_is_numbered_by_its_own_samples(method):
    kept = [20, 3, 11, 7]
    found = made(method, Subset(dataset(), kept))
    y = dataset().tensors[1][kept]
    assert found.field("index").tolist() == [0, 1, 2, 3]
    source = found.labels if method in INVERTED else found.field("source_labels")
    assert torch.equal(source, y)


@pytest.mark.parametrize("method", ["D_R", "D_NR", "D_rand"])
def test_a_seed_reproduces_a_set(method):
    first, again, other = (made(method, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(again.images, first.images)
    assert torch.equal(again.labels, first.labels)
    assert not torch.equal(other.images, first.images)


@pytest.mark.parametrize("method", ["D_R", "D_NR", "D_rand"])
def test_without_a_seed_torch_manual_seed_governs_and_the_manifest_tells(method):
    model = network()
    torch.manual_seed(5)
    first, second = made(method, model=model, seed=None), made(method, model=model, seed=None)
    torch.manual_seed(5)
    assert torch.equal(made(method, model=model, seed=None).images, first.images)
    assert not torch.equal(second.images, first.images)
    told = second.manifest["settings"]["seed"]
    assert torch.equal(made(method, model=model, seed=told).images, second.images)


@pytest.mark.parametrize("method", METHODS)
def test_the_manifest_is_json_and_says_how_the_set_was_made(method):
    found = made(method)
    manifest = json.loads(json.dumps(found.manifest))
    assert manifest["method"] == method
    assert manifest["model"]["class"] == "Sequential"
    assert manifest["samples"] == 24
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["advfeat"] == af.__version__
    settings = manifest["settings"]
    assert settings["steps"] == 5
    assert settings["bounds"] == [0.0, 1.0]
    assert (settings["precision"], settings["dtype"]) == ("float32", "float32")
    if method != "D_det":
        assert settings["seed"] == 3
    if method in TARGETED:
        assert (settings["eps"], settings["norm"]) == (0.4, "l2")
        assert settings["step_size"] == pytest.approx(0.4 / 5)
        assert settings["targeted"]


def test_numpy_settings_make_a_json_manifest_too():
    options = {"bounds": (np.float32(0), np.float32(1)), "steps": np.int64(3)}
    one = made("D_det", shift=np.int64(2), eps=np.float32(0.5), **options)
    two = made("D_R", step_size=np.float32(0.5), seed=np.int64(3), **options)
    assert json.loads(json.dumps(one.manifest))["settings"]["shift"] == 2
    assert json.loads(json.dumps(one.manifest))["settings"]["steps"] == 3
    assert json.loads(json.dumps(two.manifest))["settings"]["seed"] == 3


def test_the_package_need_not_be_installed(monkeypatch):
    # As from a checkout on PYTHONPATH: there is no metadata, and a long run must not end so.
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert made("D_det").manifest["versions"]["advfeat"] == af.__version__


# --- D_det and D_rand ---


@pytest.mark.parametrize("shift", [1, 3])
def test_det_labels_are_the_true_ones_moved_on(shift):
    found, y = made("D_det", shift=shift), dataset().tensors[1]
    assert torch.equal(found.field("source_labels"), y)
    assert torch.equal(found.labels, (y + shift) % CLASSES)


@pytest.mark.parametrize("method", TARGETED)
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_images_are_those_of_targeted_pgd_and_never_stopped_early(method, norm):
    model, (x, _) = network(), dataset().tensors
    found = made(method, model=model, norm=norm, steps=10)
    expected = af.pgd(
        model, x, found.labels, eps=0.4, norm=norm, steps=10, step_size=0.08, targeted=True
    )
    torch.testing.assert_close(found.images, expected)
    size = np.linalg.norm((found.images - x).flatten(1).double().numpy(), ORDER[norm], axis=1)
    assert (size <= 0.4 + 1e-6).all()
    np.testing.assert_allclose(found.fields["size"], size, atol=1e-6)


@pytest.mark.parametrize("method", TARGETED)
def test_success_is_what_the_model_says_of_the_images(method):
    model = network()
    found = made(method, model=model, eps=1.0, steps=20)
    with torch.no_grad():
        expected = model(found.images).argmax(1) == found.labels
    assert torch.equal(found.field("success"), expected)
    assert 0 < expected.sum() < 24


@pytest.mark.parametrize("exclude_label", [False, True])
def test_rand_targets_are_uniform(exclude_label):
    count = 2000
    rows = TensorDataset(torch.rand(count, CLASSES), torch.arange(count) % CLASSES)
    options = {"steps": 1, "exclude_label": exclude_label, "seed": 0}
    found = af.construct_rand_dataset(nn.Identity(), rows, **options)
    moved = (found.labels - found.field("source_labels")) % CLASSES
    counts = torch.bincount(moved, minlength=CLASSES)
    share = 1 / (CLASSES - 1) if exclude_label else 1 / CLASSES
    # Five standard deviations of a binomial count.
    near = 5 * (count * share * (1 - share)) ** 0.5
    assert (counts[1:] - count * share).abs().max() < near
    if exclude_label:
        assert counts[0] == 0
    else:
        assert abs(counts[0] - count * share) < near


def test_a_target_does_not_depend_on_the_samples_around_it():
    # Drawn by row number: the first rows of a larger set have the same targets.
    small, large = made("D_rand", dataset(24)), made("D_rand", dataset(60))
    assert torch.equal(small.labels, large.labels[:24])


def test_the_defaults_are_the_papers():
    model = network()
    for method in TARGETED:
        settings = TARGETED[method](model, dataset(2)).manifest["settings"]
        assert (settings["eps"], settings["norm"], settings["steps"]) == (0.5, "l2", 100)
        assert settings["step_size"] == pytest.approx(0.1)
    settings = af.construct_robust_dataset(model, dataset(2), layer=lambda x: x).manifest[
        "settings"
    ]
    assert (settings["steps"], settings["step_size"]) == (1000, 0.1)


# --- D_R and D_NR ---


def penultimate(model, x):
    with torch.no_grad():
        return model[:5](x)


@pytest.mark.parametrize("method", INVERTED)
def test_activations_come_close_to_those_of_the_source(method):
    model, (x, y) = network(), dataset().tensors
    found = made(method, model=model, steps=60)
    assert torch.equal(found.labels, y)
    started = x[found.field("start_index")]
    goal = penultimate(model, x)
    after = (penultimate(model, found.images) - goal).norm(dim=1)
    before = (penultimate(model, started) - goal).norm(dim=1)
    torch.testing.assert_close(found.field("distance"), after)
    torch.testing.assert_close(found.field("distance_before"), before)
    torch.testing.assert_close(found.field("size"), (found.images - started).flatten(1).norm(dim=1))
    assert after.mean() < 0.3 * before.mean()


def test_starts_are_other_samples_and_uniform():
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, CLASSES))
    found = made("D_R", dataset(2000), model, steps=1)
    start = found.field("start_index")
    away = (start - found.field("index")) % 2000
    assert away.min() >= 1
    # Quarters of the distance are equally likely, to five standard deviations.
    counts = torch.histc(away.float(), 4, 1, 2000)
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    # Not one fixed cycle: rows share starts.
    assert start.unique().numel() < 1500


def test_a_start_is_the_image_of_its_index():
    x, _ = dataset().tensors
    found = made("D_R", steps=1, step_size=1e-6)
    torch.testing.assert_close(found.images, x[found.field("start_index")], rtol=0, atol=2e-6)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 3.0)])
def test_a_noise_start_is_the_notebooks(bounds):
    low, high = bounds
    found = made("D_R", dataset(400), steps=1, step_size=1e-6, start="noise", bounds=bounds)
    unit = (found.images - low) / (high - low)
    assert unit.mean() == pytest.approx(0.5, abs=0.005)
    assert unit.std() == pytest.approx(0.05, abs=0.003)
    assert len(unit.flatten(1).unique(dim=0)) == 400
    assert "start_index" not in found.fields


def test_given_starts_keep_their_samples():
    start = torch.rand(24, 1, 3, 3)
    before = start.clone()
    loader = DataLoader(dataset(), batch_size=5, shuffle=True)
    found = made("D_R", loader, steps=1, step_size=1e-6, start=start)
    torch.testing.assert_close(found.images, start, rtol=0, atol=2e-6)
    assert torch.equal(start, before)


def test_a_layer_by_name_module_and_callable_is_the_same():
    model = network()
    by_name = made("D_R", model=model, layer="2")
    for layer in (model[2], lambda x: model[:3](x)):
        found = made("D_R", model=model, layer=layer)
        torch.testing.assert_close(found.images, by_name.images)
        json.dumps(found.manifest)
    assert by_name.manifest["settings"]["layer"] == "2"
    assert made("D_R", model=model, layer=model[2]).manifest["settings"]["layer"] == "2"
    assert not torch.equal(made("D_R", model=model).images, by_name.images)


# --- Patience: rows leave when they are finished, others take their places ---


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_a_sample_does_not_depend_on_the_pool(size):
    rows, model = dataset(dtype=torch.float64), network(torch.float64)
    options = {"steps": 60, "patience": 3, "step_size": 0.05}
    found = made("D_R", rows, model, batch_size=size, **options)
    x, start = rows.tensors[0], rows.tensors[0][found.field("start_index")]
    alone = [af.attacks.invert(model, x[i : i + 1], start[i : i + 1], **options) for i in range(24)]
    torch.testing.assert_close(found.images, torch.cat(alone), rtol=0, atol=1e-9)
    assert found.field("index").tolist() == list(range(24))
    assert torch.equal(found.labels, rows.tensors[1])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_an_attacked_sample_does_not_depend_on_the_pool(size):
    rows, model = dataset(dtype=torch.float64), network(torch.float64)
    options = {"eps": 0.4, "steps": 40, "step_size": 0.08, "patience": 3}
    found = made("D_rand", rows, model, batch_size=size, **options)
    x, targets = rows.tensors[0], found.labels
    ball = options | {"norm": "l2", "targeted": True}
    alone = [af.pgd(model, x[i : i + 1], targets[i : i + 1], **ball) for i in range(24)]
    torch.testing.assert_close(found.images, torch.cat(alone), rtol=0, atol=1e-9)
    assert found.field("index").tolist() == list(range(24))


def test_patience_saves_gradients_and_keeps_the_success():
    model, passes = network(), []
    model[1].register_forward_hook(lambda _, x, __: passes.append(len(x[0])))
    whole = made("D_det", model=model, steps=100)
    all_rows = sum(passes)
    passes.clear()
    found = made("D_det", model=model, steps=100, patience=10)
    assert sum(passes) < 0.7 * all_rows
    assert torch.equal(found.field("success"), whole.field("success"))
    assert (whole.field("success").sum() > 0) & (found.field("size") <= 0.4 + 1e-6).all()

    def loss(of):
        return nn.functional.cross_entropy(network()(of.images), of.labels)

    assert loss(found) < 1.01 * loss(whole)
    assert found.manifest["settings"]["patience"] == 10


def test_momentum_is_a_setting_of_the_set(tmp_path):
    whole = made("D_NR", out=tmp_path / "set", momentum=0.9)
    assert whole.manifest["settings"]["momentum"] == 0.9
    assert not torch.equal(whole.images, made("D_NR").images)
    with pytest.raises(ValueError, match="momentum"):
        made("D_NR", out=tmp_path / "set")


@pytest.mark.slow
def test_patience_saves_gradients_and_keeps_the_distance():
    model, passes = network(), []
    model[1].register_forward_hook(lambda _, x, __: passes.append(len(x[0])))
    options = {"steps": 400, "step_size": 0.02, "batch_size": 8}
    whole = made("D_R", model=model, **options)
    all_rows = sum(passes)
    passes.clear()
    found = made("D_R", model=model, patience=20, **options)
    assert sum(passes) < 0.7 * all_rows
    assert found.field("distance").mean() < 1.05 * whole.field("distance").mean() + 0.01
    assert found.manifest["settings"]["patience"] == 20
    assert whole.manifest["settings"]["patience"] is None


def test_a_set_made_with_patience_is_resumed(tmp_path):
    options = {"steps": 40, "patience": 3, "batch_size": 8}
    whole = made("D_R", out=tmp_path / "set", **options)
    expected = whole.images.clone()
    done = np.load(tmp_path / "set" / "done.npy")
    done[5:] = 0
    np.save(tmp_path / "set" / "done.npy", done)
    torch.testing.assert_close(
        made("D_R", out=tmp_path / "set", **options).images, expected, rtol=0, atol=1e-5
    )


# --- 256 levels ---


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 3.0)])
@pytest.mark.parametrize("method", ["D_R", "D_det"])
def test_images_are_rounded_and_measured_as_they_are_kept(method, bounds, tmp_path):
    model, options = network(), {"bounds": bounds, "steps": 10}
    plain = made(method, model=model, **options)
    found = made(method, model=model, dtype="uint8", out=tmp_path / "set", **options)
    assert found.fields["images"].dtype == np.uint8
    assert found.images.dtype == torch.float32
    width = bounds[1] - bounds[0]
    assert (found.images - plain.images).abs().max() <= width / 510 + 1e-6
    assert found.images.min() >= bounds[0]
    assert found.images.max() <= bounds[1]
    moved = (found.images - plain.images).flatten(1).norm(dim=1)
    torch.testing.assert_close(found.field("rounding"), moved)
    assert torch.equal(found[3][0], found.images[3])
    if method == "D_R":
        goal = penultimate(model, dataset().tensors[0])
        distance = (penultimate(model, found.images) - goal).norm(dim=1)
        torch.testing.assert_close(found.field("distance"), distance)
        assert torch.equal(found.field("distance_unrounded"), plain.field("distance"))
    else:
        with torch.no_grad():
            hits = model(found.images).argmax(1) == found.labels
        assert torch.equal(found.field("success"), hits)
        assert torch.equal(found.field("success_unrounded"), plain.field("success"))


def test_rounding_can_undo_an_attack_and_that_is_told():
    # A perturbation far below a level: every success is lost, and it shows.
    # Levels themselves, so that nothing but the perturbation is rounded.
    x = torch.tensor([[100 / 255, 100 / 255]] * 6)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * 1e4)
        model.bias.copy_(torch.tensor([0.5, -0.5]))
    rows = TensorDataset(x, torch.zeros(6, dtype=torch.int64))
    found = af.construct_det_dataset(model, rows, eps=1e-3, steps=5, dtype="uint8")
    assert found.field("success_unrounded").all()
    assert not found.field("success").any()


# --- Beside the rows ---


@pytest.mark.parametrize("opened", [False, True])
def test_pairs_and_subsets_keep_samples_together(opened, tmp_path):
    rows = Subset(dataset(), [20, 3, 11, 7, 0])
    found = made("D_det", rows, out=tmp_path / "set" if opened else None)
    for row, (source, image) in enumerate(found.pairs(rows)):
        assert torch.equal(source, rows[row][0])
        assert torch.equal(image, found.images[row])
    part = found.subset([4, 1])
    assert len(part) == 2
    assert torch.equal(part.images, found.images[[4, 1]])
    assert torch.equal(part.labels, found.labels[[4, 1]])
    source, image = part.pairs(DataLoader(rows, shuffle=True))[1]
    assert torch.equal(source, rows[1][0])
    assert torch.equal(image, found.images[1])
    assert torch.equal(found.subset(slice(1, 3)).images, found.images[1:3])
    mask = found.field("success")
    assert len(found.subset(mask)) == mask.sum()
    with pytest.raises(ValueError, match=r"indices=\(3,\)"):
        found.subset(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="data='2 samples'"):
        found.pairs(Subset(dataset(), [1, 2]))
    other = TensorDataset(rows.dataset.tensors[0], rows.dataset.tensors[1] + 1)
    with pytest.raises(ValueError, match=r"data=.*at sample 0.*another order"):
        found.pairs(Subset(other, rows.indices))


# --- Compilation ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("D_R", {}),
        ("D_R", {"layer": "1"}),
        ("D_NR", {"layer": lambda x: x.flatten(1).square()}),
        ("D_det", {}),
    ],
)
def test_a_compiled_model_makes_the_same_set(method, options, monkeypatch):
    # The real compiler but for its last part, which takes seconds to write machine code.
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    expected = made(method, dataset(11), batch_size=4, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "compile=True")  # it must not fall back here
        found = made(method, dataset(11), batch_size=4, compile=True, **options)
    torch.testing.assert_close(found.images, expected.images, atol=1e-5, rtol=0.0)
    assert torch.equal(found.labels, expected.labels)
    assert "compile" not in found.manifest["settings"]


@pytest.mark.slow
def test_one_model_is_compiled_for_several_layers(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, data = network(), dataset(6)
    for layer in ("1", None, "3", "1"):
        expected = made("D_R", data, model, layer=layer)
        found = made("D_R", data, model, layer=layer, compile=True)
        torch.testing.assert_close(found.images, expected.images, atol=1e-5, rtol=0.0)


def test_workers_are_not_forked_from_the_thread_that_reads_ahead(monkeypatch):
    threads, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: (threads.append(threading.current_thread()), fork())[1])
    rows = dataset()
    loader = DataLoader(rows, batch_size=24, num_workers=1, multiprocessing_context="fork")
    made("D_det", loader)
    assert threads
    assert set(threads) == {threading.main_thread()}
