"""The Hugging Face Trainer with a batch size that follows the gradient's noise.

Needs the extra ``hf``: transformers 5 and accelerate from 1.10. `AdaptiveBatchTrainer` stands where ``Trainer`` stood:

    trainer = AdaptiveBatchTrainer(model, args, train_dataset=data, policy=NormTest(eta=0.5), max_batch_size=4096)
    trainer.train()

There is no callback that would do the same. A callback can change ``gradient_accumulation_steps`` between two steps,
but not the learning rate's schedule, nor ``max_steps``, nor the place in the data where a run is resumed, all of which
Trainer counts in steps of one size. And it comes after clipping, too late to measure a gradient.
"""

from adadagrad.core.errors import MissingExtra

try:
    import accelerate as _accelerate  # type: ignore[import-untyped]  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as missing:
    raise MissingExtra("transformers", "hf") from missing

from adadagrad.integrations.transformers.trainer import AdaptiveBatchTrainer

__all__ = ["AdaptiveBatchTrainer"]
