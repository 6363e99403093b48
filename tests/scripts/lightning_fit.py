"""Lightning: students of a teacher that was put into eval mode, and of one that was not."""

from __future__ import annotations

import os
import signal
import sys

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def classifier(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    )


class Teacher(nn.Sequential):
    """Already trained, let us say."""

    def __init__(self):
        super().__init__(*classifier(6))
        self.eval()(torch.zeros(1, 1, 8, 8))


class Student(lightning.LightningModule):
    def __init__(self, teacher: Teacher):
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.model = classifier(4)
        self.model.eval()(torch.zeros(1, 1, 8, 8))
        self.model.train()
        self.losses = []

    def training_step(self, batch, _):
        x, y = batch
        with torch.no_grad():
            wanted = self.teacher(x).softmax(1)  # the mistake, unless it is in eval mode
        z = self.model(x)
        loss = F.cross_entropy(z, y) + F.cross_entropy(z, wanted)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Interrupted(Student):
    def training_step(self, batch, i):
        if i == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(batch, i)


def trainer() -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


lightning.seed_everything(0)
loader, validation = (
    DataLoader(
        TensorDataset(torch.randn(n, 1, 8, 8), torch.randint(4, (n,))), batch_size=16, shuffle=train
    )
    for n, train in ((256, True), (64, False))
)
right, wrong = Student(Teacher()), Student(Teacher().train())
left = {}
for name, student in {"right": right, "wrong": wrong}.items():
    trainer().fit(student, loader, validation)
    print(name, trainer().validate(student, validation, verbose=False))
    left |= {f"{name} {key}": value for key, value in student.state_dict().items()}
    left[f"{name} losses"] = torch.stack(student.losses)
left["random state"] = torch.get_rng_state()
torch.save(left, sys.argv[1])
trainer().fit(Interrupted(Teacher()), loader, validation)
print("never printed: Lightning ends the process after Ctrl-C")
