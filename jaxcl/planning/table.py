"""Plans as text tables."""

from __future__ import annotations

from jaxcl.planning.hardware import parse_topology
from jaxcl.planning.plan import Plan
from jaxcl.planning.step import StepPlan


def as_table(found: Plan) -> str:
    """A plan as text: the needs of each step on one chip."""
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1) or "one device"
    active = "" if found.active_parameters is None else f" ({found.active_parameters / 1e6:,.0f}M active)"
    lines = [
        f"{found.parameters / 1e6:,.0f}M params{active} on {found.topology} ({mesh}), {found.batch_size} rows in "
        f"{found.accumulate} part{'s' if found.accumulate > 1 else ''}, remat {found.remat}",
    ]
    if found.compiler == "host" and parse_topology(found.topology).gpu:
        lines.append("compiled for this machine's processor, which computes in float32: a GPU needs no more memory")
    elif found.compiler == "host":
        lines.append("compiled for this machine's processor, not for a TPU; install libtpu for real figures")
    rows = [["one chip", *found.steps]]
    for title, value in _ROWS.items():
        cells = [value(one) for one in found.steps.values()]
        if any(cells):
            rows.append([title, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines.append("")
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    room = f"{found.bytes_per_chip / 1e9:.2f} of {found.chip_memory / 1e9:.2f} GB"
    lines += ["", f"{'fits' if found.fits else 'does not fit'}: {room} per chip"]
    return "\n".join(lines)


def _size(value: float | None) -> str:
    """Bytes as text, in MB or GB.

    >>> _size(2_500_000), _size(3.2e9)
    ('2.5 MB', '3.20 GB')
    """
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{1000 * value:.2f} ms"


def _share(part: float | None, whole: float | None) -> str:
    return f"{100 * part / whole:.0f} %" if part and whole else ""


def _traffic(one: StepPlan, kind: str) -> str:
    found = one.collectives.get(kind)
    return f"{found.runs:.0f} x, {_size(found.bytes)}" if found else ""


_ROWS = {
    "params": lambda one: _size(one.arguments.get("params")),
    "optimizer": lambda one: _size(one.arguments.get("optimizer")),
    "method": lambda one: _size(one.arguments.get("method")),
    "batch": lambda one: _size(one.arguments.get("batch")),
    "activations, temporaries": lambda one: _size(one.activations),
    "total": lambda one: _size(one.bytes_per_chip) + ("" if one.fits else " !"),
    "operations": lambda one: "" if one.flops is None else f"{one.flops / 1e12:.3g} T",
    "tower and connector": lambda one: _share(one.vision_flops, one.flops),
    "memory traffic": lambda one: _size(one.bytes),
    "all-gather": lambda one: _traffic(one, "all-gather"),
    "reduce-scatter": lambda one: _traffic(one, "reduce-scatter"),
    "all-reduce": lambda one: _traffic(one, "all-reduce"),
    "all-to-all": lambda one: _traffic(one, "all-to-all"),
    "collective-permute": lambda one: _traffic(one, "collective-permute"),
    "compute alone": lambda one: _milliseconds(one.seconds.get("compute")),
    "memory alone": lambda one: _milliseconds(one.seconds.get("memory")),
    "interconnect alone": lambda one: _milliseconds(one.seconds.get("interconnect")),
    "roofline": lambda one: _milliseconds(one.roofline_seconds),
    "utilisation": lambda one: "" if one.utilisation is None else f"{100 * one.utilisation:.0f} %",
    "compiled in": lambda one: f"{one.compile_seconds:.0f} s",
}
