"""Train a small classifier with Lightning Fabric."""

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
torch.manual_seed(0)
inputs = torch.randn(2000, 20)
data = TensorDataset(inputs, inputs[:, :3].argmax(1))
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
loader = DataLoader(data, batch_size=32, shuffle=True)
model, optimizer = fabric.setup(model, optimizer)
loader = fabric.setup_dataloaders(loader)

for _ in range(5):
    for inputs, targets in loader:
        loss = F.cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

fabric.save("state.ckpt", {"model": model, "optimizer": optimizer})
with torch.no_grad():
    accuracy = (model(data.tensors[0].to(fabric.device)).argmax(1).cpu() == data.tensors[1]).float().mean()
fabric.print(f"accuracy {accuracy:.3f}")
