"""Frequencies and scales: waves and blocks whose energy is known to lie in one place."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from advfeat import analysis
from advfeat.analysis import _fourier, _spectrum

WIDE = (-100.0, 100.0)


def made(count=40, size=8, classes=2, channels=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, channels, size, size, generator=generator)
    return TensorDataset(x, torch.arange(count) % classes)


def linear(weight):
    """Two classes, told apart by one image."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.numel(), 2))
    with torch.no_grad():
        model[1].weight[1] = weight.flatten()
        model[1].weight[0] = -weight.flatten()
        model[1].bias.zero_()
    return model


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (16, 4)])
def test_rings_hold_all_the_energy(size):
    images = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(0))
    frequency, ring = _spectrum.ring_of(*size)
    energy = _spectrum._ring_energy(images, ring)
    torch.testing.assert_close(energy.sum(1), images.square().sum((1, 2, 3)))
    assert len(frequency) == energy.shape[1]


def test_a_wave_has_its_energy_in_its_ring():
    frequency, ring = _spectrum.ring_of(8, 8)
    for down, across, radius in ((0, 3, 3), (2, 0, 2), (3, 4, 5), (4, 4, 6)):
        wave = _fourier._wave(8, 8, down, across)
        assert float(wave.square().sum()) == pytest.approx(1)
        energy = _spectrum._ring_energy(wave[None, None], ring)[0]
        assert float(energy[radius]) == pytest.approx(1, abs=1e-5)
        assert float(frequency[radius]) == radius / 8


def test_pyramid_levels_hold_all_the_energy_and_find_the_scale():
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    energy = _spectrum._pyramid_energy(images)
    assert energy.shape == (5, 4)
    torch.testing.assert_close(energy.sum(1), images.square().sum((1, 2, 3)))
    checkers = torch.ones(8, 8)
    checkers[::2, ::2] = checkers[1::2, 1::2] = -1
    blocks = checkers[:4, :4].repeat_interleave(2, 0).repeat_interleave(2, 1)
    for level, image in ((0, checkers), (1, blocks), (3, torch.ones(8, 8))):
        shares = _spectrum._fractions(_spectrum._pyramid_energy(image[None, None]))
        assert float(shares[level]) == pytest.approx(1)


def test_the_spectrum_of_a_linear_model_is_that_of_its_weights():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, generator=generator)
    found = analysis.spectrum({"mine": linear(weight)}, made(), eps=0.5, norm="l2", bounds=WIDE)
    _, ring = _spectrum.ring_of(8, 8)
    expected = _spectrum._fractions(_spectrum._ring_energy(weight[None, None], ring))
    torch.testing.assert_close(found.rings["mine"], expected, atol=1e-4, rtol=0)
    expected = _spectrum._fractions(_spectrum._pyramid_energy(weight[None, None]))
    torch.testing.assert_close(found.levels["mine"], expected, atol=1e-4, rtol=0)
    assert set(found.rings) == {"images", "mine"}


def test_mean_frequency_tells_fine_from_coarse():
    fine = linear(_fourier._wave(8, 8, 0, 4))
    coarse = linear(_fourier._wave(8, 8, 1, 0))
    found = analysis.spectrum(
        {"fine": fine, "coarse": coarse}, made(), eps=0.5, norm="l2", bounds=WIDE
    )
    assert found.mean_frequency("fine") == pytest.approx(0.5, abs=1e-3)
    assert found.mean_frequency("coarse") == pytest.approx(1 / 8, abs=1e-3)
    assert "0.500" in str(found)


def test_low_and_high_parts_add_up():
    x, _ = made(channels=3).tensors
    mean = x.mean((2, 3), keepdim=True)
    for cutoff in (0.0, 0.3, 0.5):
        low, high = (_fourier.filtered(x, cutoff, below) for below in (True, False))
        torch.testing.assert_close(low + high - mean, x, atol=1e-5, rtol=0)
        for part in (low, high):
            torch.testing.assert_close(part.mean((2, 3), keepdim=True), mean)
    torch.testing.assert_close(_fourier.filtered(x, 0.71, True), x)
    torch.testing.assert_close(_fourier.filtered(x, 0.0, True), mean.expand_as(x))
    torch.testing.assert_close(_fourier.filtered(x, 0.71, False), mean.expand_as(x))


