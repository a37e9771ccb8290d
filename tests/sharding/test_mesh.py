from __future__ import annotations

import jax
import pytest
from pydantic import ValidationError

from jaxcl.errors import UserError
from jaxcl.sharding.mesh import AXES, MeshConfig, make_mesh, mesh_sizes


@pytest.mark.parametrize(
    ("settings", "devices", "expected"),
    [
        ({}, 8, (8, 1, 1)),
        ({"data": 1, "fsdp": -1}, 8, (1, 8, 1)),
        ({"fsdp": 2, "tensor": 2}, 8, (2, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (2, 2, 2)),
        ({"tensor": 3}, 3, (1, 1, 3)),
    ],
)
def test_the_sizes_multiply_to_the_devices(settings: dict, devices: int, expected: tuple[int, ...]) -> None:
    assert tuple(mesh_sizes(MeshConfig(**settings), devices).values()) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor": 3}, "data=-1, fsdp=1, tensor=3 leaves no whole number for -1 on 8 devices"),
        ({"data": 3, "tensor": 2}, "data=3, fsdp=1, tensor=2 needs 6 devices but there are 8"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        mesh_sizes(MeshConfig(**settings), 8)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("settings", [{"data": 0}, {"fsdp": -2}, {"fsdp": -1}, {"pipeline": 2}, {"tensor": 1.5}])
def test_impossible_sizes_are_refused(settings: dict) -> None:
    with pytest.raises(ValidationError):
        MeshConfig(**settings)


def test_the_mesh_has_all_axes_also_on_one_device() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape.values()) == (1, 1, 1)
    assert make_mesh(MeshConfig()).size == jax.device_count()


def test_every_field_is_described() -> None:
    assert all(field.description for field in MeshConfig.model_fields.values())
