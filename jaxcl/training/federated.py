"""Configuration of federated training: clients, rounds, and what the server makes of what clients send."""

from __future__ import annotations

from typing import Literal

import numpy as np
import optax
from jaxtyping import Int
from pydantic import Field

from jaxcl.functional.federated import adaptive_server
from jaxcl.schema import Schema

_ADAPTIVE: dict[str, Literal["adagrad", "adam", "yogi"]] = {
    "fedadagrad": "adagrad",
    "fedadam": "adam",
    "fedyogi": "yogi",
}


class ServerConfig(Schema):
    """The server's optimizer, whose gradient is minus the mean of the clients' updates."""

    name: Literal["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"] = Field(
        "fedavg",
        description="fedavg: gradient descent, with learning rate 1 the mean of the clients' params; "
        "fedavgm: with momentum; fedadagrad, fedadam, fedyogi: adaptive rates",
    )
    learning_rate: float = Field(1.0, gt=0, description="the server's learning rate; adaptive ones need about 0.001")
    momentum: float = Field(0.9, ge=0, lt=1, description="fedavgm: the momentum")
    b1: float = Field(0.9, ge=0, lt=1, description="adaptive: decay of the first moment")
    b2: float = Field(0.99, ge=0, lt=1, description="fedadam, fedyogi: decay of the second moment")
    adaptivity: float = Field(1e-3, gt=0, description="adaptive: tau, added to the root of the second moment")

    def build(self) -> optax.GradientTransformation:
        """The optimizer."""
        if self.name in _ADAPTIVE:
            rates = {"b1": self.b1, "b2": self.b2, "adaptivity": self.adaptivity}
            return adaptive_server(_ADAPTIVE[self.name], self.learning_rate, **rates)
        return optax.sgd(self.learning_rate, momentum=self.momentum if self.name == "fedavgm" else None)


class FederatedConfig(Schema):
    """Several clients learn one model: each trains on its own rows, and only params and little else leave it."""

    clients: int = Field(ge=1, description="clients that the training rows of each task are divided over")
    alpha: float | None = Field(
        None,
        gt=0,
        description="divide the rows of each answer in shares drawn from Dirichlet(alpha): the smaller, the more do "
        "clients differ; none: evenly, at random",
    )
    rounds: int = Field(ge=1, description="rounds per task")
    steps: int = Field(ge=1, description="optimizer steps of a client in a round")
    participation: float = Field(
        1.0, gt=0, le=1, description="share of the clients in a round, rounded up, drawn anew for each round"
    )
    server: ServerConfig = Field(default_factory=ServerConfig, description="the server's optimizer")

    def chosen(self, seed: int, task: int, round_number: int) -> Int[np.ndarray, " chosen"]:
        """The clients of a round, in rising order.

        Args:
          seed: the run's.
          task: index of the task.
          round_number: the round in the task, from 0.

        Examples:
          >>> FederatedConfig(clients=3, rounds=1, steps=1).chosen(0, 0, 0).tolist()
          [0, 1, 2]
        """
        count = int(np.ceil(self.participation * self.clients - 1e-9))
        drawn = np.random.default_rng((seed, task, round_number)).permutation(self.clients)
        return np.sort(drawn[:count])
