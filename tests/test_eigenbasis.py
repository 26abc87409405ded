"""`EigenbasisTeleporter`: what a rotation keeps, what it makes of the optimizer's state, and the loops it lives in."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import snapshot, unchanged
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import symtele_cuda as st
from experiments.gpt.model import GPT, sites_of
from symtele_cuda.sites import resolve
from symtele_cuda.sites.exactness import change_of

WIDTH, CONTEXT = 16, 6
OTHERS = torch.randint(128, (3, CONTEXT), generator=torch.Generator().manual_seed(9))
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda parameters, **more: torch.optim.Adam(parameters, 1e-2, **more),
    "AdamW": lambda parameters, **more: torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1, **more),
    "amsgrad": lambda parameters, **more: torch.optim.AdamW(parameters, 1e-2, amsgrad=True, **more),
    "RMSprop": lambda parameters, **more: torch.optim.RMSprop(parameters, 1e-3, momentum=0.9, centered=True, **more),
    "Adagrad": lambda parameters, **more: torch.optim.Adagrad(parameters, 1e-2, **more),
}


def make_gpt(dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(0)
    return GPT(WIDTH, 2, 2, CONTEXT).to(dtype)


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(128, (4, CONTEXT), generator=generator),) * 2 for _ in range(count)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def train(model: nn.Module, optimizer: Any, count: int, seed: int = 0) -> None:
    for batch in batches(count, seed):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


@torch.no_grad()
def logits(model: nn.Module) -> list[Tensor]:
    return [model(OTHERS).clone()]


def aligned(model: nn.Module, optimizer: Any, **options: Any) -> st.EigenbasisTeleporter:
    sites = options.pop("sites", None) or sites_of(getattr(model, "_orig_mod", model))
    return st.EigenbasisTeleporter(model, optimizer, sites=sites, **options)


# --- one rotation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rotation_keeps_the_outputs_on_other_inputs(name, more):
    if name == "RMSprop" and "fused" in more:
        pytest.skip("torch has no fused RMSprop")
    plain, rotated = make_gpt(), make_gpt()
    optimizers = [OPTIMIZERS[name](model.parameters(), **more) for model in (plain, rotated)]
    aligner = aligned(rotated, optimizers[1], every=4)
    for model, optimizer in zip((plain, rotated), optimizers, strict=True):
        train(model, optimizer, 4)
    assert aligner.rotations == 1 and aligner.seconds > 0
    assert change_of([plain.head.weight], [rotated.head.weight]) > 0.1
    assert change_of(logits(plain), logits(rotated)) <= 1e-12


def test_it_stays_exact_over_many_rotations_in_float32():
    model = make_gpt(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, weight_decay=0.0)  # so that nothing else moves
    aligned(model, optimizer, every=1, until=100)
    before, weights = logits(model), snapshot(model)
    train(model, optimizer, 100)
    assert not unchanged(model, weights)
    assert change_of(before, logits(model)) <= 1e-5


def rotation_of(old: Tensor, new: Tensor) -> Tensor:
    """Q of new = old Qᵀ."""
    return torch.linalg.lstsq(old, new).solution.T


def test_first_moments_turn_with_the_weights_and_second_ones_are_made_of_their_margins():
    plain, rotated = make_gpt(), make_gpt()
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0) for model in (plain, rotated)]
    aligned(rotated, optimizers[1], sites=sites_of(plain)[:1], every=3)
    covariance = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for batch in batches(3):
        for model, optimizer in zip((plain, rotated), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        gradient = plain.head.weight.grad
        covariance = 0.95 * covariance + 0.05 * gradient.T @ gradient
    q = rotation_of(plain.head.weight.detach(), rotated.head.weight.detach())
    torch.testing.assert_close(q @ q.T, torch.eye(WIDTH, dtype=q.dtype), rtol=0, atol=1e-9)
    old, new = optimizers[0].state[plain.head.weight], optimizers[1].state[rotated.head.weight]
    torch.testing.assert_close(new["exp_avg"], old["exp_avg"] @ q.T, rtol=1e-8, atol=1e-14)
    shares = (q @ covariance @ q.T).diagonal() / covariance.trace()
    expected = old["exp_avg_sq"].sum(1, keepdim=True) * shares
    torch.testing.assert_close(new["exp_avg_sq"], expected, rtol=1e-4, atol=1e-16)  # covariances are float32
    down = [model.blocks[0].down.weight.detach() for model in (plain, rotated)]
    torch.testing.assert_close(down[1], q @ down[0], rtol=1e-9, atol=1e-12)


def test_the_basis_is_that_of_the_gradients_covariance_over_all_matrices():
    model = make_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, weight_decay=0.0)
    (site,) = resolve(model, sites_of(model)[:1])
    aligned(model, optimizer, sites=[site], every=1, until=1)
    train(model, optimizer, 1)
    batch = batches(1)[0]
    model.zero_grad()
    loss_of(model, batch).backward()
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for axis in site.axes:
        gradient = model.get_parameter(axis.name).grad
        columns = axis.columns(gradient, 1, WIDTH)[0]
        total += gradient.numel() * columns @ columns.T / gradient.square().sum()
    off = total - total.diagonal().diag()
    assert off.norm() <= 1e-5 * total.norm()  # covariances are float32
    assert bool((total.diagonal().diff() <= 1e-5 * total.norm()).all())


@pytest.mark.parametrize("case", ["GPT-2", "Llama", "Llama, one key head", "ViT", "BERT", "LoRA", "encoder", "gated"])
def test_models_of_others_rotate_by_themselves(case):
    from test_sites import CASES, batch_of, own_norms, outputs, sites_of as sites_in  # noqa: I001
    from test_sites import make as make_model

    found = CASES[case]
    plain = make_model(found)
    rotated = copy.deepcopy(plain)
    batch, loss_fn = batch_of(found, plain)
    for model in (plain, rotated):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        if model is rotated:
            sites = sites_in(model, found) if found.declared else "auto"
            aligner = st.EigenbasisTeleporter(model, optimizer, sites=sites, every=2)
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn(model(batch[0]), batch[1]).backward()
            optimizer.step()
    assert aligner.rotations == 1
    assert change_of(outputs(plain, found.x), outputs(rotated, found.x)) <= max(own_norms(case), 1e-11)


# --- loops ------------------------------------------------------------------------------------------------------------


def run(steps: int, *, stop: int | None = None, until: int = 8) -> tuple[GPT, st.EigenbasisTeleporter]:
    """A run, interrupted after `stop` steps and resumed in new objects."""
    model = make_gpt(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    aligner = aligned(model, optimizer, every=2, until=until)
    for step, batch in enumerate(batches(steps)):
        if step == stop:
            states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, aligner)]
            aligner.close()
            model = make_gpt(torch.float32)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            aligner = aligned(model, optimizer, every=2, until=until)
            for part, state in zip((model, optimizer, aligner), states, strict=True):
                part.load_state_dict(state)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return model, aligner


@pytest.mark.parametrize("stop", [1, 2, 5, 8, 9])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stop):
    (whole, one), (resumed, other) = run(10), run(10, stop=stop)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert one.rotations == other.rotations == 4


def test_after_the_last_rotation_nothing_is_left():
    model, aligner = run(8)
    assert aligner.rotations == 4 and not model._forward_pre_hooks
    assert aligner.state_dict()["covariances"] == [] and "done" in repr(aligner)
    model = make_gpt(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    aligned(model, optimizer, every=2, until=3)
    train(model, optimizer, 3)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_accumulated_and_clipped_gradients_under_a_schedule():
    model = make_gpt(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    aligner = aligned(model, optimizer, every=2, until=4)
    for step in range(4):
        for batch in batches(2, seed=step):
            loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert aligner.rotations == 2


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_do_not_count(fused):
    model = make_gpt(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    aligner = aligned(model, optimizer, every=2, until=2)
    for step, batch in enumerate(batches(3)):
        optimizer.zero_grad()
        loss = loss_of(model, batch) * (math.inf if step == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert aligner.rotations == int(step == 2)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_several_optimizers_rotate_after_the_last_of_them():
    model, plain = make_gpt(), make_gpt()
    made = []
    for one in (model, plain):
        matrices = [p for name, p in one.named_parameters() if "blocks" in name]
        rest = [p for name, p in one.named_parameters() if "blocks" not in name]
        made.append([torch.optim.AdamW(matrices, 1e-2), torch.optim.Adagrad(rest, 1e-2)])
    aligner = aligned(model, made[0], every=2, until=4)
    for one, optimizers in zip((model, plain), made, strict=True):
        for batch in batches(2):
            one.zero_grad()
            loss_of(one, batch).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert aligner.rotations == 1
    assert change_of(logits(plain), logits(model)) <= 1e-12


def test_an_average_rotates_along():
    model = make_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, 2)
    average.update_parameters(model)
    before, weights = logits(average.module), snapshot(average.module)
    aligned(model, optimizer, every=1, until=1, averages=[average.module])
    train(model, optimizer, 1)
    assert not unchanged(average.module, weights)
    assert change_of(before, logits(average.module)) <= 1e-12
    with pytest.raises(ValueError, match="averages must be modules with the model's parameters by name"):
        aligned(model, optimizer, averages=[average])


def test_a_compiled_model_is_not_compiled_again():
    model = make_gpt(torch.float32)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    aligner = aligned(compiled, optimizer, every=2, until=6)
    train(compiled, optimizer, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(compiled, optimizer, 5, seed=1)
    assert aligner.rotations == 3


# --- refusals ---------------------------------------------------------------------------------------------------------


class OwnStep(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **options)


class Shard(torch.Tensor):
    """As FSDP's parameters are: a parameter of another class."""


