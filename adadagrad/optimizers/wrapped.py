"""Whether a wrapper averages the gradients of some parameters over ranks, which leaves no mark on the parameters."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from adadagrad.core.errors import InvalidArgument


def refuse_wrapped(params: Iterable[Tensor]) -> None:
    """Refuse parameters of a DistributedDataParallel whose gradients are taken before it has averaged them.

    Each rank would step on a gradient of its own, and the ranks part. Where it looks for unused parameters, its reducer
    writes nothing that could be noticed afterwards. So this looks for the wrapper, among all live objects of the
    process: some hundredths of a second, to be spent once, and only where there are several ranks.

    Args:
        params: The parameters.

    Raises:
        InvalidArgument: One is in such a wrapper.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    ours = {id(param) for param in params}
    for found in gc.get_objects():
        # By type: isinstance would ask lazy objects, such as proxies, to become what they stand for.
        if issubclass(type(found), DistributedDataParallel) and any(id(p) in ours for p in found.parameters()):
            raise InvalidArgument(
                "gradients are taken out of .grad before DistributedDataParallel has averaged them: pass "
                "free_gradients=False"
            )
