"""Programs of their own, with several devices."""

import jax

# The older way of making code compiles small programs in a third of the time. XLA ends at a flag that it does not know.
FAST = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__[:2] == (0, 10) else ""


def flags(devices: int) -> str:
    """`XLA_FLAGS` of a program with this number of devices, which compiles quickly."""
    return f"{FAST} --xla_force_host_platform_device_count={devices}".strip()
