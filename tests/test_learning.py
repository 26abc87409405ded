"""The experiment on plasticity: networks side by side, what the arms do, how runs are told and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="needs symtele_cuda[demo]")

from experiments.data import Dataset, load_digits
from experiments.plasticity import arms, control, results, runs, tasks
from experiments.plasticity.arms import ARMS, Learners
from experiments.plasticity.jobs import SUITES, Job, Outcome, jobs_of, restore
from experiments.plasticity.tasks import Task
from experiments.side_by_side import SideBySide, make_mlp
from symtele_cuda.guards import STANDARDISED

SEEDS = (7, 8)


def digits() -> Dataset:
    return load_digits().take(torch.arange(900))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_networks_side_by_side_compute_what_each_does(layer_norm: bool) -> None:
    models = [make_mlp((6, 5, 5, 3), nn.Tanh, layer_norm) for _ in range(3)]
    networks = SideBySide(models)
    x = torch.randn(3, 4, 6)
    expected = torch.stack([model(one) for model, one in zip(models, x, strict=True)])
    torch.testing.assert_close(networks(x), expected)
    others = [make_mlp((6, 5, 5, 3), nn.Tanh, layer_norm) for _ in range(3)]
    networks.read(others)
    torch.testing.assert_close(torch.stack([m(one) for m, one in zip(others, x, strict=True)]), expected)
    networks.write(models[::-1])
    torch.testing.assert_close(networks(x)[0], models[2](x[0]))


def make_learners(arm: str) -> tuple[Learners, Task]:
    torch.manual_seed(0)
    learners = Learners("LeakyReLU 0.01", 1e-2, ARMS[arm], SEEDS, (64, 128, 128, 10))
    x, y = torch.randn(2, 200, 64), torch.randint(10, (2, 200))
    task = Task(x, y, x, y)
    learners.learn(task, 2)
    return learners, task


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_acts_and_what_should_stay_stays(arm: str) -> None:
    learners, task = make_learners(arm)
    before, weights = learners.outputs(task.x), [p.detach().clone() for p in learners.networks.parameters()]
    learners.act(task)
    after = learners.outputs(task.x)
    if arm in (arms.RESET, arms.INJECTED) or ARMS[arm].act is None:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    if arm == arms.FRESH:
        assert not any(map(torch.equal, learners.networks.parameters(), weights))
    assert bool(learners.optimizer.state) == (ARMS[arm].act is None)
    learners.learn(task, 1)


def test_redo_gives_new_weights_to_dormant_units_alone() -> None:
    learners, task = make_learners(arms.DORMANT)
    with torch.no_grad():
        for stack in (learners.networks.stacked[0], learners.networks.stacked[1]):
            stack[:, :3] = 0.0  # the first three units of the first layer are 0 everywhere
    before = learners.networks.stacked[0].detach().clone()
    learners.act(task)
    after = learners.networks.stacked[0].detach()
    outgoing = learners.networks.stacked[2].detach()[:, :, :3]
    assert (after[:, :3] != 0).all()
    assert (outgoing == 0).all(-1).double().mean() > 0.5  # the others are of units that have got new weights themselves
    assert (after[:, 3:] == before[:, 3:]).all(-1).double().mean() > 0.9


def test_selective_reinitialization_takes_the_weights_of_least_use() -> None:
    learners, task = make_learners(arms.SELECTED)
    learners.networks.read(learners.models)
    weights = [linear.weight for linear in arms.linears_of(learners.models[0])]
    gradients = torch.autograd.grad(arms.mean_loss(learners.models[0](task.x[0]), task.y[0]), weights)
    before = [weight.detach().clone() for weight in weights]
    learners.act(task)
    for stack, old, gradient in zip(learners.networks.stacked[::2], before, gradients, strict=True):
        use, changed = (old * gradient).abs(), stack[0] != old
        assert changed.double().mean().item() == pytest.approx(0.1, abs=0.001)
        assert use[changed].max() <= use[~changed].min()


def test_standardise_keeps_most_predictions() -> None:
    learners, task = make_learners(arms.ANYHOW)
    before = learners.outputs(task.x).argmax(-1)
    learners.act(task)
    assert learners.reasons == [STANDARDISED] * 2
    assert (learners.outputs(task.x).argmax(-1) == before).double().mean() > 0.8


@pytest.mark.parametrize("protocol", [name for name, one in tasks.PROTOCOLS.items() if isinstance(one, tasks.Protocol)])
def test_the_tasks_are_what_their_protocols_say(protocol: str) -> None:
    data = tasks.draw(digits(), torch.Generator().manual_seed(0))
    make = tasks.PROTOCOLS[protocol].make
    first, second = (make(data, k, torch.Generator().manual_seed(k)) for k in (0, 1))
    if protocol.endswith("relabelled"):
        pairs = {(int(old), int(new)) for old, new in zip(data.y, first.y, strict=True)}
        assert len(pairs) == 10 and not torch.equal(first.y, second.y)
    elif protocol == "random labels":
        assert first.test_x is data.x and len(first.y.unique()) == 10
    elif protocol == "permuted inputs":
        assert torch.equal(first.x.sort(1).values, data.x.sort(1).values) and not torch.equal(first.x, data.x)
    elif protocol == "more classes":
        assert int(first.y.max()) == 1 and int(second.y.max()) == 3 and int(first.test_y.min()) == -1
    else:
        assert len(first.x) == len(data.x) // 2 and len(second.x) == len(data.x)


def test_a_task_on_its_way_has_the_new_labels_of_a_part() -> None:
    x, old, new = torch.randn(2, 8, 3), torch.zeros(2, 8), torch.ones(2, 8)
    blended = tasks.blend(Task(x, old, x, old), Task(x, new, x, new), 0.25)
    assert blended.y.sum(1).tolist() == [2, 2] and torch.equal(blended.test_y, new)


def test_a_permuted_stream_has_every_sample_once_a_task() -> None:
    data = tasks.draw(load_digits(), torch.Generator().manual_seed(0))
    stream = tasks.PROTOCOLS["online permuted"]
    x, y = stream.make(data, 2, torch.Generator().manual_seed(0))
    assert len(x) == len(y) == 2 * stream.steps * tasks.BATCH_SIZE
    whole = torch.cat([data.x, data.test_x]).sum(1).sort().values
    for part in x.chunk(2):
        torch.testing.assert_close(part.sum(1).sort().values, whole, rtol=1e-4, atol=1e-3)
    assert not torch.equal(x[:5].sort(1).values, x[len(x) // 2 :][:5].sort(1).values)


def test_the_slow_regression_flips_one_slow_bit_a_task() -> None:
    stream = tasks.PROTOCOLS["slow regression"]
    x, y = stream.make(tasks.draw(digits(), torch.Generator().manual_seed(0)), 4, torch.Generator().manual_seed(0))
    slow = x[:, : tasks.SLOW_BITS].unflatten(0, (4, -1))
    assert (slow == slow[:, :1]).all()
    assert ((slow[1:, 0] != slow[:-1, 0]).sum(1) == 1).all()
    assert set(x.unique().tolist()) == {-1, 1} and len(x[:, tasks.SLOW_BITS :].unique(dim=0)) == 32
    assert (y.mean().item(), y.std().item()) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-4))


def test_a_batch_of_a_stream_is_judged_before_it_is_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the first task's score is that of one pass from the start, and arms act where the stream says."""
    stream = replace(tasks.PROTOCOLS["online permuted"], steps=3, every=2)
    monkeypatch.setitem(tasks.PROTOCOLS, "online permuted", stream)
    monkeypatch.setattr(runs, "SAMPLES", 40)
    job = Job("online permuted", "tanh", arms.FRESH, 0.0, 2, SEEDS)
    outcome = runs.run_job(job, load_digits())
    assert len(outcome.accuracies[0]) == 2 and len(outcome.kept_own[0]) == 2  # acts after 2 and 4 of the 6 steps
    untrained = runs.run_job(replace(job, arm=arms.PLAIN), load_digits())
    trained = runs.run_job(replace(job, arm=arms.PLAIN, lr=1e-2), load_digits())
    assert untrained.accuracies != trained.accuracies
    assert all(one <= 0.4 for one in (run[0] for run in untrained.accuracies))
    assert set(untrained.kept_others[0]) == {1.0} and max(outcome.kept_others[0]) < 0.9