def test_filters_are_sharp_at_the_cutoff():
    wave = 0.5 + 0.2 * _fourier._wave(8, 8, 0, 2)[None, None]
    torch.testing.assert_close(_fourier.filtered(wave, 0.25, True), wave)
    flat = torch.full_like(wave, 0.5)
    torch.testing.assert_close(_fourier.filtered(wave, 0.24, True), flat)
    torch.testing.assert_close(_fourier.filtered(wave, 0.25, False), flat)


def test_a_model_of_fine_waves_is_right_on_high_pass_images_alone():
    wave = _fourier._wave(8, 8, 0, 4)
    labels = torch.arange(20) % 2
    x = 0.5 + 0.3 * (2 * labels - 1)[:, None, None, None] * wave[None, None]
    found = analysis.filtered_accuracy(
        {"mine": linear(wave)}, TensorDataset(x, labels), cutoffs=[0.3, 0.6]
    )
    assert [float(a) for a in found.high["mine"]] == [1.0, 0.5]
    assert [float(a) for a in found.low["mine"]] == [0.5, 1.0]


def test_the_map_shows_the_one_wave_a_model_reads():
    wave = _fourier._wave(8, 8, 2, 1)
    labels = torch.arange(40) % 2
    x = 0.5 + 0.2 * (2 * labels - 1)[:, None, None, None] * wave[None, None]
    model, data = linear(wave), TensorDataset(x, labels)
    found = analysis.fourier_sensitivity(model, data, size=1.0, seed=0)
    middle = 4
    struck = {(middle + 2, middle + 1), (middle - 2, middle - 1)}
    for down in range(8):
        for across in range(8):
            error = float(found.error[down, across])
            # With a random sign, every second wave is against the label.
            assert (0.2 < error < 0.8) if (down, across) in struck else (error == 0)
    assert found.clean == 0
    again = analysis.fourier_sensitivity(model, data, size=1.0, seed=0)
    assert torch.equal(found.error, again.error)
    without = analysis.fourier_sensitivity(model, data, size=0.0, seed=0)
    assert not without.error.any()


@pytest.mark.parametrize("size", [7, 8])
def test_figures_are_drawn(size):
    data = made(size=size)
    model = linear(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))
    assert len(analysis.spectrum({"m": model}, data, eps=0.3, norm="l2").plot()) == 2
    found = analysis.filtered_accuracy({"m": model}, data, cutoffs=[0.2, 0.4])
    assert len(found.plot().lines) == 2
    shown = analysis.fourier_sensitivity(model, data, size=1.0, seed=0).plot().images[0]
    assert shown.get_array().shape == (size, size)
    # The middle pixel is the lowest frequency.
    left, right, bottom, top = shown.get_extent()
    assert math.floor((0 - left) / (right - left) * size) == size // 2
    assert math.floor((0 - top) / (bottom - top) * size) == size // 2


def test_bad_input_is_refused():
    flat = TensorDataset(torch.rand(4, 6), torch.arange(4) % 2)
    model = nn.Linear(6, 2)
    with pytest.raises(ValueError, match="images"):
        analysis.spectrum({"m": model}, flat, eps=0.1, norm="l2")
    with pytest.raises(ValueError, match="images"):
        analysis.filtered_accuracy({"m": model}, flat, cutoffs=[0.1])
    with pytest.raises(ValueError, match="cutoffs"):
        analysis.filtered_accuracy({"m": model}, made(), cutoffs=[])
    with pytest.raises(TypeError, match="Module"):
        analysis.fourier_sensitivity({"a": nn.Identity()}, made(), size=1.0)
    with pytest.raises(ValueError, match="size"):
        analysis.fourier_sensitivity(model, made(), size=-1.0)


def test_a_float64_model_has_a_spectrum():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    data = TensorDataset(torch.rand(6, 1, 8, 8).double(), torch.arange(6) % 3)
    found = analysis.spectrum({"mine": model}, data, eps=0.5, norm="l2", steps=2)
    assert float(found.rings["mine"].sum()) == pytest.approx(1)


def test_reversed_bounds_are_refused_before_filtering():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    data = TensorDataset(torch.rand(6, 1, 8, 8), torch.arange(6) % 3)
    with pytest.raises(ValueError, match=r"bounds=.* reversed"):
        analysis.filtered_accuracy({"mine": model}, data, cutoffs=[0.2], bounds=(1.0, 0.0))
