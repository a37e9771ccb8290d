"""Programs of their own, with several devices."""

import jax

# The older way of making code compiles small programs in a third of the time. XLA ends at a flag that it does not know.
FAST = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__[:2] == (0, 10) else ""


def flags(devices: int) -> str:
    """`XLA_FLAGS` of a program with this number of devices, which compiles quickly."""
    return f"{FAST} --xla_force_host_platform_device_count={devices}".strip()


def host_devices(devices: int) -> dict[str, str]:
    """Environment of a program with this number of devices of this machine's processor.

    A device waits for the others with a thread for each collective that it has come to. Where the program does not say
    which of two comes first, devices may wait in different ones until there are no threads left, which XLA has as many
    of as there are cores, or devices. So there are more.
    """
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(devices), "PJRT_NPROC": str(8 * devices)}
