"""Train a small GPT-2 on the characters of Python's own argparse module, with Lightning."""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel


class CharacterModel(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=2))

    def training_step(self, batch, batch_idx):
        (characters,) = batch
        loss = self.model(input_ids=characters, labels=characters).loss
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


pl.seed_everything(0)
text = Path(argparse.__file__).read_bytes()
characters = torch.tensor([byte % 128 for byte in text[: len(text) // 32 * 32]]).view(-1, 32)
loader = DataLoader(TensorDataset(characters[:1000]), batch_size=8, shuffle=True)
trainer = pl.Trainer(max_epochs=2, accelerator="cpu", gradient_clip_val=1.0)
trainer.fit(CharacterModel(), loader)
print(f"loss {float(trainer.callback_metrics['loss']):.2f} after {trainer.global_step} steps")
