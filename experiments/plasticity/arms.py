"""The networks of all seeds on their way through the tasks, and what each arm does to them on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import symtele_cuda as st
from experiments.plasticity.tasks import BATCH_SIZE, Task
from experiments.side_by_side import SideBySide, make_mlp

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "LeakyReLU 0.01": lambda: nn.LeakyReLU(0.01),
    "ReLU": nn.ReLU,
}


class Learners:
    """The networks of all seeds; classes are learned with the cross entropy, other targets with the squared error.

    frozen: networks whose outputs are added, with their signs. reasons: what the teleports have said.
    """

    def __init__(
        self, activation: str, lr: float, arm: Arm, seeds: Sequence[int], dims: Sequence[int], optimizer: str = "adamw"
    ) -> None:
        self.lr, self.arm, self.dims, self.optimizer_name = lr, arm, dims, optimizer
        self.activation = ACTIVATIONS[activation]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.frozen: list[tuple[SideBySide, float]] = []
        self.reasons: list[str] = []
        self.models = self.make_models()
        self.networks = SideBySide(self.models)
        self.initial = [parameter.detach().clone() for parameter in self.networks.parameters()]
        self.reset_optimizer()

    def make_models(self) -> list[nn.Sequential]:
        """New networks of torch's own start, each from the generator of its seed."""
        models = []
        for generator in self.generators:
            with torch.random.fork_rng([]):
                torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
                models.append(make_mlp(self.dims, self.activation, self.arm.layer_norm))
        return models

    def reset_optimizer(self) -> None:
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        options = {"lr": self.lr, "weight_decay": self.arm.weight_decay, "fused": True}
        self.optimizer = kinds[self.optimizer_name](self.networks.parameters(), **options)

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        return self.networks(x) + self.offset(x)

    @torch.no_grad()
    def offset(self, x: Tensor) -> Tensor:
        return sum((sign * networks(x) for networks, sign in self.frozen), torch.zeros(()))

    def learn(self, task: Task, epochs: int) -> None:
        """On batches of the samples, in an order of its own in each epoch and for each seed."""
        offset = self.offset(task.x) if self.frozen else torch.zeros(*task.x.shape[:2], 1)
        for _ in range(epochs):
            orders = torch.stack([torch.randperm(task.x.shape[1], generator=g) for g in self.generators])
            for indices in orders.split(BATCH_SIZE, dim=1):
                self.step(*(rows(part, indices) for part in (task.x, task.y, offset)))

    def step(self, x: Tensor, y: Tensor, offset: Tensor) -> Tensor:
        """One step of the optimizer; the outputs before it."""
        outputs = self.networks(x) + offset
        self.descend(len(x) * mean_loss(outputs.flatten(0, 1), y.flatten(0, 1)))
        return outputs.detach()

    def descend(self, loss: Tensor) -> None:
        """One step of the optimizer on the sum of the networks' losses, and on the arm's penalty."""
        self.optimizer.zero_grad()
        loss.backward()
        if self.arm.pull:
            for parameter, start in zip(self.networks.parameters(), self.initial, strict=True):
                assert parameter.grad is not None
                parameter.grad.add_(parameter.detach() - start, alpha=2 * self.arm.pull)
        self.optimizer.step()

    def act(self, task: Task) -> None:
        """What the arm does at a change of the task; all but some have a new optimizer afterwards."""
        if self.arm.act is None:
            return
        self.networks.read(self.models)
        self.arm.act(self, task)
        self.networks.write(self.models)
        self.reset_optimizer()


def rows(x: Tensor, indices: Tensor) -> Tensor:
    """Of each seed the rows of its own indices (S×n)."""
    return x[torch.arange(len(x)).unsqueeze(1), indices]


def mean_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(outputs, y) if y.is_floating_point() else F.cross_entropy(outputs, y)


def nothing(learners: Learners, _: Task) -> None:
    """A new optimizer is all."""


def shrink_and_perturb(share: float) -> Act:
    """θ ← s θ + (1 − s) θ' with a new start θ' (Ash and Adams 2020)."""

    @torch.no_grad()
    def act(learners: Learners, _: Task) -> None:
        for model, fresh in zip(learners.models, learners.make_models(), strict=True):
            for parameter, new in zip(model.parameters(), fresh.parameters(), strict=True):
                parameter.lerp_(new, 1 - share)

    return act


