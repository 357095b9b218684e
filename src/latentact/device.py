"""Compute devices, their memory and the precisions that they support."""

from __future__ import annotations

import ctypes
import os

from latentact.errors import UserError


def require_device(device: str) -> None:
    """Check that torch can use a device.

    Raises:
        UserError: the device is unknown or not available.
    """
    import torch

    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(str(device).partition(":")[0], False):
        usable = " or ".join(name for name, usable in available.items() if usable)
        raise UserError(f"device must be {usable} on this machine, got {device!r}.")


def select_device(device: str) -> str:
    """Return a device that torch can use; `auto` is CUDA, else MPS, else the CPU, as in LeRobot.

    Raises:
        UserError: as in `require_device`.
    """
    import torch

    if device == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return "cuda" if cuda else "mps" if mps else "cpu"
    require_device(device)
    return device


def memory_bytes(device: str) -> int:
    """Return the memory size of a device (cpu or cuda) in bytes."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_properties("cuda").total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def supports_bf16(device: str) -> bool:
    """Return whether a device supports bf16 natively; `auto` is CUDA where available, else the CPU."""
    import torch

    if device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def supports_int8(device: str) -> bool:
    """Return whether a device is a CPU with native int8 products that this torch build can use."""
    import torch

    return device == "cpu" and torch.cpu._is_vnni_supported() and hasattr(torch.ops.onednn, "qconv_prepack")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for reuse instead of returning it to the operating system.

    Otherwise every large activation is mapped, zeroed and unmapped at each step, which costs up to a quarter
    of a training step on the CPU. Does nothing if the C library has no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD: the largest
        mallopt(-8, 1)  # M_ARENA_MAX: threads share freed memory