def test_scores_are_shares_right_or_of_the_variance_explained() -> None:
    outputs = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    assert runs.scores(outputs, torch.tensor([[0, 0, -1]])) == [0.5]
    assert runs.scores(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [-1.0]]])) == [0.0]
    assert runs.scores(torch.ones(1, 2, 1), torch.ones(1, 2, 1)) == [1.0]


def test_a_job_is_the_same_again_and_is_told_in_a_row() -> None:
    job = Job("relabelled", "tanh", "optimizer reset", 4e-3, 3, SEEDS)
    one, other = runs.run_job(job, digits()), runs.run_job(job, digits())
    assert one == other and len(one.accuracies) == 2 and len(one.kept_others[0]) == 2
    row = results.describe(one)
    assert row.kept == 100 and row.last == pytest.approx(50 * sum(sum(run[1:]) for run in one.accuracies) / 2)
    assert row.jump is None and row.arm in results.table([row])


def test_the_rate_is_the_best_of_the_last_tasks_or_of_an_earlier_one() -> None:
    outcome = Outcome(Job("relabelled", "tanh", "plain", 1e-3, 2, (0,)), ((0.9, 0.5),), ((1.0,),), ((1.0,),), 0)
    first = results.describe(outcome)
    tenth = replace(first, lr=2e-3, first=80.0, last=60.0, curve=(80.0, *[0.0] * 8, 99.0, 60.0))
    last = replace(first, lr=4e-3, first=70.0, last=70.0, curve=(70.0, *[0.0] * 8, 98.0, 70.0))
    unchanged = results.describe(replace(outcome, kept_own=((),), kept_others=((),)))
    assert unchanged.kept_own == unchanged.kept_least == 100
    key = ("relabelled", "tanh", "plain")
    assert results.best_of([first, tenth, last]) == {key: last}
    assert results.tuned_earlier([first, tenth, last]) == {key: (50.0, 60.0, 70.0)}