def sharded(model: nn.Module) -> torch.optim.Optimizer:
    model.head.weight = nn.Parameter(model.head.weight.detach().as_subclass(Shard))
    return torch.optim.AdamW(model.parameters())


REFUSALS: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any], type[Exception], str]] = {
    "optimizer": (lambda m: torch.optim.SGD(m.parameters(), 0.1), {}, TypeError, "one of Adam, .*, got SGD"),
    "own step": (lambda m: OwnStep(m.parameters()), {}, TypeError, "one of Adam, .*, got OwnStep"),
    "held": (lambda m: torch.optim.AdamW([m.head.weight]), {}, ValueError, "hold all trainable parameters"),
    "every": (adamw, {"every": 0}, ValueError, "every must be"),
    "until": (adamw, {"until": 1.5}, TypeError, "until must be"),
    "scales": (adamw, {"sites": [st.Scales("blocks.*.up", "blocks.*.down", 2)]}, st.TeleportError, "can be rotated"),
    "no sites": (adamw, {"sites": "auto"}, st.TeleportError, "sites: expected"),
    "shards": (sharded, {}, TypeError, "plain parameters, not of shards or subclasses, got Shard 'head.weight'"),
    "heads": (adamw, {"sites": [st.LinearPair("blocks.*.v", "blocks.*.o", 5)]}, ValueError, "heads must divide"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_arguments_are_named_and_no_hook_is_left(name):
    make, options, error, text = REFUSALS[name]
    model = make_gpt()
    if name == "no sites":
        model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3))
        optimizer = make(model)
        with pytest.raises(error, match=text):
            st.EigenbasisTeleporter(model, optimizer)
        return
    optimizer = make(model)
    with pytest.raises(error, match=text):
        aligned(model, optimizer, **options)
    assert not model._forward_pre_hooks and not optimizer._optimizer_step_pre_hooks


