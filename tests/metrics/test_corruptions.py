"""Common corruptions: what each does in closed form, the folder of CIFAR-10-C, mCE."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af
from advfeat import seeding
from advfeat.metrics import corruption_accuracy
from advfeat.metrics._corruptions import CORRUPTIONS, corrupted

KEYS = seeding.keys(0, torch.arange(6))


def images(count=6, channels=3, size=16):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def model(channels=3, size=16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 3))


@pytest.mark.parametrize("constants", ["cifar10", "imagenet"])
@pytest.mark.parametrize("severity", [1, 5])
def test_noise_has_its_size(severity, constants):
    x = torch.full((6, 3, 64, 64), 0.5)
    strength = {n: CORRUPTIONS[n].constant(constants, severity) for n in CORRUPTIONS}
    for name, scale in (("gaussian_noise", 1.0), ("speckle_noise", 0.5)):
        noise = CORRUPTIONS[name].apply(x, strength[name], KEYS, 3) - x
        assert float(noise.std()) == pytest.approx(scale * strength[name], rel=0.02)
        assert abs(float(noise.mean())) < 0.01 * strength[name] + 1e-3
    changed = corrupted(x, "impulse_noise", severity, constants, KEYS)
    amount = strength["impulse_noise"]
    for value in (0.0, 1.0):
        assert float((changed == value).double().mean()) == pytest.approx(amount / 2, rel=0.1)


@pytest.mark.parametrize("constants", ["cifar10", "imagenet"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_stronger_than_the_one_before(name, constants):
    falling = name in ("contrast", "jpeg_compression")  # what is left of the image
    values = [CORRUPTIONS[name].constant(constants, severity) for severity in range(1, 6)]
    values = [-value for value in values] if falling else values
    assert all(weak < strong for weak, strong in itertools.pairwise(values))


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
def test_blur_is_that_of_scipy(sigma):
    ndimage = pytest.importorskip("scipy.ndimage")
    x = images()
    expected = ndimage.gaussian_filter(x.double().numpy(), (0, 0, sigma, sigma), mode="nearest")
    found = CORRUPTIONS["gaussian_blur"].apply(x, sigma, KEYS, 0)
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_contrast_keeps_means_and_shrinks_the_rest():
    x = images()
    found = corrupted(x, "contrast", 5, "cifar10", KEYS)
    means = x.mean((2, 3), keepdim=True)
    assert torch.allclose(found, means + 0.15 * (x - means), atol=1e-6)


def test_brightness_is_that_of_hue_saturation_and_value():
    colors = pytest.importorskip("matplotlib.colors")
    x = images()
    x[0, :, 0, 0] = 0.0
    found = corrupted(x, "brightness", 4, "cifar10", KEYS)
    expected = colors.rgb_to_hsv(x.movedim(1, -1).double().numpy())
    expected[..., 2] = np.clip(expected[..., 2] + 0.2, 0, 1)
    expected = colors.hsv_to_rgb(expected)
    assert np.abs(found.movedim(1, -1).numpy() - expected).max() < 1e-5
    grey = images(channels=1)
    assert torch.allclose(
        corrupted(grey, "brightness", 4, "cifar10", KEYS), (grey + 0.2).clamp_max(1), atol=1e-6
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_pillow(channels):
    image = pytest.importorskip("PIL.Image")
    import io

    x = (255 * images(channels=channels)).round() / 255
    found = corrupted(x, "jpeg_compression", 5, "cifar10", KEYS)
    file = io.BytesIO()
    pixels = (255 * x[2]).round().byte().movedim(0, -1).numpy()
    image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "JPEG", quality=40)
    expected = np.array(image.open(file)).reshape(pixels.shape)
    assert np.array_equal((255 * found[2]).round().byte().movedim(0, -1).numpy(), expected)
    errors = [
        float((corrupted(x, "jpeg_compression", s, "cifar10", KEYS) - x).square().mean())
        for s in (1, 5)
    ]
    assert errors[0] < errors[1]


def test_without_pillow_jpeg_is_left_out_or_says_what_to_install(monkeypatch):
    import importlib.util
    import sys

    own = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "PIL" else own(name)
    )
    data = TensorDataset(images(), torch.arange(6) % 3)
    assert "jpeg_compression" not in corruption_accuracy(model(), data).accuracy
    with pytest.raises(ImportError, match="Pillow"):
        corruption_accuracy(model(), data, corruptions=["jpeg_compression"])


def test_accuracies_are_those_of_the_corrupted_images():
    x, y, net = images(), torch.arange(6) % 3, model()
    data = TensorDataset(x, y)
    found = corruption_accuracy(net, data, severities=[2, 5], seed=4)
    assert float(found.clean) == float(af.accuracy(net, data))
    keys = seeding.keys(4, torch.arange(6))
    assert set(found.accuracy) >= {"gaussian_noise", "contrast", "gaussian_blur", "brightness"}
    for name, accuracies in found.accuracy.items():
        for severity, accuracy in zip((2, 5), accuracies, strict=True):
            with torch.no_grad():
                right = net(corrupted(x, name, severity, "cifar10", keys)).argmax(1) == y
            assert torch.equal(accuracy.correct, right), name
    loader = DataLoader(data, batch_size=4)
    again = corruption_accuracy(net, loader, severities=[2, 5], seed=4)
    assert all(
        torch.equal(one.correct, two.correct)
        for name in found.accuracy
        for one, two in zip(found.accuracy[name], again.accuracy[name], strict=True)
    )


def test_bounds_scale_the_corruption():
    x, y, net = images(), torch.arange(6) % 3, model()
    wide = nn.Sequential(nn.Identity(), net)
    wide[0].forward = lambda z: z / 255
    settings = {"severities": [3], "corruptions": ["gaussian_noise", "contrast", "brightness"]}
    found = corruption_accuracy(net, TensorDataset(x, y), **settings)
    scaled = corruption_accuracy(wide, TensorDataset(255 * x, y), bounds=(0, 255), **settings)
    assert {n: float(a[0]) for n, a in found.accuracy.items()} == {
        n: float(a[0]) for n, a in scaled.accuracy.items()
    }


def test_arguments_that_go_with_the_samples():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))

        def forward(self, x, gate=None):
            return self.own(x) * gate[:, None]

    torch.manual_seed(0)
    net, x = Gated(), images()
    y = net(x, torch.ones(6)).argmax(1)
    data = [{"x": x, "labels": y, "gate": torch.tensor([1.0, -1.0] * 3)}]
    found = corruption_accuracy(net, data, severities=[1], corruptions=["contrast"])
    assert found.clean.correct.tolist() == [True, False] * 3
    assert not bool(found.accuracy["contrast"][0].correct[1::2].any())


def test_inputs_that_are_no_images_get_noise_alone():
    net, x = nn.Linear(5, 3), torch.rand(6, 5)
    data = TensorDataset(x, torch.arange(6) % 3)
    names = set(corruption_accuracy(net, data).accuracy)
    assert names == {"gaussian_noise", "impulse_noise", "speckle_noise"}
    with pytest.raises(ValueError, match="images"):
        corruption_accuracy(net, data, corruptions=["contrast"])


def write_folder(folder, repeated=True):
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
        for name in ("fog", "snow")
    }
    labels = np.arange(4) % 3
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "labels.npy", np.tile(labels, 5) if repeated else labels)
    return arrays, torch.tensor(labels)


@pytest.mark.parametrize("repeated", [True, False])
def test_a_folder_of_cifar_10_c(repeated, tmp_path):
    arrays, labels = write_folder(tmp_path, repeated)
    net, other = model(), model(seed=1)
    found = corruption_accuracy(net, tmp_path, severities=[1, 4], baseline=other)

    def right(net, name, severity):
        part = torch.from_numpy(arrays[name][4 * (severity - 1) : 4 * severity])
        with torch.no_grad():
            return net(part.movedim(-1, 1).float() / 255).argmax(1) == labels

    assert list(found.accuracy) == ["fog", "snow"]
    for name in arrays:
        for severity, accuracy in zip((1, 4), found.accuracy[name], strict=True):
            assert torch.equal(accuracy.correct, right(net, name, severity))
    # mCE: errors summed over severities, divided by the baseline's, their mean over corruptions.
    errors = {
        net_: {n: sum(float((~right(net_, n, s)).float().mean()) for s in (1, 4)) for n in arrays}
        for net_ in (net, other)
    }
    ratios = [errors[net][n] / errors[other][n] for n in arrays]
    assert found.mce == pytest.approx(sum(ratios) / 2)
    plain = corruption_accuracy(net, str(tmp_path), severities=[1, 4])
    assert plain.mce == pytest.approx(sum(errors[net].values()) / 4)
    assert plain.mean == pytest.approx(1 - plain.mce)
    assert plain.clean is None


def test_data_by_name_and_severity():
    x, y, net = images(), torch.arange(6) % 3, model()
    data = {"fog": {1: TensorDataset(x, y), 3: TensorDataset(1 - x, y)}}
    found = corruption_accuracy(net, data, severities=[1, 3])
    assert float(found.accuracy["fog"][1]) == float(af.accuracy(net, TensorDataset(1 - x, y)))
    with pytest.raises(ValueError, match=r"severities=\[2\].*'fog' has \[1, 3\]"):
        corruption_accuracy(net, data, severities=[1, 2])
    with pytest.raises(TypeError, match="by severity"):
        corruption_accuracy(net, {"fog": TensorDataset(x, y)})


def test_one_name_and_one_severity():
    net, data = model(), TensorDataset(images(), torch.arange(6) % 3)
    found = corruption_accuracy(net, data, corruptions="contrast", severities=3)
    assert list(found.accuracy) == ["contrast"]
    assert found.severities == (3,)


def test_what_is_not_there_is_named(tmp_path):
    net, data = model(), TensorDataset(images(), torch.arange(6) % 3)
    for wrong, message in (
        ({"severities": [0]}, "severities"),
        ({"severities": []}, "severities"),
        ({"corruptions": ["frost"]}, "frost"),
        ({"corruptions": []}, "at least one"),
        ({"constants": "mnist"}, "constants"),
    ):
        with pytest.raises(ValueError, match=message):
            corruption_accuracy(net, data, **wrong)
    with pytest.raises(FileNotFoundError, match=r"labels\.npy"):
        corruption_accuracy(net, tmp_path)
    write_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"frost\.npy"):
        corruption_accuracy(net, tmp_path, corruptions=["frost"])
    np.save(tmp_path / "fog.npy", np.zeros((20, 16, 16, 3), np.float32))
    with pytest.raises(ValueError, match=r"fog\.npy.*uint8"):
        corruption_accuracy(net, tmp_path)
