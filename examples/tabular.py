"""Tabular data: which columns of a medical table are useful, and which stay so under attack.

    python examples/tabular.py [--epochs 30] [--budget 45] [--report report.html]

scikit-learn's breast cancer data: 569 patients, 30 measurements, two classes. Every column is
scaled to [0, 1] by the training rows, so that a linf radius of 0.05 is 5% of each column's range.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import analysis

parser = argparse.ArgumentParser(description="Robustness of a classifier of tabular data")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--budget", type=float, default=45.0, help="seconds for the report")
parser.add_argument("--report", help="write the report of the robust model to this HTML file")
options = parser.parse_args()
EPS = 0.05

table = load_breast_cancer()
order = torch.randperm(len(table.data), generator=torch.Generator().manual_seed(0))
inputs = torch.tensor(table.data, dtype=torch.float32)[order]
labels = torch.tensor(table.target)[order]
low, high = inputs[:400].amin(0), inputs[:400].amax(0)
inputs = ((inputs - low) / (high - low)).clamp(0, 1)
train = TensorDataset(inputs[:400], labels[:400])
test = TensorDataset(inputs[400:], labels[400:])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))


standard, robust = network(), network()
af.fit(standard, train, epochs=options.epochs, batch_size=32, lr=0.05, seed=0)
af.adversarial_fit(
    robust, train, eps=EPS, norm="linf", epochs=options.epochs, batch_size=32, lr=0.05, seed=0
)
for name, model in {"standard": standard, "robust": robust}.items():
    result = af.robust_accuracy(model, test, eps=EPS, norm="linf", seed=0)
    print(f"{name:9} accuracy {result.standard:.3f}  robust accuracy in linf {EPS} {result:.3f}")

# Each column with a radius of its own, a quarter of its standard deviation; those of the second ten
# columns (standard errors) are taken as known exactly.
radii = inputs[:400].std(0) / 4
known = torch.arange(30) // 10 == 1
for name, model in {"standard": standard, "robust": robust}.items():
    result = af.robust_accuracy(model, test, eps=radii, norm="linf", mask=~known, seed=0)
    print(f"{name:9} robust accuracy with a radius for each column {result:.3f}")
report = af.report(
    robust, test, eps=radii, norm="linf", mask=~known, budget=options.budget,
    class_names=table.target_names.tolist(),
)  # fmt: skip
print(f"\nthe robust model\n{report.verdict}")
if options.report:
    report.save(options.report)

# Each column as a feature of its own: E[y f(x)], and the same under the worst change of size EPS.
useful = analysis.linear_usefulness(torch.eye(30), train, eps=EPS, norm="linf", seed=0)
print("\nthe most useful columns: rho, and gamma under attack")
for column in useful.rho[:, 1].argsort(descending=True)[:5].tolist():
    rho, gamma = float(useful.rho[column, 1]), float(useful.gamma[column, 1])
    print(f"  {table.feature_names[column]:24} {rho:6.3f} {gamma:6.3f}")
