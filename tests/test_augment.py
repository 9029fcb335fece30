"""Augmentations: each operation is torchvision's for the same parameters, and the parameters are SimCLR's.

The reference applies torchvision's functional operations one image at a time, in the drawn order.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from torch import Tensor
from torchvision.transforms import ColorJitter

from simclr_dist.config import AugmentConfig
from simclr_dist.data.batch import Batch
from simclr_dist.views import augment as module
from simclr_dist.views import torch_operations
from simclr_dist.views.augment import Augment, blur_kernel_size, normalize
from simclr_dist.views.parameters import Parameters, draw_parameters
from simclr_dist.views.presets import resolve_augmentation
from simclr_dist.views.torch_operations import blend_, gaussian_blur, rotate_hue_

SIDE = 24
TOLERANCE = 5e-6  # of a value in [0, 1]; a grey level is 4e-3


def random_images(n: int, seed: int = 0) -> Tensor:
    """float32 [n, 3, S, S] in [0, 1], with the cases that are easy to get wrong: greys, pure colours, ties."""
    x = torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    x[0] = (x[0] * 3).round() / 3  # many ties between channels
    x[1] = 0.3
    x[2] = x[2] > 0.5
    x[3] = x[3, :1]
    return x


def batch(B: int, side: int = SIDE, first: int = 0, epoch: int = 0) -> Batch:
    """Every sample has its own image, wherever it stands."""
    ids = torch.arange(first, first + B)
    views = torch.stack(
        [
            torch.stack(
                [
                    torch.randint(
                        0,
                        256,
                        (side, side, 3),
                        dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(2 * int(i) + v),
                    )
                    for i in ids
                ]
            )
            for v in range(2)
        ]
    )
    return Batch(views, ids, torch.zeros(B, dtype=torch.int64), epoch)


def by_torchvision(image: Tensor, p: Parameters, i: int, kernel_size: int) -> Tensor:
    """One view, uint8 [S, S, 3], as torchvision makes it of the i-th parameters."""
    x = image.permute(2, 0, 1).float() / 255
    if p.jitter[i]:
        for operation in p.order[i]:
            x = (
                lambda x: reference.adjust_brightness(x, p.brightness[i]),
                lambda x: reference.adjust_contrast(x, p.contrast[i]),
                lambda x: reference.adjust_saturation(x, p.saturation[i]),
                lambda x: reference.adjust_hue(x, float(p.hue[i])),
            )[operation](x)
    if p.grayscale[i]:
        x = reference.rgb_to_grayscale(x, 3)
    if p.blur[i]:
        x = reference.gaussian_blur(x, kernel_size, float(p.sigma[i]))
    if p.solarize[i]:
        x = reference.solarize(x, 0.5)
    return reference.normalize(x, module.MEAN, module.STD)


def test_hue_is_torchvisions() -> None:
    x, turns = random_images(64), torch.linspace(-0.5, 0.5, 64)
    expected = torch.stack([reference.adjust_hue(a, float(t)) for a, t in zip(x, turns, strict=True)])
    torch.testing.assert_close(rotate_hue_(x.clone(), turns), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("adjust_brightness", lambda f: (f, 0 * f, 0 * f)),
        ("adjust_saturation", lambda f: (f, 1 - f, 0 * f)),
        ("adjust_contrast", lambda f: (f, 0 * f, 1 - f)),
    ],
)
def test_blends_are_torchvisions(name: str, factors) -> None:
    x, f = random_images(32), torch.linspace(0, 2, 32)
    expected = torch.stack([getattr(reference, name)(a, float(t)) for a, t in zip(x, f, strict=True)])
    torch.testing.assert_close(blend_(x.clone(), *factors(f)), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kernel_size", [1, 3, 23])
def test_blur_is_torchvisions(kernel_size: int) -> None:
    x, sigma = random_images(16), torch.linspace(0.1, 2.0, 16)
    expected = torch.stack([reference.gaussian_blur(a, kernel_size, float(s)) for a, s in zip(x, sigma, strict=True)])
    torch.testing.assert_close(gaussian_blur(x, sigma, kernel_size), expected, atol=TOLERANCE, rtol=0)


def test_blur_keeps_the_brightness_of_a_plain_image() -> None:
    x = torch.full((4, 3, SIDE, SIDE), 0.7)
    torch.testing.assert_close(gaussian_blur(x, torch.tensor([0.1, 0.5, 1.0, 2.0]), 5), x)


@pytest.mark.parametrize(("side", "size"), [(32, 3), (96, 9), (224, 23)])
def test_blur_kernel_is_a_tenth_of_the_side(side: int, size: int) -> None:
    assert blur_kernel_size(side) == size


@pytest.fixture(params=["numba", "torch"])
def way(request: pytest.FixtureRequest) -> str:
    """The two that run on a CPU. The third: test_augment_triton.py. A fall-back warns, which is an error in tests."""
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


@pytest.mark.parametrize("preset", ["simclr_imagenet", "simclr_cifar", "asymmetric", "none"])
def test_whole_preset_is_torchvisions_for_the_same_parameters(preset: str, way: str) -> None:
    augment, images = Augment(AugmentConfig(preset=preset, implementation=way), 3, SIDE), batch(48)
    p = draw_parameters(augment.augmentation, 3, 0, images.sample_ids.numpy())
    expected = torch.stack(
        [by_torchvision(v, p, i, blur_kernel_size(SIDE)) for i, v in enumerate(images.views.flatten(0, 1))]
    )
    torch.testing.assert_close(augment(images).flatten(0, 1), expected, atol=1e-4, rtol=0)


def test_parameters_of_another_augmentation_are_applied_as_they_are(way: str) -> None:
    images, of_cifar = batch(6), Augment(AugmentConfig(preset="simclr_cifar", implementation=way), 3, SIDE)
    p = draw_parameters(resolve_augmentation(AugmentConfig(blur_p=1.0)), 3, 0, images.sample_ids.numpy())
    views = images.views.flatten(0, 1)
    expected = torch.stack([by_torchvision(v, p, i, blur_kernel_size(SIDE)) for i, v in enumerate(views)])
    torch.testing.assert_close(of_cifar.apply_parameters(views, p), expected, atol=1e-4, rtol=0)


def test_a_view_does_not_depend_on_its_company(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    augment = Augment(AugmentConfig(preset="asymmetric", implementation=way), 0, SIDE)
    together = augment(batch(20)).clone()
    halves = torch.cat([augment(batch(10)).clone(), augment(batch(10, first=10)).clone()], dim=1)
    assert torch.equal(together, halves)
    two, more = batch(20), torch.zeros(3, 20, SIDE, SIDE, 3, dtype=torch.uint8)
    five = Batch(torch.cat([two.views, more]), two.sample_ids, two.labels, two.epoch)
    assert torch.equal(together, augment(five)[:2])
    monkeypatch.setattr(torch_operations, "_PIECE_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(together, augment(batch(20)))


def test_views_seeds_and_epochs_differ_and_repeat(way: str) -> None:
    same = torch.full((2, 8, SIDE, SIDE, 3), 90, dtype=torch.uint8)
    same[:, :, ::2, :, 0] = 200

    def views(seed: int, epoch: int) -> Tensor:
        ids = torch.arange(8)
        return Augment(AugmentConfig(implementation=way), seed, SIDE)(Batch(same, ids, ids, epoch))

    first = views(0, 0)
    assert torch.equal(first, views(0, 0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, views(1, 0))
    assert not torch.equal(first, views(0, 1))


def test_output_is_channels_last_float32_even_under_autocast(way: str) -> None:
    augment, images = Augment(AugmentConfig(implementation=way), 0, SIDE), batch(4)
    expected = augment(images).clone()
    with torch.autocast("cpu", torch.bfloat16):
        views = augment(images)
    assert views.dtype == torch.float32
    assert views.shape == (2, 4, 3, SIDE, SIDE)
    assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views, expected)


def test_views_that_are_held_do_not_change(way: str) -> None:
    augment = Augment(AugmentConfig(implementation=way), 0, SIDE)
    held = [augment(batch(4, first=4 * i))[1, 2:] for i in range(6)]
    copies = [view.clone() for view in held]
    for i in range(6, 12):
        augment(batch(4, first=4 * i))
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_operations_compile_without_graph_breaks() -> None:
    x, f = random_images(8), torch.rand(8)
    for operation, arguments in (
        (rotate_hue_, (f,)),
        (blend_, (f, 1 - f, 0 * f)),
        (gaussian_blur, (f + 0.1, 5)),
    ):
        compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x.clone(), *arguments), operation(x.clone(), *arguments))


def test_normalize_is_torchvisions_for_evaluation() -> None:
    images = batch(5).views[0]
    expected = reference.normalize(images.permute(0, 3, 1, 2).float() / 255, module.MEAN, module.STD)
    torch.testing.assert_close(normalize(images), expected, atol=1e-5, rtol=0)


def test_warmup_leaves_nothing_to_compile() -> None:
    pytest.importorskip("numba")
    module.warmup()
    from simclr_dist.views.cpu_kernel import augment_some

    assert len(augment_some.signatures) == 1
    Augment(AugmentConfig(), 0, SIDE)(batch(2))
    assert len(augment_some.signatures) == 1


def test_draws_are_those_of_every_release() -> None:
    """A run that goes on, or is repeated, sees the views that it would have seen."""
    p = draw_parameters(resolve_augmentation(AugmentConfig(preset="simclr_cifar")), 3, 2, np.arange(20) * 7)
    content = b"".join(getattr(p, field.name).tobytes() for field in dataclasses.fields(p))
    assert hashlib.sha256(content).hexdigest()[:16] == "e0f6c596fb7c2701"


class TestDistribution:
    """Chen et al. 2020, appendix A."""

    ids = np.arange(20_000)

    def draw(self, **config) -> Parameters:
        return draw_parameters(resolve_augmentation(AugmentConfig(**config)), 0, 0, self.ids)

    def test_probabilities(self) -> None:
        p = self.draw(preset="simclr_imagenet")
        for mask, expected in ((p.jitter, 0.8), (p.grayscale, 0.2), (p.blur, 0.5), (p.solarize, 0.0)):
            assert abs(mask.mean() - expected) < 0.012

    def test_asymmetric_blurs_the_first_view_and_solarises_the_second(self) -> None:
        p = self.draw(preset="asymmetric")
        B = len(self.ids)
        assert p.blur[:B].all()
        assert abs(p.blur[B:].mean() - 0.1) < 0.01
        assert not p.solarize[:B].any()
        assert abs(p.solarize[B:].mean() - 0.2) < 0.015

    def test_of_more_views_the_even_ones_are_as_the_first_and_the_odd_ones_as_the_second(self) -> None:
        augmentation = resolve_augmentation(AugmentConfig(preset="asymmetric"))
        p = draw_parameters(augmentation, 0, 0, self.ids, num_views=5)
        blurred, solarised = (mask.reshape(5, -1).mean(1) for mask in (p.blur, p.solarize))
        assert blurred == pytest.approx([1, 0.1, 1, 0.1, 1], abs=0.01)
        assert solarised == pytest.approx([0, 0.2, 0, 0.2, 0], abs=0.015)
        assert len({tuple(view[:9]) for view in p.brightness.reshape(5, -1)}) == 5

    def test_factors_are_uniform_in_color_jitters_ranges(self) -> None:
        p = self.draw(preset="simclr_imagenet")
        jitter = ColorJitter(0.8, 0.8, 0.8, 0.2)
        for values, (low, high) in (
            (p.brightness, jitter.brightness),
            (p.contrast, jitter.contrast),
            (p.saturation, jitter.saturation),
            (p.hue, jitter.hue),
            (p.sigma, (0.1, 2.0)),
        ):
            assert low <= values.min() < low + 0.01
            assert high - 0.01 < values.max() <= high
            assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)

    def test_every_order_of_the_jitter_is_as_frequent(self) -> None:
        _, counts = np.unique(self.draw().order, axis=0, return_counts=True)
        assert len(counts) == 24
        assert (abs(counts / counts.sum() - 1 / 24) < 0.006).all()

    def test_cifar_is_half_as_strong_and_never_blurs(self) -> None:
        p = self.draw(preset="simclr_cifar")
        assert not p.blur.any()
        assert abs(p.hue.max() - 0.1) < 0.001
        assert abs(p.brightness.max() - 1.4) < 0.001

    def test_none_changes_nothing(self) -> None:
        p = self.draw(preset="none")
        assert not np.stack([p.jitter, p.grayscale, p.blur, p.solarize]).any()
        augmentation = resolve_augmentation(AugmentConfig(preset="none"))
        assert (augmentation.crop_scale_min, augmentation.flip_p) == (1.0, 0.0)

    def test_fields_override_the_preset(self) -> None:
        augmentation = resolve_augmentation(
            AugmentConfig(jitter_strength=0.5, blur_p=0.0, grayscale_p=1.0, crop_scale_min=0.2)
        )
        assert augmentation.jitter == (0.4, 0.4, 0.4, 0.1)
        assert (augmentation.blur_p, augmentation.grayscale_p, augmentation.crop_scale_min) == ((0.0, 0.0), 1.0, 0.2)
        assert not self.draw(jitter_strength=0.0).jitter.any()

    def test_purposes_are_independent(self) -> None:
        p = self.draw()
        columns = [p.jitter, p.brightness, p.contrast, p.saturation, p.hue, p.grayscale, p.blur, p.sigma]
        correlation = np.corrcoef(np.stack([np.asarray(c, float) for c in columns]))
        assert (abs(correlation - np.eye(len(columns))) < 0.025).all()
