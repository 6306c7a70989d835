"""Changed copies of images, whose gradients are averaged before they are clipped (augmentation multiplicity).

Reference:
    De et al. 2022, arXiv:2204.13650.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIRRORED = {"cifar10", "cifar100", "fashion-mnist", "fmnist", "images", "lsun"}  # what means the same in a mirror


@dataclass(frozen=True)
class Changes:
    """How far an image may be changed; the amounts are uniform between these bounds.

    Attributes:
        degrees: Turned to either side.
        scale: Longer or shorter, on each axis by itself, as a share.
        shear: Sheared, as a share of the height.
        shift: Moved, as a share of half the width and height.
        mirror: Whether a copy is mirrored with probability one half.
    """

    degrees: float = 12.0
    scale: float = 0.15
    shear: float = 0.1
    shift: float = 0.19
    mirror: bool = False

    def maps(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Affine maps from places in the result to places in the image, ``[count, 2, 3]``."""
        amounts = 2 * torch.rand(6, count, generator=generator) - 1
        turn = amounts[0] * math.radians(self.degrees)
        wide, high = 1 + self.scale * amounts[1], 1 + self.scale * amounts[2]
        if self.mirror:
            wide = wide * (2 * torch.randint(2, (count,), generator=generator) - 1)
        across = torch.stack([turn.cos() * wide, self.shear * amounts[3] - turn.sin(), self.shift * amounts[4]], 1)
        down = torch.stack([turn.sin(), turn.cos() * high, self.shift * amounts[5]], 1)
        return torch.stack([across, down], 1)


def multiplied(images: Tensor, count: int, changes: Changes, generator: torch.Generator | None = None) -> Tensor:
    """Each image, and ``count - 1`` changed copies of it.

    Args:
        images: ``[N, C, H, W]``.
        count: Images that come of one, K.
        changes: How far the copies may be changed.
        generator: Of the random amounts; torch's own if there is none.

    Returns:
        ``[N, K, C, H, W]``; the first of the K are the images themselves.
    """
    if count == 1 or not len(images):
        return images.unsqueeze(1).repeat_interleave(count, 1)
    copies = images.repeat_interleave(count - 1, 0)
    grid = F.affine_grid(changes.maps(len(copies), generator).to(images), list(copies.shape), align_corners=False)
    beyond = "zeros" if images.shape[1] == 1 else "reflection"  # digits lie on nothing, photographs do not
    copies = F.grid_sample(copies, grid, padding_mode=beyond, align_corners=False)
    return torch.cat([images.unsqueeze(1), copies.unflatten(0, (len(images), count - 1))], 1)


class Copies(nn.Module):
    """A network for ``[N, K, ...]``: an example is a row of its input, not each of the K images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.flatten(0, 1)).unflatten(0, x.shape[:2])
