"""Train a small classifier with Accelerate."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import adadagrad as ada

accelerator = Accelerator()
torch.manual_seed(0)
inputs = torch.randn(2000, 20)
data = TensorDataset(inputs, inputs[:, :3].argmax(1))
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
loader = DataLoader(data, batch_size=32, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

settings = {"global_batch_size": 32, "epochs": 5, "max_grad_norm": 1.0, "accelerator": accelerator}
for step in ada.AdaptiveBatch(model, optimizer, loader, ada.NormTest(eta=0.5), **settings):
    for inputs, targets in step:
        loss = F.cross_entropy(model(inputs), targets)
        step.backward(loss)
    step.update()

accelerator.save_state("state")
with torch.no_grad():
    accuracy = (model(data.tensors[0].to(accelerator.device)).argmax(1).cpu() == data.tensors[1]).float().mean()
accelerator.print(f"accuracy {accuracy:.3f}")
