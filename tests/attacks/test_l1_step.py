"""Steps in l1: the largest entries, and the next ones where a face of the bounds stops one."""

import pytest
import torch

from advfeat import threat
from advfeat.attacks._l1_step import ascend_l1


@pytest.mark.parametrize("entries", [1, 2])
def test_an_l1_step_moves_the_largest_entries(entries):
    points = torch.zeros(2, 4)
    gradient = torch.tensor([[0.5, -3.0, torch.nan, 2.0], [0.0, 0.0, 0.0, 1e-30]])
    moved = ascend_l1(points, gradient, torch.tensor([0.6, 0.6]), (-9.0, 9.0), entries)
    expected = [[0.0, -0.6, 0.0, 0.0], [0.0, -0.3, 0.0, 0.3]][entries - 1]
    assert moved[0].tolist() == pytest.approx(expected)
    assert moved[1].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.6 / entries])


def test_an_l1_step_goes_on_where_a_face_stops_an_entry():
    points = torch.tensor([[1.0, 0.9, 0.5, 0.5]])
    gradient = torch.tensor([[4.0, 3.0, -2.0, 1.0]])
    moved = ascend_l1(points, gradient, torch.tensor([0.3]), (0.0, 1.0))
    torch.testing.assert_close(moved, torch.tensor([[1.3, 1.2, 0.3, 0.5]]))


def test_an_l1_step_of_many_entries_is_that_of_sorting_all():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 500, generator=generator, dtype=torch.float64)
    gradient = torch.randn(3, 500, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([0.2, 90.0, 1e4])  # by a few entries, by many, by all
    moved = ascend_l1(points, gradient, lengths, (0.0, 1.0))
    for n in range(3):
        left, expected = float(lengths[n]), points[n].clone()
        for i in gradient[n].abs().argsort(descending=True).tolist():
            sign = gradient[n, i].sign()
            expected[i] += sign * left
            room = (1 - points[n, i]) if sign > 0 else points[n, i]
            left = max(left - float(room), 0.0)
        torch.testing.assert_close(moved[n], expected)
        alone = ascend_l1(points[n][None], gradient[n][None], lengths[n][None], (0.0, 1.0))
        assert torch.equal(alone[0], moved[n])


@pytest.mark.parametrize("length", [0.01, 0.3, 2.0])
def test_an_l1_step_leaves_the_best_point_of_a_linear_function_as_it_is(length):
    center = torch.tensor([[0.8, 0.3, 0.5, 0.5, 0.5]], dtype=torch.float64)
    gradient = torch.tensor([[4.0, -3.0, 2.0, 1.0, 0.5]], dtype=torch.float64)
    best = torch.tensor([[1.0, 0.0, 0.7, 0.5, 0.5]], dtype=torch.float64)  # in the ball of 0.7
    step = torch.tensor([length])
    moved = ascend_l1(best, gradient, step, (0.0, 1.0))
    found = threat.project(moved, center, 0.7, "l1")
    torch.testing.assert_close(found, best, rtol=0, atol=1e-9)