def test_records_are_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs symtele_cuda[experiments]")
    wanted = jobs_of(SUITES["whole"], 1, ["relabelled"], tasks=2)[:2]
    results.run(digits(), wanted, True, tmp_path, lambda _: None)
    assert len((tmp_path / "plasticity.jsonl").read_text().splitlines()) == 2
    assert {path.name for path in tmp_path.glob("*.png")} == {"plasticity.png", "plasticity-trade.png"}
    first = json.loads((tmp_path / "plasticity.json").read_text())
    monkeypatch.setattr(results, "run_job", None)  # nothing is left to run
    results.run(digits(), wanted, False, tmp_path, lambda _: None)
    assert json.loads((tmp_path / "plasticity.json").read_text()) == first


def test_a_record_without_the_newer_fields_is_known_again() -> None:
    job = {"protocol": "relabelled", "activation": "tanh", "arm": "plain", "lr": 1e-3, "tasks": 2, "seeds": [0]}
    shares = {"accuracies": [[0.9, 0.8]], "kept_own": [[1.0]], "kept_others": [[1.0]]}
    found = restore({"job": job, **shares, "refused": 0})
    assert found.job == Job("relabelled", "tanh", "plain", 1e-3, 2, (0,)) and found.jumps == ()


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_asks_every_arm_of_every_setting(suite: str) -> None:
    one, wanted = SUITES[suite], jobs_of(SUITES[suite], 2, tasks=3)
    settings = {(job.protocol, job.activation, job.arm) for job in wanted}
    assert len(settings) == len(one.protocols) * len(one.activations) * len(one.arms)
    assert len(set(wanted)) == len(wanted) >= 3 * len(settings)
    assert max(job.tasks for job in wanted) == 3 and {job.optimizer for job in wanted} == {one.optimizer}


# --- control ----------------------------------------------------------------------------------------------------------


def test_the_carts_are_those_of_gymnasium() -> None:
    gymnasium = pytest.importorskip("gymnasium", reason="compares with gymnasium: pip install gymnasium")
    carts = control.CartPoles([torch.Generator().manual_seed(3)])
    environment = gymnasium.make("CartPole-v1").unwrapped
    environment.reset()
    environment.state = carts.state[0, 0].numpy()
    for step in range(200):
        action = step // 3 % 2
        expected, _, failed, _, _ = environment.step(action)
        assert bool(carts.step(torch.tensor([[action]]))) == failed
        torch.testing.assert_close(carts.state[0, 0].float(), torch.from_numpy(expected))
        if failed:
            return
    raise AssertionError("the pole must fall")


def test_a_cart_pushed_to_the_right_drives_there_while_its_pole_falls_to_the_left() -> None:
    carts = control.CartPoles([torch.Generator().manual_seed(seed) for seed in SEEDS], count=3)
    steps = 0
    while not carts.step(torch.ones(2, 3, dtype=torch.long)).all():
        steps += 1
    assert 5 < steps < 15 and (carts.state[..., 1] > 0).all() and (carts.state[..., 2] < 0).all()
    assert (carts.ages == steps + 1).all()
    carts.start_again(torch.tensor([[True, False, False]] * 2))
    assert (carts.ages[:, 0] == 0).all() and (carts.state[:, 0].abs() <= 0.05).all()
    assert (carts.ages[:, 1:] > 0).all()


@pytest.mark.parametrize("arm", [arms.PLAIN, arms.FRESH, arms.INJECTED])
def test_agents_learn_and_act(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.PROTOCOLS, "CartPole", tasks.Control(2, steps=60, every=1, rates=(1e-3,)))
    outcome = runs.run_job(Job("CartPole", "ReLU", arm, 1e-3, 2, SEEDS), digits())
    assert len(outcome.jumps) == 2 and len(outcome.jumps[0]) == len(outcome.kept_own[0]) == 1
    assert all(0 < one <= 1 for run in outcome.accuracies for one in run)
    kept = [share for run in outcome.kept_others for share in run]
    assert max(kept) < 0.9 if arm == arms.FRESH else min(kept) > 0.99
    assert results.describe(outcome).jump == pytest.approx(50 * sum(run[0] for run in outcome.jumps))


def test_values_behind_a_failure_count_for_nothing() -> None:
    agents = control.Agents(Job("CartPole", "ReLU", arms.PLAIN, 1e-3, 1, SEEDS), 10)
    agents.failed[:, 1] = 1.0
    targets = agents.targets(torch.tensor([[0, 1]] * 2))
    values = agents.learners.outputs(torch.zeros(2, 1, 4)).amax(-1).squeeze(1)
    torch.testing.assert_close(targets[:, 0], 0.01 + 0.99 * values)
    torch.testing.assert_close(targets[:, 1], torch.full((2,), 0.01))
