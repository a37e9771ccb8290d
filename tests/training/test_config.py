from __future__ import annotations

import pytest
from pydantic import ValidationError

from jaxcl.errors import UserError
from jaxcl.training.config import TrainingConfig, check_batch_size, task_steps


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [12, 12]),
        ({"epochs": 0.3}, [4, 4]),
        ({"epochs": [2, 0.01]}, [24, 1]),
        ({"steps": 7}, [7, 7]),
        ({"steps": [7, 9]}, [7, 9]),
    ],
)
def test_steps_of_a_task(settings: dict, expected: list[int]) -> None:
    assert [task_steps(TrainingConfig(**settings), index, 2, 12) for index in range(2)] == expected


def test_a_list_needs_an_entry_a_task() -> None:
    with pytest.raises(UserError, match=r"training.epochs: \[1.0, 2.0\] has 2 entries for 3 tasks") as error:
        task_steps(TrainingConfig(epochs=(1, 2)), 0, 3, 10)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 1, "steps": 1},
        {"epochs": 0},
        {"steps": -1},
        {"epochs": []},
        {"epochs": float("nan")},
        {"batch_size": 0},
        {"accumulate": 0},
        {"batchsize": 4},
        {"keep": 0},
    ],
)
def test_impossible_values_are_refused(settings: dict) -> None:
    with pytest.raises(ValidationError):
        TrainingConfig(**settings)


def test_every_field_is_described() -> None:
    assert all(field.description for field in TrainingConfig.model_fields.values())


def test_a_batch_must_divide_over_devices_micro_batches_and_processes() -> None:
    for size in (24, 48):
        check_batch_size(size, accumulate=2, ways=4, processes=3)
    with pytest.raises(
        UserError, match=r"^training.batch_size: 30 must be a multiple of 24 .*nearest: 24 or 48$"
    ) as error:
        check_batch_size(30, accumulate=2, ways=4, processes=3)
    assert error.value.exit_code == 2
    for part in ("mesh data * fsdp = 4", "training.accumulate = 2", "3 processes"):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"method.replay.batch_size: 2 must be a multiple of 4 .*nearest: 4$"):
        check_batch_size(2, accumulate=1, ways=4, key="method.replay.batch_size")
