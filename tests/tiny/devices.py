"""Programs of their own, with several devices."""

import os


def flags(devices: int) -> str:
    """`XLA_FLAGS` of a program with so many devices, beside those of the tests."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
