"""The loss on the batch: the default, its targets, value and gradient, and what a loss function may not do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from symtele_cuda.activations import Identity, Sigmoid
from symtele_cuda.model.loss import BatchLoss, check_default_targets, default_loss, examine

LOGITS = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])
VALUES = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_default_is_cross_entropy_for_classes_and_mean_squared_error_for_values():
    assert torch.equal(default_loss(CLASSES)(LOGITS, CLASSES), F.cross_entropy(LOGITS, CLASSES))
    assert torch.equal(default_loss(VALUES)(LOGITS, VALUES), F.mse_loss(LOGITS, VALUES))


def test_value_and_gradient_go_through_the_trailing_activation():
    loss = BatchLoss(F.mse_loss, VALUES, Sigmoid())
    value, gradient = loss.value_and_gradient(LOGITS)
    squashed = torch.sigmoid(LOGITS)
    assert value == pytest.approx(F.mse_loss(squashed, VALUES).item(), rel=1e-14) == loss.value(LOGITS)
    expected = 2 / 18 * (squashed - VALUES) * squashed * (1 - squashed)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-15)


def test_weight_terms_are_found():
    weight = torch.ones(2, requires_grad=True)
    plain = examine(BatchLoss(F.cross_entropy, CLASSES, Identity()), LOGITS, [weight])
    weighted = examine(
        BatchLoss(lambda z, y: F.cross_entropy(z, y) + weight.square().sum(), CLASSES, Identity()), LOGITS, [weight]
    )
    assert not plain.weight_terms and weighted.weight_terms
    assert weighted.value == pytest.approx(plain.value + 2.0, rel=1e-14)
    assert torch.equal(plain.gradient, weighted.gradient)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda z, y: z, r"scalar tensor \(0 dimensions\), got a tensor of shape \(6, 3\)"),
        (lambda z, y: 1.0, "scalar tensor .* got float"),
        (lambda z, y: torch.tensor(1.0), "depend on the model's output"),
        (lambda z, y: torch.ones((), requires_grad=True) * 2, "depend on the model's output"),
        (lambda z, y: z.sum() / 0, "finite on the batch, got"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        examine(BatchLoss(loss_fn, CLASSES, Identity()), LOGITS, [])


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (CLASSES[:5], ValueError, r"shape \(6,\), one class index a sample, got \(5,\)"),
        (CLASSES + 1, ValueError, r"0\.\.2, got values from 1 to 3"),
        (CLASSES - 1, ValueError, r"0\.\.2, got values from -1 to 1"),
        (CLASSES.int(), TypeError, "int64 class indices or floating point values, got torch.int32"),
        (CLASSES.bool(), TypeError, "got torch.bool"),
        (VALUES[:, :2], ValueError, r"shape of the outputs \(6, 3\), got \(6, 2\)"),
        (VALUES / 0, ValueError, "finite, got NaN or Inf"),
    ],
)
def test_targets_that_do_not_fit_the_default_loss_are_refused(targets, error, message):
    with pytest.raises(error, match=message):
        check_default_targets(targets, (6, 3))