def test_one_of_several_ranks_refuses() -> None:
    model = make_gpt()
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match=r"EigenbasisTeleporter must run in a single process, got .* of 2 ranks"):
            aligned(model, torch.optim.AdamW(model.parameters()))
    finally:
        torch.distributed.destroy_process_group()


def test_a_rotation_that_changes_the_outputs_is_undone_and_said():
    model = make_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    wrong = st.Stream(readers=["blocks.*.q", "head"], writers=["embedding"])
    aligner = aligned(model, optimizer, sites=[wrong], every=2)
    train(model, optimizer, 1)
    twin = make_gpt()
    twin_optimizer = torch.optim.AdamW(twin.parameters(), 1e-2)
    train(twin, twin_optimizer, 1)
    for one, its in ((model, optimizer), (twin, twin_optimizer)):
        its.zero_grad()
        loss_of(one, batches(1, seed=3)[0]).backward()
    twin_optimizer.step()
    with pytest.raises(st.TeleportError, match="expected rotations that keep what the model computes"):
        optimizer.step()
    assert aligner.rotations == 0
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        state, wanted = optimizer.state[mine], twin_optimizer.state[its]
        assert all(torch.equal(state[kind], wanted[kind]) for kind in wanted)


def test_a_closure_and_gradients_that_are_not_finite_are_refused():
    model = make_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), 0.0)
    aligned(model, optimizer, every=2)
    with pytest.raises(TypeError, match="stepped without a closure"):
        optimizer.step(lambda: loss_of(model, batches(1)[0]))
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    model.head.weight.grad[0, 0] = math.nan
    with pytest.raises(st.TeleportError, match="gradients must be finite for a rotation"):
        optimizer.step()


def test_a_model_that_was_not_called_is_rotated_with_a_warning():
    model = make_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    aligner = aligned(model, optimizer, every=1)
    with pytest.warns(UserWarning, match="that it is exact goes unmeasured"):
        optimizer.step()
    assert aligner.rotations == 1


@pytest.mark.parametrize("change", [{"steps": [1, 2]}, {"steps": [-1]}, {"rotations": "one"}, {"covariances": []}])
def test_a_foreign_state_is_refused_and_nothing_changes(change):
    model = make_gpt()
    aligner = aligned(model, torch.optim.AdamW(model.parameters()))
    before = str(aligner.state_dict())
    with pytest.raises((TypeError, ValueError), match="state"):
        aligner.load_state_dict(aligner.state_dict() | change)
    with pytest.raises(ValueError, match="state must have the entries"):
        aligner.load_state_dict({})
    assert str(aligner.state_dict()) == before
