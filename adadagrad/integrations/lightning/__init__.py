"""Lightning: the Trainer's own loop, with batches that the gradient chooses. Needs the extra ``lightning``.

    adaptive = AdaptiveBatchCallback(NormTest(eta=0.5), max_batch_size=4096)
    trainer = Trainer(max_epochs=10, callbacks=[adaptive])
    trainer.fit(model, adaptive.loader(loader))

The loader's batch is the micro-batch and never changes, so that everything which Lightning counts in batches stays as
it is: an epoch's length, the progress bar, `val_check_interval`. What changes is after how many of them the optimizer
steps (`run.py`).

Supported: lightning 2.5.0 to 2.6.6, on which tests/integrations/test_lightning*.py have run.
"""

from adadagrad.core.errors import MissingExtra

try:
    import lightning.pytorch as _lightning  # noqa: F401
except ImportError as missing:
    raise MissingExtra("lightning", "lightning") from missing

from adadagrad.integrations.lightning.callback import AdaptiveBatchCallback
from adadagrad.integrations.lightning.loader import AdaptiveLoader

__all__ = ["AdaptiveBatchCallback", "AdaptiveLoader"]
