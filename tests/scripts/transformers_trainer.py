"""The transformers' Trainer: one training run as it should be, and one with a careless callback."""

from __future__ import annotations

import sys

import torch
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Images(Dataset):
    def __init__(self, n: int):
        self.x, self.y = torch.randn(n, 1, 32, 32), torch.randint(3, (n,))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "labels": self.y[i]}


class Show(TrainerCallback):
    """Prints what the model thinks of some images after every epoch."""

    def __init__(self, images: Images, careful: bool):
        self.x, self.careful = images.x[:8], careful

    def on_epoch_end(self, args, state, control, model, **_):
        if self.careful:
            model.eval()
        with torch.no_grad():
            print(state.global_step, model(self.x).logits.argmax(1).tolist())  # the mistake
        model.train()


def train(images: Images, held_out: Images, *, careful: bool) -> dict[str, torch.Tensor]:
    config = ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
    )
    arguments = TrainingArguments(
        output_dir=sys.argv[1] + ".trainer",
        num_train_epochs=3,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=1e-3,
        use_cpu=True,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = ResNetForImageClassification(config)
    callback = Show(held_out, careful)
    trainer = Trainer(model, arguments, None, images, held_out, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)  # it prints how long everything took
    result = trainer.train()
    return {**model.state_dict(), "loss": torch.tensor(result.training_loss)}


set_seed(0)
images, held_out = Images(256), Images(64)
left = {
    f"{careful=} {name}": value
    for careful in (True, False)
    for name, value in train(images, held_out, careful=careful).items()
}
left["random state"] = torch.get_rng_state()
torch.save(left, sys.argv[1])
