"""What every rank of the tests in test_ranks.py runs, under torchrun: trains as it is told and writes what it saw."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from tests.integrations.lightning.cases import Net, callback, fit, keep_all, newest

warnings.simplefilter("ignore")


class Sharded(Net):
    def configure_model(self):
        fully_shard(self.net[0])
        fully_shard(self.net)


class Apart(pl.Callback):
    """Notes how far the ranks' weights are apart after every micro-batch."""

    def __init__(self):
        self.distances = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        own = torch.cat([p.detach().flatten() for p in module.parameters()])
        there = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(there, own)
        self.distances.append(max(float((other - own).abs().max()) for other in there))


def main(folder, kind, first):
    sharded = kind == "fsdp"
    strategy = (
        ModelParallelStrategy(process_group_backend="gloo") if sharded else DDPStrategy(process_group_backend="gloo")
    )
    module = (Sharded if sharded else Net)(0.0)
    apart = Apart()
    saves = keep_all(f"{folder}/{first}", every_n_train_steps=3)
    ckpt = None if first == "whole" else newest(f"{folder}/whole")[0]
    module, trace, *_ = fit(
        module,
        callback(global_batch_size=None),
        more=[saves] if sharded else [apart, saves],
        strategy=strategy,
        devices=2,
        enable_checkpointing=True,
        ckpt_path=ckpt,
        use_distributed_sampler=True,
        max_epochs=4,
    )
    weights = [p.full_tensor() if sharded else p.detach() for p in module.parameters()]
    seen = torch.cat(module.seen).tolist()
    found = {
        "sizes": trace.sizes,
        "steps": [d.step for d in trace.decisions],
        "weights": [w.flatten().tolist() for w in weights],
        "apart": apart.distances,
        "seen": seen,
        "batches": len(module.seen),
    }
    Path(f"{folder}/{first}-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:], "whole")
    main(*sys.argv[1:], "resumed")
