"""The TensorBoard writer of CLU (Common Loop Utils) without TensorFlow; import this before anything of CLU.

CLU's own `SummaryWriter` imports TensorFlow, which is larger than all the other dependencies together. This
module takes the place of the one that holds it, after which the rest of CLU works as documented:

    from jaxdiff.training import clu_tensorboard  # noqa: F401
    from clu import metric_writers, periodic_actions

    writer = metric_writers.create_default_writer("logs")
"""

import io
import os
import pathlib
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util


class SummaryWriter:
    """Writes scalars, images, texts, histograms and tensors to an event file in `logdir`, which it makes.

    Methods and arguments are those of `clu.metric_writers.MetricWriter`, whose registered subclass it is.
    """

    def __init__(self, logdir: str) -> None:
        # Not TensorBoard's EventFileWriter: that imports TensorFlow, where it is installed, to open a file.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{nanoseconds:09d}"
        pathlib.Path(logdir).mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter(open(pathlib.Path(logdir, name), "xb"))  # noqa: SIM115
        self._write(event_pb2.Event(file_version="brain.Event:2"))

    def discard_after(self, step: int) -> None:
        """Tell TensorBoard that what earlier files of `logdir` hold after `step` did not happen."""
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=step + 1, session_log=start))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Numbers, or arrays of one element; NaN and infinity too."""
        Value = summary_pb2.Summary.Value
        self._add(step, [Value(tag=k, simple_value=np.asarray(v).item()) for k, v in scalars.items()])

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """[H, W, C] or [N, H, W, C], C = 1 or 3, uint8 or float in [0, 1] (clipped); N > 1 as `name/0`, ...

        Raises: ValueError on other shapes and types.
        """
        values = []
        for name, batch in images.items():
            pixels = _pixels(name, np.asarray(batch))
            for i, image in enumerate(pixels):
                tag = name if len(pixels) == 1 else f"{name}/{i}"
                values.append(summary_pb2.Summary.Value(tag=tag, image=_png(image)))
        self._add(step, values)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Markdown."""
        metadata = text_metadata.create_summary_metadata(display_name="", description="")
        values = []
        for name, text in texts.items():
            tensor = tensor_pb2.TensorProto(
                dtype=types_pb2.DT_STRING,
                tensor_shape=tensor_shape_pb2.TensorShapeProto(),
                string_val=[text.encode()],
            )
            values.append(summary_pb2.Summary.Value(tag=name, metadata=metadata, tensor=tensor))
        self._add(step, values)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Arrays of any shape, in `num_buckets[name]` (default 30) buckets of equal width.

        Raises: ValueError where an array is empty or has a NaN or an infinity.
        """
        values = []
        for name, array in arrays.items():
            flat = np.asarray(array, np.float64).ravel()
            if flat.size == 0 or not np.isfinite(flat).all():
                raise ValueError(f"histogram {name!r}: no values, or not all of them finite")
            counts, edges = np.histogram(flat, bins=(num_buckets or {}).get(name) or 30)
            histogram = summary_pb2.HistogramProto(
                min=flat.min(),
                max=flat.max(),
                num=flat.size,
                sum=flat.sum(),
                sum_squares=np.square(flat).sum(),
                bucket_limit=edges[1:],
                bucket=counts,
            )
            values.append(summary_pb2.Summary.Value(tag=name, histo=histogram))
        self._add(step, values)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Settings, nested or flat, as a table in the text tab."""
        rows = [f"| {name} | {value} |" for name, value in _flatten(hparams)]
        self.write_texts(0, {"hparams": "\n".join(["| field | value |", "|---|---|", *rows])})

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Arrays as they are, for a plugin that `metadata[name]` (SummaryMetadata or its bytes) names."""
        summaries = []
        for name, array in values.items():
            about = (metadata or {}).get(name)
            if isinstance(about, bytes):
                about = summary_pb2.SummaryMetadata.FromString(about)
            tensor = tensor_util.make_tensor_proto(np.asarray(array))
            summaries.append(summary_pb2.Summary.Value(tag=name, metadata=about, tensor=tensor))
        self._add(step, summaries)

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Raises: ValueError, always."""
        raise ValueError(f"audio {', '.join(audios)}: this writer has no encoder for audio")

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Raises: ValueError, always."""
        raise ValueError(f"video {', '.join(videos)}: TensorBoard has no videos; write their frames as images")

    def flush(self) -> None:
        """Bring everything to disk; it is there already."""
        self._records.flush()

    def close(self) -> None:
        """Bring everything to disk and close the file."""
        self._records.close()

    def _add(self, step: int, values: list[summary_pb2.Summary.Value]) -> None:
        self._write(event_pb2.Event(step=int(step), summary=summary_pb2.Summary(value=values)))

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()  # a killed run leaves whole records, and TensorBoard follows a running one


def _pixels(name: str, images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] of what `write_images` accepts."""
    batch = images[None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3):
        raise ValueError(f"image {name!r}: shape {images.shape}; must be [N, H, W, C] or [H, W, C], C = 1 or 3")
    if batch.dtype == np.uint8:
        return batch
    # Not np.floating: bfloat16 is not one of numpy's own types.
    if batch.dtype.kind in "iub" or not np.can_cast(batch.dtype, np.float64):
        raise ValueError(f"image {name!r}: type {batch.dtype}; must be uint8, or float in [0, 1]")
    return np.round(255 * np.clip(np.nan_to_num(batch.astype(np.float32)), 0, 1)).astype(np.uint8)


def _png(image: np.ndarray) -> summary_pb2.Summary.Image:
    """One image, uint8 [H, W, C]."""
    height, width, channels = image.shape
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if channels == 1 else image).save(buffer, format="PNG")
    return summary_pb2.Summary.Image(
        height=height, width=width, colorspace=channels, encoded_image_string=buffer.getvalue()
    )


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings (ConfigDict is none, but has `items`), by dotted name."""
    if not hasattr(tree, "items"):
        return [(prefix, tree)]
    return [leaf for k, v in tree.items() for leaf in _flatten(v, f"{prefix}.{k}" if prefix else str(k))]


# Importing any module of clu.metric_writers imports all of them, and so looks for this class. It must be in
# place by then, which is why it cannot derive from their MetricWriter, but is registered as a subclass.
sys.modules.setdefault("clu.metric_writers.summary_writer", sys.modules[__name__])

from clu import metric_writers  # noqa: E402

metric_writers.MetricWriter.register(SummaryWriter)
