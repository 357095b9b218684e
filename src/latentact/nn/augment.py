"""Random shift, rotation and perspective of an image in one resampling (LAOM, 2502.00379).

As published, one of eight is drawn: none, shift, rotation, perspective, shift then rotation, rotation then
shift, rotation then perspective, perspective then rotation. Pixels from outside the image repeat its edge.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SHIFT = 14 / 64
"""Maximum shift, as a fraction of the side."""
ANGLE = math.pi / 2
"""Maximum rotation in either direction."""
DISTORTION = 0.5
"""Maximum inward displacement of a corner, as a fraction of half the padded side."""
MARGIN = 1 + 2 * 30 / 64
"""Side of the padded image whose corners are displaced, relative to the image's side."""
DRAWS = ((), ("shift",), ("rotate",), ("perspective",), ("shift", "rotate"), ("rotate", "shift"),
         ("rotate", "perspective"), ("perspective", "rotate"))  # fmt: skip


def augment(frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c h w"]:
    """Apply one random transform to all frames of each clip."""
    b, t, c, h, w = frames.shape
    warp = draw_warps(b, frames.device)
    with torch.autocast(frames.device.type, enabled=False):
        grid = warp_grid(warp, h, w)
        flat = frames.float().reshape(b, t * c, h, w)
        out = F.grid_sample(flat, grid, padding_mode="border", align_corners=False)
    return out.reshape(frames.shape)


def draw_warps(count: int, device: torch.device) -> Float[Tensor, "b 3 3"]:
    """Return homographies from output coordinates to image coordinates, both in -1..1."""
    which = torch.randint(len(DRAWS), (count,), device=device)
    makers = {"shift": _shifts, "rotate": _rotations, "perspective": _perspectives}
    drawn = {name: make(count, device) for name, make in makers.items()}
    unit = torch.eye(3, device=device)
    all_of = []
    for draw in DRAWS:
        warp = unit.expand(count, 3, 3)
        for name in draw:  # a later transform samples the output of an earlier one
            warp = warp @ drawn[name]
        all_of.append(warp)
    return torch.stack(all_of, 1)[torch.arange(count, device=device), which]


def warp_grid(warp: Float[Tensor, "b 3 3"], h: int, w: int) -> Float[Tensor, "b h w 2"]:
    """Return the image coordinates at which each output pixel is sampled."""
    y = (2 * torch.arange(h, device=warp.device) + 1) / h - 1
    x = (2 * torch.arange(w, device=warp.device) + 1) / w - 1
    places = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(h, w, device=warp.device)], -1)
    to = torch.einsum("bij,hwj->bhwi", warp, places)
    return to[..., :2] / to[..., 2:]


def _shifts(count: int, device: torch.device) -> Tensor:
    warp = torch.eye(3, device=device).repeat(count, 1, 1)
    warp[:, :2, 2] = (4 * torch.rand(count, 2, device=device) - 2) * SHIFT
    return warp


def _rotations(count: int, device: torch.device) -> Tensor:
    angle = (2 * torch.rand(count, device=device) - 1) * ANGLE
    warp = torch.eye(3, device=device).repeat(count, 1, 1)
    warp[:, 0, 0] = warp[:, 1, 1] = angle.cos()
    warp[:, 0, 1], warp[:, 1, 0] = -angle.sin(), angle.sin()
    return warp


def _perspectives(count: int, device: torch.device) -> Tensor:
    """Return homographies from the displaced to the original corners of the padded image."""
    were = MARGIN * torch.tensor([[-1.0, -1.0], [1, -1], [1, 1], [-1, 1]], device=device).expand(count, 4, 2)
    moved = were * (1 - DISTORTION * torch.rand(count, 4, 2, device=device))
    one, none = torch.ones(count, 4, 1, device=device), torch.zeros(count, 4, 3, device=device)
    place = torch.cat([moved, one], -1)
    rows_x = torch.cat([place, none, -were[..., :1] * moved], -1)
    rows_y = torch.cat([none, place, -were[..., 1:] * moved], -1)
    system = torch.cat([rows_x, rows_y], 1)
    solved = torch.linalg.solve(system, torch.cat([were[..., 0], were[..., 1]], 1))
    return torch.cat([solved, one[:, :1, 0]], 1).reshape(count, 3, 3)
