"""Configuration of federated training: clients, rounds, and what the server makes of what clients send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import optax
from jaxtyping import Int
from pydantic import Field, model_validator

from jaxcl.functional.client_drift import proximal, scaffold
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


class ClientPrivacyConfig(Schema):
    """Clipped updates and noise on their sum, so that the model reveals next to nothing about any single client."""

    clip: float = Field(gt=0, description="largest norm of a client's update in a round")
    noise_multiplier: float = Field(
        ge=0, description="standard deviation of the noise on the sum of updates, in multiples of clip; 0: none"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="delta for which epsilon is reported; well below 1 / clients")


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
    proximal: float = Field(
        0.0, ge=0, description="mu of FedProx: clients are pulled towards the params that a round began with; 0: not"
    )
    control_variates: bool = Field(
        False,
        description="SCAFFOLD: corrects each client's gradients by how they differ from those of all; as many "
        "numbers as params travel in addition",
    )
    share: Literal["params", "adapters"] | None = Field(
        None,
        description="what is trained and travels; params: all that training changes; adapters: of each adapter "
        "(model.lora) the second factor, while the first one stays as it was drawn (FFA-LoRA); none: adapters, where "
        "the model has any",
    )
    privacy: ClientPrivacyConfig | None = Field(
        None, description="clip clients' updates and add noise to their sum (DP-FedAvg); none: neither"
    )
    secure: bool = Field(
        False, description="hide each client's update from the server by masks that cancel in the sum over clients"
    )
    owners: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="a folder per client with its own data: the sources of its tasks are read there and not in "
        "data_root, where the rows are that the server is evaluated on; none: the rows of data_root are divided",
    )
    orders: tuple[tuple[str, ...], ...] | None = Field(
        None,
        min_length=1,
        description="for each client the names of all tasks, in the order in which it learns them; none: all learn "
        "them as tasks lists them, which is also the order that the server is evaluated in",
    )
    score_clients: bool = Field(
        False, description="with owners: each client also scores the server's model on its own rows, after each task"
    )

    def only_adapters(self, present: bool) -> bool:
        """Whether only the second factor of each adapter is trained and travels.

        Args:
          present: whether the model has adapters.
        """
        return present and self.share != "params"

    @property
    def drift(self) -> optax.GradientTransformation | None:
        """What comes first in a client's optimizer; see `jaxcl.functional.client_drift`."""
        parts = [scaffold()] * self.control_variates + [proximal(self.proximal)] * (self.proximal > 0)
        return optax.chain(*parts) if parts else None

    def chosen(self, seed: int, task: int, round_number: int) -> Int[np.ndarray, " chosen"]:
        """Numbers of the clients of a round, in rising order.

        Args:
          seed: the run's.
          task: index of the task.
          round_number: the round in the task, from 0.

        Examples:
          >>> FederatedConfig(clients=3, rounds=1, steps=1).chosen(0, 0, 0).tolist()
          [0, 1, 2]
        """
        drawn = np.random.default_rng((seed, task, round_number)).permutation(self.clients)
        return np.sort(drawn[: self.members])

    def order(self, client: int, names: Sequence[str]) -> list[int]:
        """Indices of the tasks in the order in which a client learns them.

        Args:
          client: the client's number.
          names: of the tasks, as the configuration lists them.

        Examples:
          >>> two = FederatedConfig(clients=2, rounds=1, steps=1, orders=(("a", "b"), ("b", "a")))
          >>> two.order(0, ["a", "b"]), two.order(1, ["a", "b"])
          ([0, 1], [1, 0])
        """
        order = names if self.orders is None else self.orders[client]
        return [names.index(name) for name in order]

    @property
    def members(self) -> int:
        """Clients in a round.

        >>> FederatedConfig(clients=10, rounds=1, steps=1, participation=0.25).members
        3
        """
        return int(np.ceil(self.participation * self.clients - 1e-9))

    @model_validator(mode="after")
    def _fits(self) -> FederatedConfig:
        if self.owners is not None and len(self.owners) != self.clients:
            raise ValueError(f"owners: expected a folder for each of {self.clients} clients, got {len(self.owners)}")
        if self.orders is not None and len(self.orders) != self.clients:
            raise ValueError(f"orders: expected an order for each of {self.clients} clients, got {len(self.orders)}")
        if self.owners is not None and self.alpha is not None:
            raise ValueError("alpha divides rows over clients, and with owners each has its own; name one of them")
        if self.score_clients and self.owners is None:
            raise ValueError("score_clients: only with owners; divided rows are evaluated by the server, all of them")
        if self.secure and self.members < 2:
            raise ValueError("secure: a sum over one client hides nothing; allowed: at least 2 clients in a round")
        if self.privacy is not None and self.control_variates:
            raise ValueError("control_variates: no noise hides them; allowed without privacy")
        return self
