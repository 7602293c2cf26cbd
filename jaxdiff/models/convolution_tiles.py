"""What `convolution_kernels` cuts a convolution into: numbers, arguments, and places in them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir

from jaxdiff.models.convolutions import Added, Box, Cut
from jaxdiff.models.mosaic import add, index

CHANNELS = 64  # at a time: lines of 128 bytes, which shared memory is swizzled by
PIECE = 64  # positions that are written at once


class Sizes(NamedTuple):
    """What a kernel is asked for (`convolution_kernels.build`), and the numbers that follow."""

    shape: tuple[int, int, int, int]
    features: int
    side: int
    chosen: Cut
    added: Added
    summed: bool
    multiprocessors: int
    parted: int

    @property
    def halo(self) -> Box:
        """The positions that are read for a tile's."""
        return self.chosen.box._replace(height=self.chosen.box.height + self.chosen.taps - 1)

    @property
    def small(self) -> Box:
        """The positions that are written at once."""
        box = Box.of(PIECE, *self.shape[1:3])
        assert box is not None  # or there is no cut
        return box

    @property
    def kinds(self) -> int:
        """Kernels, each for other rows and columns of the result."""
        return 4 if self.side == 2 else 1

    @property
    def down(self) -> int:
        """Tiles of an image below one another."""
        return self.shape[1] // self.chosen.box.height

    @property
    def across(self) -> int:
        """Tiles of an image beside one another."""
        return self.shape[2] // self.chosen.box.width

    @property
    def columns(self) -> int:
        """Tiles of the features."""
        return self.features // self.chosen.columns

    @property
    def tiles(self) -> int:
        """Tiles in all."""
        return self.shape[0] // self.chosen.box.images * self.down * self.across * self.kinds * self.columns

    @property
    def blocks(self) -> int:
        """Thread blocks that take the tiles in turns."""
        return min(self.multiprocessors, self.tiles)

    @property
    def chunks(self) -> int:
        """Pieces of the channels."""
        return self.shape[3] // CHANNELS

    @property
    def groups(self) -> int:
        """Pieces of the map that taps are for, of a tile."""
        return self.side**2 // self.chosen.taps * self.chunks

    @property
    def beside(self) -> int:
        """Pieces of a warpgroup's result beside one another."""
        return self.chosen.columns // CHANNELS

    @property
    def below(self) -> int:
        """Pieces of a warpgroup's result below one another."""
        return self.chosen.rows // PIECE

    @property
    def kept(self) -> int:
        """Pieces of the map that is added."""
        return self.beside if self.added.residual else 0

    @property
    def products(self) -> int:
        """Pieces of the maps that have kernels."""
        return sum(self.added.widths) // CHANNELS

    @property
    def map_pieces(self) -> int:
        """All of maps that are copied for a tile."""
        return self.groups + self.products + self.kept

    @property
    def kernel_pieces(self) -> int:
        """And of kernels: where there is none the place of one."""
        return self.groups * self.chosen.taps + self.products + self.kept


class Refs(NamedTuple):
    """Of a block: the arrays, and in shared memory pieces of them, results, sums, and barriers, which are reached when
    a piece of the kernel has come, and what came before it; when it is read; and when a piece of the map is read."""

    x: Any
    kernel: Any
    bias: Any
    residual: Any
    maps: list[Any]
    kernels: list[Any]
    outs: list[Any]
    sums: Any
    map_smem: Any
    kernel_smem: Any
    out_smem: Any
    sums_smem: Any
    full: Any
    empty: Any
    map_empty: Any

    @classmethod
    def of(cls, sizes: Sizes, refs: Sequence[Any]) -> Self:
        """In the order of the arguments."""
        *arrays, shared = refs
        rest, added = iter(arrays), sizes.added
        x, kernel = next(rest), next(rest)
        bias, residual = (next(rest) if there else None for there in (added.bias, added.residual))
        maps, kernels = ([next(rest) for _ in added.widths] for _ in range(2))
        outs = [next(rest) for _ in range(sizes.parted)]
        return cls(x, kernel, bias, residual, maps, kernels, outs, next(rest, None), *shared)


class Place(NamedTuple):
    """The first image, row, column and feature of a tile, and its kind."""

    image: ir.Value
    row: ir.Value
    column: ir.Value
    feature: ir.Value
    kind: ir.Value


class Counts(NamedTuple):
    """How many pieces of kernels and of maps have been copied, or used, since the block began."""

    kernels: ir.Value
    maps: ir.Value

    def next(self) -> "Counts":
        """With one more of both."""
        return Counts(add(self.kernels, index(1)), add(self.maps, index(1)))


def window(box: Box, image: ir.Value, row: ir.Value, column: ir.Value, channel: ir.Value) -> tuple[Any, ...]:
    """Of a map, a box of positions and a piece of channels that begin there."""
    starts, sizes = (image, row, column, channel), (*box, CHANNELS)
    return tuple(mgpu.ds(start, size) for start, size in zip(starts, sizes, strict=True))
