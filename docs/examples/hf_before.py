"""Train a small GPT-2 from scratch on the letters of Python's own help texts."""

from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

text = torch.tensor(list("\n".join(topics.values()).encode()))
blocks = [{"input_ids": block, "labels": block} for block in text.split(64)[:-1]]
train, test = blocks[:-200], blocks[-200:]
torch.manual_seed(0)
config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
args = TrainingArguments(
    output_dir="gpt2",
    per_device_train_batch_size=16,
    max_steps=120,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=20,
    logging_steps=10,
    dataloader_pin_memory=False,
    report_to="none",
)
trainer = Trainer(model, args, train_dataset=train, eval_dataset=test)
trainer.train()
trainer.save_model()
print(f"loss {trainer.evaluate()['eval_loss']:.2f} after {trainer.state.global_step} steps")
