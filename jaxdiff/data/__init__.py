"""Images and labels in, global batches out, in an order that is a function of (seed, step)."""

from jaxdiff.data.pipeline import device_batches, eval_batches, every_row, train_batches
from jaxdiff.data.sources import Source, array_source, load_source

__all__ = ["Source", "array_source", "device_batches", "eval_batches", "every_row", "load_source", "train_batches"]
