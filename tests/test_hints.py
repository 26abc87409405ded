"""A model that is no chain is refused with the part to pass instead, and what to pass as its inputs."""

from __future__ import annotations

import pytest
import torch
from teleports import teleport_mlp
from torch import Tensor, nn

from symtele_cuda.model import hints
from symtele_cuda.model.reader import read_chain

WHOLE = r"{} is such a chain: pass it, with the same batch$"
PART = r"{} is such a chain: pass it, and as the batch's inputs what the model gives it$"


def chain(*widths: int) -> nn.Sequential:
    first, hidden, last = widths or (8, 6, 3)
    return nn.Sequential(nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, last))


class Backbone(nn.Module):
    """A convolution, and two heads of which the second is the larger."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten())
        self.small, self.head = chain(8, 4, 3), chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)) + self.small(self.features(x))


class Wrapping(nn.Module):
    """A wrapper that torch does not know, which may do anything around its model."""

    def __init__(self) -> None:
        super().__init__()
        self.module = chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(torch.fft.fft(x).real)


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), *chain())


REFUSED = {
    "compiled": (lambda: torch.compile(chain()), WHOLE.format(r"model\._orig_mod")),
    "DataParallel": (lambda: nn.DataParallel(chain()), WHOLE.format(r"model\.module")),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(chain()), WHOLE.format(r"model\.module")),
    "compiled and parallel": (
        lambda: torch.compile(nn.DataParallel(chain())),
        WHOLE.format(r"model\._orig_mod\.module"),
    ),
    "parallel, with a head": (lambda: nn.DataParallel(Backbone()), PART.format(r"model\.module\.head")),
    "another wrapper": (Wrapping, PART.format(r"model\.module")),
    "the tail of a Sequential": (convolutional, PART.format(r"model\[2:\]")),
    "the last of a Sequential": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.GELU(), chain()),
        PART.format(r"model\[3\]"),
    ),
    "the larger of two heads": (Backbone, PART.format(r"model\.head")),
    "deep inside": (
        lambda: nn.Sequential(nn.BatchNorm2d(1), nn.ModuleDict({"deep": Backbone()})),
        PART.format(r"model\[1\]\.deep\.head"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_part_to_pass_is_named(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        read_chain(make())


@pytest.mark.parametrize("model", [nn.Conv2d(1, 2, 3), nn.DataParallel(nn.Linear(3, 2)), nn.Sequential()], ids=str)
def test_where_no_part_is_a_chain_none_is_named(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"model must ((?!such a chain).)*$"):
        read_chain(model)


def test_the_hint_is_one_to_follow() -> None:
    model = convolutional()
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    with torch.no_grad():
        features, outputs = model[:2](x), model(x)
    report = teleport_mlp(model[2:], (features, y), steps=2)
    assert report.accepted
    torch.testing.assert_close(model(x), outputs, rtol=1e-3, atol=1e-4)


def test_a_model_of_many_parts_is_not_tried_without_end() -> None:
    tried: list[nn.Module] = []

    def is_chain(module: nn.Module) -> bool:
        tried.append(module)
        return False

    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(200)))
    assert hints.hint(model, is_chain) == ""
    assert len(tried) == hints.MOST_TRIED
