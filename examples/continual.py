"""A network that learns one task after another, and regains the ability to learn at each change of the task.

    pip install ".[demo]" && python examples/continual.py

The tasks are scikit-learn's digits, with new names for the ten classes in each. Left alone the network learns worse and
worse. `Teleporter.refresh` standardises its activations at each change: then it learns as it did at first, and nearly
all of its predictions are still what they were before the call. It takes some seconds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import symtele_cuda as st

SAMPLES, TASKS, EPOCHS, RATE = 600, 20, 4, 4e-3


def run(refreshed: bool, tasks: int = TASKS) -> list[float]:
    """The accuracy on other digits at the end of each task."""
    torch.manual_seed(0)
    pixels, digits = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(digits))
    x, digit = (pixels[order].float() - 4.9) / 6.0, digits[order].long()
    own, others = slice(SAMPLES), slice(SAMPLES, None)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    method = st.Standardise(refit="all")
    teleporter = st.Teleporter(model, optimizer, method=method, guards=st.Guards(), optimizer_state="reset")
    accuracies = []
    for task in range(tasks):
        y = torch.randperm(10)[digit]
        if refreshed and task > 0:
            report = teleporter.refresh((x[own], y[own]))
            print(f"  task {task + 1}: {report.reason}, {100 * (report.kept or 1):.1f} % of the predictions kept")
        for _ in range(EPOCHS):
            for indices in torch.randperm(SAMPLES).split(20):
                optimizer.zero_grad()
                F.cross_entropy(model(x[indices]), y[indices]).backward()
                optimizer.step()
        with torch.no_grad():
            accuracies.append((model(x[others]).argmax(1) == y[others]).float().mean().item())
    print(st.plasticity(model, x[own]))
    return accuracies


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, refreshed in (("left alone", False), ("refreshed at each change", True)):
        print(name)
        print("  " + " ".join(f"{accuracy:.2f}" for accuracy in run(refreshed)))
