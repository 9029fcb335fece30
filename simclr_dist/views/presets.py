"""The numbers behind an augmentation preset: the loader uses those for crops and flips, `Augment` those for colours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from simclr_dist.config import AugmentConfig


@dataclass(frozen=True)
class Augmentation:
    """Probabilities and strengths; pairs are for views with an even and with an odd number, counted from 0.

    jitter: largest change of brightness, contrast, saturation and hue, as torchvision.transforms.ColorJitter counts.
    """

    crop_scale_min: float
    flip_p: float
    jitter: tuple[float, float, float, float]
    jitter_p: float
    grayscale_p: float
    blur_p: tuple[float, float]
    solarize_p: tuple[float, float]
    blur_sigma: tuple[float, float] = (0.1, 2.0)


# Chen et al. 2020, appendix A: jitter (0.8, 0.8, 0.8, 0.2) x strength; CIFAR (B.9): strength 0.5, no blur.
_SIMCLR_JITTER = (0.8, 0.8, 0.8, 0.2)
# Grill et al. 2020 (BYOL), table 6, whose strengths are final.
_BYOL_JITTER = (0.4, 0.4, 0.2, 0.1)

_PRESETS = {
    "simclr_imagenet": Augmentation(0.08, 0.5, _SIMCLR_JITTER, 0.8, 0.2, (0.5, 0.5), (0.0, 0.0)),
    "simclr_cifar": Augmentation(0.08, 0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, (0.0, 0.0), (0.0, 0.0)),
    "asymmetric": Augmentation(0.08, 0.5, _BYOL_JITTER, 0.8, 0.2, (1.0, 0.1), (0.0, 0.2)),
    "none": Augmentation(1.0, 0.0, (0.0, 0.0, 0.0, 0.0), 0.0, 0.0, (0.0, 0.0), (0.0, 0.0)),
}


def resolve_augmentation(config: AugmentConfig) -> Augmentation:
    """The preset of `config`, with every field that `config` sets (not null) in its place.

    jitter_strength s means (0.8, 0.8, 0.8, 0.2) x s, as in SimCLR; in `asymmetric` it scales BYOL's numbers.
    """
    augmentation = _PRESETS[config.preset]
    if config.jitter_strength is not None:
        base = _BYOL_JITTER if config.preset == "asymmetric" else _SIMCLR_JITTER
        b, c, s, h = (config.jitter_strength * change for change in base)
        # Half a turn covers every hue.
        augmentation = replace(augmentation, jitter=(b, c, s, min(h, 0.5)))
    changes: dict[str, Any] = {}
    for name in ("crop_scale_min", "flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p"):
        value = getattr(config, name)
        if value is not None:
            changes[name] = (value, value) if name in ("blur_p", "solarize_p") else value
    return replace(augmentation, **changes)


def without_colours(augmentation: Augmentation) -> tuple[Augmentation, tuple[str, ...]]:
    """For images that are not RGB, and what was left out because it means nothing there, for people.

    Solarisation goes with the colours: it inverts what is brighter than half of the range, which other images do not
    fill.
    """
    brightness, contrast, saturation, hue = augmentation.jitter
    has_jitter = augmentation.jitter_p > 0
    left_out = {
        "saturation": has_jitter and saturation > 0,
        "hue": has_jitter and hue > 0,
        "grayscale": augmentation.grayscale_p > 0,
        "solarize": max(augmentation.solarize_p) > 0,
    }
    kept = replace(augmentation, jitter=(brightness, contrast, 0.0, 0.0), grayscale_p=0.0, solarize_p=(0.0, 0.0))
    return kept, tuple(name for name, is_there in left_out.items() if is_there)


def blur_kernel_size(image_size: int) -> int:
    """A tenth of the side, made odd (SimCLR, appendix A)."""
    return image_size // 10 // 2 * 2 + 1
