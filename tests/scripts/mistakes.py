"""Train on handwritten digits, with one of the mistakes that people make with batch norm."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("mistake")
mistake = parser.parse_args().mistake


class Network(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8, momentum=momentum),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, bias=False),
            nn.BatchNorm2d(16, momentum=momentum),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        if mistake == "checkpoint" and self.training:
            x = checkpoint(self.backbone, x, use_reentrant=False)
        else:
            x = self.backbone(x)
        return self.head(x.flatten(1))


torch.manual_seed(0)
torch.set_num_threads(1)
digits, labels = load_digits(return_X_y=True)
images = torch.tensor(digits, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
if mistake in ("stale", "averaged"):
    images = images + 3  # nobody took the mean out, and the statistics are slow to learn it
data = TensorDataset(images, torch.tensor(labels))
micro_batches = 4 if mistake == "accumulate" else 1
size = 2 if mistake == "small" else 32
loader = DataLoader(data, batch_size=size, shuffle=True, drop_last=True)

model = Network(momentum=0.001 if mistake == "stale" else 0.1)
if mistake == "half frozen":
    model.backbone[:3].requires_grad_(False)
    model.backbone[4].bias.requires_grad_(False)  # whose γ learns
# the model is made
learning = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(learning, lr=0.01 if mistake == "small" else 0.1)
averaged_model = None
if mistake == "averaged":
    averaged_model = AveragedModel(model)  # the average of all weights of the run

for _ in range(2):
    model.train()
    for step, (x, y) in enumerate(loader, start=1):
        if step > 200:
            break
        (F.cross_entropy(model(x), y) / micro_batches).backward()
        if step % micro_batches == 0:
            optimizer.step()
            optimizer.zero_grad()
            if averaged_model is not None:
                averaged_model.update_parameters(model)
    if mistake == "no eval":
        with torch.no_grad():
            for x, _ in loader:
                model(x)

# training has ended
evaluated = averaged_model or model
evaluated.eval()
with torch.no_grad():
    correct = sum(int((evaluated(x).argmax(1) == y).sum()) for x, y in loader)
print(f"accuracy {correct / len(data):.0%}")
