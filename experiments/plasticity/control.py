"""Reinforcement learning with a value network: DQN on CartPole, several updates a step (Nikishin et al. 2022).

Many updates on few samples make a network that learns later ones badly. What restores it must not change the policy at
a stroke, as that acts in the meantime. The environment is CartPole-v1 of gymnasium, of all seeds side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.plasticity.arms import rows
from experiments.plasticity.jobs import Job, Outcome, Runs
from experiments.plasticity.tasks import SAMPLES, Control, Task
from experiments.side_by_side import SideBySide

GRAVITY, MASS, POLE_MASS, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.1, 0.1, 0.5, 10.0, 0.02  # MASS: cart and pole
FARTHEST, STEEPEST, LONGEST = 2.4, math.radians(12), 500
WIDTH, ACTIONS, DISCOUNT, BATCH = 64, 2, 0.99, 32
UPDATES, EXPLORING, LEAST_RANDOM, UNTIL_TARGET, EPISODES = 2, 1000, 0.05, 100, 10


class CartPoles:
    """Poles on carts, `count` of each seed (S×count): position, its speed, angle, its speed."""

    def __init__(self, generators: Sequence[torch.Generator], count: int = 1) -> None:
        self.generators, self.count = generators, count
        self.state, self.ages = self._starts(), torch.zeros(len(generators), count, dtype=torch.long)

    def _starts(self) -> Tensor:
        draws = [torch.rand(self.count, 4, generator=g, dtype=torch.float64) for g in self.generators]
        return 0.1 * torch.stack(draws) - 0.05

    def step(self, right: Tensor) -> Tensor:
        """Push each cart to the right (1) or to the left (0); whether it has failed."""
        _, speed, angle, turn = self.state.unbind(-1)
        push = (FORCE * (2 * right - 1) + POLE_MASS * HALF_LENGTH * turn**2 * angle.sin()) / MASS
        inertia = HALF_LENGTH * (4 / 3 - POLE_MASS * angle.cos() ** 2 / MASS)
        turning = (GRAVITY * angle.sin() - angle.cos() * push) / inertia
        moving = push - POLE_MASS * HALF_LENGTH * turning * angle.cos() / MASS
        changes = torch.stack([speed, moving, turn, turning], -1)
        self.state, self.ages = self.state + SECONDS * changes, self.ages + 1
        return (self.state[..., 0].abs() > FARTHEST) | (self.state[..., 2].abs() > STEEPEST)

    def start_again(self, ended: Tensor) -> None:
        self.state = torch.where(ended.unsqueeze(-1), self._starts(), self.state)
        self.ages = torch.where(ended, 0, self.ages)


class Agents:
    """The value networks of all seeds, what they have seen, and the environments they are in.

    Rewards are 1 − γ, so that values are from 0 to 1.
    """

    def __init__(self, job: Job, steps: int) -> None:
        self.runs = Runs(job, (4, WIDTH, WIDTH, ACTIONS))
        self.learners = self.runs.learners
        self.generators = [torch.Generator().manual_seed(seed) for seed in job.seeds]
        self.carts, self.seen = CartPoles(self.generators), 0
        self.states, self.nexts = torch.zeros(2, len(job.seeds), steps, 4).unbind()
        self.actions = torch.zeros(len(job.seeds), steps, dtype=torch.long)
        self.failed = torch.zeros(len(job.seeds), steps)
        self.renew_target()

    def renew_target(self) -> None:
        self.learners.networks.read(self.learners.models)
        self.target = SideBySide(self.learners.models)
        self.target_frozen = [*self.learners.frozen]

    def live(self) -> None:
        """One step of each environment, and some updates."""
        state = self.carts.state.float()
        chances, choices = torch.stack([torch.rand(2, generator=g) for g in self.generators]).unbind(1)
        exploring = max(LEAST_RANDOM, 1 - self.seen / EXPLORING)
        greedy = self.learners.outputs(state).argmax(-1)
        action = torch.where((chances < exploring).unsqueeze(1), (choices < 0.5).long().unsqueeze(1), greedy)
        failed = self.carts.step(action)
        at = self.seen
        self.states[:, at], self.nexts[:, at] = state[:, 0], self.carts.state[:, 0].float()
        self.actions[:, at], self.failed[:, at] = action[:, 0], failed[:, 0].float()
        self.carts.start_again(failed | (self.carts.ages >= LONGEST))
        self.seen += 1
        if self.seen >= BATCH:
            for _ in range(UPDATES):
                self.update()
        if self.seen % UNTIL_TARGET == 0:
            self.renew_target()

    def sample(self, count: int) -> Tensor:
        return torch.stack([torch.randint(self.seen, (count,), generator=g) for g in self.generators])

    @torch.no_grad()
    def targets(self, indices: Tensor) -> Tensor:
        """1 − γ + γ max Q'(s') of the target networks, without what follows a failure."""
        nexts = rows(self.nexts, indices)
        values = sum((sign * one(nexts) for one, sign in self.target_frozen), self.target(nexts)).amax(-1)
        return 1 - DISCOUNT + DISCOUNT * (1 - rows(self.failed, indices)) * values

    def update(self) -> None:
        indices = self.sample(BATCH)
        states, actions = rows(self.states, indices), rows(self.actions, indices).unsqueeze(-1)
        values = (self.learners.networks(states) + self.learners.offset(states)).gather(-1, actions).squeeze(-1)
        self.learners.descend((values - self.targets(indices)).square().mean(1).sum())

    def act(self) -> None:
        """The arm's act, and how far the greedy policy's return jumps at it."""
        indices, others = self.sample(SAMPLES), self.sample(SAMPLES)
        states, actions = rows(self.states, indices), rows(self.actions, indices).unsqueeze(-1)
        y = self.learners.outputs(states).scatter(-1, actions, self.targets(indices).unsqueeze(-1))
        before = self.returns()
        self.runs.act(Task(states, y, states, y), rows(self.states, others))
        self.renew_target()
        self.runs.jumps.append([after - old for after, old in zip(self.returns(), before, strict=True)])

    def returns(self) -> list[float]:
        """The mean return of the greedy policy, as a share of the largest, over the same starts each time."""
        carts = CartPoles([torch.Generator().manual_seed(seed) for seed in self.runs.job.seeds], EPISODES)
        alive, total = torch.ones(carts.ages.shape, dtype=torch.bool), torch.zeros(carts.ages.shape)
        while bool(alive.any()) and int(carts.ages.max()) < LONGEST:
            total += alive
            alive = alive & ~carts.step(self.learners.outputs(carts.state.float()).argmax(-1))
        return (total.mean(1) / LONGEST).tolist()


def run_job(job: Job, protocol: Control) -> Outcome:
    """The returns are the accuracies; an arm acts after every so many of them, but for the last."""
    agents = Agents(job, job.tasks * protocol.steps)
    for check in range(job.tasks):
        if check > 0 and check % protocol.every == 0:
            agents.act()
        for _ in range(protocol.steps):
            agents.live()
        agents.runs.accuracies.append(agents.returns())
    return agents.runs.outcome()
