"""What the machine can compute with, and how its C library treats memory."""

from __future__ import annotations

import ctypes
import os

from latentact.errors import UserError


def require_device(device: str) -> None:
    """Check that torch can compute on a device.

    Raises:
        UserError: it is unknown, or not there.
    """
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(str(device).partition(":")[0], False):
        usable = ", ".join(name for name, found in there.items() if found)
        raise UserError(f"device is {device!r}; torch can use {usable} here.")


def memory_bytes(device: str) -> int:
    """Return the size of the memory of a device, cpu or cuda."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_properties("cuda").total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def supports_bf16(device: str) -> bool:
    """Return whether a device (auto: the one that torch would take) multiplies bf16 natively."""
    import torch

    if device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def supports_int8(device: str) -> bool:
    """Return whether a device is a CPU that multiplies 8-bit integers natively, and torch can ask it to."""
    import torch

    return device == "cpu" and torch.cpu._is_vnni_supported() and hasattr(torch.ops.onednn, "qconv_prepack")


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next step instead of returning them to the system.

    Without it every large activation is mapped, zeroed and unmapped again at each step, which costs a CPU
    training step up to a quarter of its time. Does nothing where the C library has no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD: the largest
        mallopt(-8, 1)  # M_ARENA_MAX: threads share what is freed
