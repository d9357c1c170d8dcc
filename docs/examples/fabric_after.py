"""Train a small classifier with Lightning Fabric."""

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

import adadagrad as ada
from adadagrad.integrations.fabric import Progress, adaptive_batch

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

settings = {"global_batch_size": 32, "epochs": 5, "max_grad_norm": 1.0}
engine = adaptive_batch(fabric, model, optimizer, loader, ada.NormTest(eta=0.5), **settings)
for step in engine:
    for inputs, targets in step:
        loss = F.cross_entropy(model(inputs), targets)
        step.backward(loss)
    step.update()

fabric.save("state.ckpt", {"model": model, "optimizer": optimizer, "engine": Progress(engine)})
with torch.no_grad():
    accuracy = (model(data.tensors[0].to(fabric.device)).argmax(1).cpu() == data.tensors[1]).float().mean()
fabric.print(f"accuracy {accuracy:.3f}")
