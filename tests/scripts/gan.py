"""A generator and a discriminator in mixed precision, sampled from as tutorials do."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn

from batchnorm import BatchNorm2d


class Generator(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.ConvTranspose2d(8, 8, 4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False),
            BatchNorm2d(8, act="relu"),
            nn.Conv2d(8, 1, 3, padding=1),
        )


class Discriminator(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(8 * 4 * 4, 1),
        )


torch.manual_seed(0)
generator, discriminator = Generator(), Discriminator()
adams = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (discriminator, generator)]
scaler = torch.amp.GradScaler("cpu")
left, losses = {}, []
fixed = torch.randn(8, 8, 1, 1)


def step(adam: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    adam.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(adam)
    losses.append(loss.detach().float())


def loss_of(z: torch.Tensor, real: bool) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(z, torch.full_like(z, float(real)))


for i in range(60):
    real, noise = torch.randn(16, 1, 8, 8), torch.randn(16, 8, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        fake = generator(noise)
        d_loss = loss_of(discriminator(real), True) + loss_of(discriminator(fake.detach()), False)
    step(adams[0], d_loss)
    with torch.autocast("cpu", torch.bfloat16):
        g_loss = loss_of(discriminator(fake), True)
    step(adams[1], g_loss)
    scaler.update()
    if i % 20 == 19:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            left[f"samples {i}"] = generator(fixed)  # the mistake
left["losses"] = torch.stack(losses)
for model in (generator, discriminator):
    left |= {f"{type(model)} {key}": value for key, value in model.state_dict().items()}
left["scale"] = torch.tensor(scaler.get_scale())
left["random state"] = torch.get_rng_state()
torch.save(left, sys.argv[1])