def redo(threshold: float) -> Act:
    """ReDo (Sokar et al. 2023): new incoming and zero outgoing weights for units with a small mean |h|.

    threshold: small is below this share of the layer's mean.
    """

    @torch.no_grad()
    def act(learners: Learners, task: Task) -> None:
        for model, fresh, x in zip(learners.models, learners.make_models(), task.x, strict=True):
            hidden = x
            linears, news = map(linears_of, (model, fresh))
            for linear, following, new in zip(linears, linears[1:], news, strict=False):
                hidden = learners.activation()(linear(hidden))
                size = hidden.abs().mean(0)
                dormant = size <= threshold * size.mean()
                linear.weight[dormant], linear.bias[dormant] = new.weight[dormant], new.bias[dormant]
                following.weight[:, dormant] = 0.0

    return act


def reinitialise(share: float) -> Act:
    """After selective weight reinitialization (arXiv 2508.00212): a new start for the weights of least |w ∂L/∂w|.

    share: of each weight matrix; biases stay. The source does so for fewer weights and more often.
    """

    def act(learners: Learners, task: Task) -> None:
        for model, fresh, x, y in zip(learners.models, learners.make_models(), task.x, task.y, strict=True):
            weights, news = ([linear.weight for linear in linears_of(net)] for net in (model, fresh))
            gradients = torch.autograd.grad(mean_loss(model(x), y), weights)
            with torch.no_grad():
                for weight, gradient, new in zip(weights, gradients, news, strict=True):
                    utility = (weight * gradient).abs().flatten()
                    least = utility.topk(round(share * len(utility)), largest=False).indices
                    weight.view(-1)[least] = new.view(-1)[least]

    return act


def linears_of(model: nn.Sequential) -> list[nn.Linear]:
    return [module for module in model if isinstance(module, nn.Linear)]


def start_over(learners: Learners, _: Task) -> None:
    learners.models = learners.make_models()


def inject(learners: Learners, _: Task) -> None:
    """Freeze the networks and add new ones minus their own start (Nikishin et al. 2023): twice as many parameters more
    each time."""
    learners.frozen.append((SideBySide(learners.models), 1.0))
    learners.models = learners.make_models()
    learners.frozen.append((SideBySide(learners.models), -1.0))


def standardise(**options: Any) -> Act:
    """The library's teleport."""

    def act(learners: Learners, task: Task) -> None:
        method = st.Standardise(refit="all", **options)
        for model, x, y in zip(learners.models, task.x, task.y, strict=True):
            learners.reasons.append(st.teleport_mlp(model, (x, y), method=method).reason)

    return act


Act = Callable[[Learners, Task], None]


@dataclass(frozen=True)
class Arm:
    """What is done at each change of the task, None for nothing at all, and all along.

    weight_decay: AdamW's. pull: the L2 penalty on the distance to the initial weights (arXiv 2308.11958).
    """

    act: Act | None = None
    weight_decay: float = 0.0
    pull: float = 0.0
    layer_norm: bool = False


PLAIN, RESET, SHRUNK, FRESH = "plain", "optimizer reset", "shrink and perturb 0.8", "fresh network"
DORMANT, SELECTED, INJECTED = "ReDo 0.1", "selective reinitialization 0.1", "plasticity injection"
STANDARDISE, ANYHOW = "standardise", "standardise, whatever is kept"
ARMS = {
    PLAIN: Arm(),
    RESET: Arm(nothing),
    "weight decay 0.01": Arm(weight_decay=0.01),
    "weight decay 0.1": Arm(weight_decay=0.1),
    "L2 to the start 1e-3": Arm(pull=1e-3),
    "L2 to the start 1e-2": Arm(pull=1e-2),
    "shrink and perturb 0.4": Arm(shrink_and_perturb(0.4)),
    SHRUNK: Arm(shrink_and_perturb(0.8)),
    DORMANT: Arm(redo(0.1)),
    SELECTED: Arm(reinitialise(0.1)),
    "LayerNorm": Arm(layer_norm=True),
    INJECTED: Arm(inject),
    FRESH: Arm(start_over),
    STANDARDISE: Arm(standardise()),
    ANYHOW: Arm(standardise(least_kept=0.0)),
}
MAIN = (PLAIN, RESET, SHRUNK, SELECTED, FRESH, STANDARDISE, ANYHOW)
VARIANTS = ("weight decay 0.01", "L2 to the start 1e-2", "shrink and perturb 0.4")  # tables on the page leave them out
