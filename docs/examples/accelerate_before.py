"""Train a small classifier with Accelerate."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator()
torch.manual_seed(0)
inputs = torch.randn(2000, 20)
data = TensorDataset(inputs, inputs[:, :3].argmax(1))
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
loader = DataLoader(data, batch_size=32, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for _ in range(5):
    for inputs, targets in loader:
        loss = F.cross_entropy(model(inputs), targets)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

accelerator.save_state("state")
with torch.no_grad():
    accuracy = (model(data.tensors[0].to(accelerator.device)).argmax(1).cpu() == data.tensors[1]).float().mean()
accelerator.print(f"accuracy {accuracy:.3f}")
