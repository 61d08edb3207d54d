"""Where models run, and how much memory is there."""

from __future__ import annotations

import psutil
import torch

from lorashear.errors import SettingsError, first_line

USABLE = 0.7
"""Share of the available memory that is planned with; the rest is for fragmentation and other processes."""


def available_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def resolve_device(name: str) -> torch.device:
    """The device that a setting names; "auto" is a GPU that torch finds (CUDA, ROCm), else the CPU.

    Raises:
        SettingsError: where there is no such device on this machine, or it is not the first GPU, which Trainer trains on.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise SettingsError(
            f'device = {name!r}: not usable on this machine ({first_line(error)}); expected "auto", "cpu" or e.g. "cuda:0"'
        ) from None
    if device.type == "cuda" and device.index:
        raise SettingsError(
            f"device = {name!r}: training goes to the first GPU that it sees; start with CUDA_VISIBLE_DEVICES={device.index} "
            "and leave `device` out"
        )
    if device.type == "meta":
        raise SettingsError('device = "meta": nothing is computed there; expected "auto", "cpu" or e.g. "cuda:0"')
    return device
