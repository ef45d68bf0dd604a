"""Shifts and weak views of images."""

import torch

from preftune import augment


def generators(first: int, number: int = 40) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(number)]


def test_shifted_images() -> None:
    """Each lies up to 2 pixels elsewhere, as its generator says, with its border repeated; 0 changes nothing."""
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")
    pixels = torch.stack([rows, columns, rows + columns])[None].repeat(40, 1, 1, 1).requires_grad_()

    moved = augment.shifted(pixels, generators(0), 2)
    steps = set()
    for image in moved:
        dy, dx = int(image[0, 3, 0]) - 3, int(image[1, 0, 2]) - 2
        expected_rows, expected_columns = (rows + dy).clamp(0, 5), (columns + dx).clamp(0, 4)
        torch.testing.assert_close(
            image, torch.stack([expected_rows, expected_columns, expected_rows + expected_columns])
        )
        steps.add((dy, dx))
    assert {dy for dy, _ in steps} == {dx for _, dx in steps} == {-2, -1, 0, 1, 2}
    torch.testing.assert_close(augment.shifted(pixels, generators(0), 2), moved, rtol=0, atol=0)
    assert (augment.shifted(pixels, generators(99), 2) != moved).any()
    torch.testing.assert_close(augment.shifted(pixels, generators(0), 0), pixels, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(moved.sum(), pixels)
    assert gradient.sum().item() == moved.numel(), "a repeated border gathers the gradient of its copies"


def test_a_weak_view_is_a_crop_of_the_stated_area() -> None:
    """On ramps of rows and columns the range of values tells the height and the width of the crop."""
    side = 64
    ramp = torch.arange(side) / (side - 1)
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    pixels = torch.stack([rows, columns, torch.zeros(side, side)])[None].repeat(200, 1, 1, 1)
    seen = augment.weak_view(pixels, generators(0, 200), 0.85, flip=True)
    assert seen.shape == pixels.shape
    assert seen.min() >= 0
    assert seen.max() <= 1
    spans = seen[:, :2].flatten(2).amax(2) - seen[:, :2].flatten(2).amin(2)
    areas = (spans * (side - 1) / side + 1 / side).prod(1)
    assert areas.min() > 0.83, "rounding to whole pixels costs a little"
    assert areas.max() <= 1.0 + 1e-6
    assert areas.min() < 0.87
    assert areas.max() > 0.98, "the whole range is used"
    mirrored = seen[:, 1, 0, 0] > seen[:, 1, 0, -1]
    assert 70 < mirrored.sum() < 130, "every other one"
    tops, lefts = seen[:, 0, 0, 0], torch.where(mirrored, seen[:, 1, 0, -1], seen[:, 1, 0, 0])
    assert tops.std() > 0.02, "crops lie in different places"
    assert lefts.std() > 0.02
    assert not (augment.weak_view(pixels, generators(0, 200), 0.85, flip=False)[:, 1, 0, 0] > 0.9).any()


def test_a_weak_view_is_a_function_of_its_generator() -> None:
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = augment.weak_view(pixels, generators(5, 3), 0.85, flip=True)
    torch.testing.assert_close(
        augment.weak_view(pixels, generators(5, 3), 0.85, flip=True), seen, rtol=0, atol=0
    )
    assert (augment.weak_view(pixels, generators(9, 3), 0.85, flip=True) != seen).any()
    alone = augment.weak_view(pixels[1:2], generators(6, 1), 0.85, flip=True)
    torch.testing.assert_close(alone, seen[1:2], rtol=0, atol=0)
    for side in ((1, 1), (3, 40)):
        assert augment.weak_view(torch.rand(1, 3, *side), generators(0, 1), 0.85, flip=True).shape == (
            1,
            3,
            *side,
        )


def test_the_whole_image_is_a_weak_view_of_area_one() -> None:
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        augment.weak_view(pixels, generators(0, 4), 1.0, flip=False), pixels, rtol=0, atol=1e-5
    )
