"""A convolutional network: scales between its layers, searched for a larger gradient; every image keeps its outputs.

    pip install . && python examples/convolutions.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import symtele_cuda as st


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.conv3 = nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3)
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(2), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.pool(F.relu(self.conv3(F.relu(self.conv2(x)))))
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def run() -> tuple[st.TeleportReport, float]:
    """The report of the teleport, and by how much the outputs of other images have changed."""
    torch.manual_seed(0)
    model = Network().eval()
    print(st.find_sites(model))
    x, y, others = torch.randn(64, 3, 16, 16), torch.randint(10, (64,)), torch.randn(64, 3, 16, 16)
    before = model(others).detach()
    report = st.teleport(model, (x, y), method=st.Ascent("grad_norm", max_growth=2.0))
    return report, float((model(others).detach() - before).norm() / before.norm())


if __name__ == "__main__":
    report, change = run()
    print(report)
    print(f"the outputs of other images changed by {change:.1e} of their norm")
