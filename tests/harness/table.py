"""The layers under test: one row each. A new layer gets every law by adding a row."""

from __future__ import annotations

from dataclasses import dataclass

import normkit as nk
from normkit._definition import Definition


@dataclass(frozen=True)
class Row:
    """A layer, the shape of an input, and the axis along which batches differ in length."""

    name: str
    definition: Definition
    shape: tuple[int, ...]
    batch_axis: int = 0

    def shapes(self) -> list[tuple[int, ...]]:
        """Of five batches of different sizes."""
        n = self.shape[self.batch_axis]
        return [
            (*self.shape[: self.batch_axis], length, *self.shape[self.batch_axis + 1 :])
            for length in (n, n + 3, n + 1, 2 * n, n)
        ]

    @property
    def axes(self) -> tuple[int, ...]:
        return self.definition.reduced_axes(len(self.shape))

    @property
    def parameter_axes(self) -> tuple[int, ...]:
        return self.definition.parameter_axes(len(self.shape))

    @property
    def centered(self) -> bool:
        return not isinstance(self.definition, nk.RMSNorm)

    @property
    def eps(self) -> float:
        """That of float32 where the layer has none."""
        return 2.0**-23 if self.definition.eps is None else self.definition.eps

    @property
    def tracks(self) -> bool:
        return getattr(self.definition, "track_running_stats", False)


ROWS = [
    Row("bn-nc", nk.BatchNorm(5), (8, 5)),
    Row("bn-ncl", nk.BatchNorm(5), (4, 5, 7)),
    Row("bn-nchw", nk.BatchNorm(3), (4, 3, 5, 6)),
    Row("bn-nhwc", nk.BatchNorm(6, axis=-1), (4, 3, 5, 6)),
    Row("bn-ncdhw", nk.BatchNorm(3), (2, 3, 3, 2, 4)),
    Row("bn-middle", nk.BatchNorm(5, axis=-2), (3, 4, 5, 6)),
    Row("bn-first", nk.BatchNorm(3, axis=0), (3, 4, 5), batch_axis=1),
    Row("bn-equal-lengths", nk.BatchNorm(4, axis=2), (4, 4, 4, 4)),
    Row("bn-one-channel", nk.BatchNorm(1), (6, 1, 4)),
    Row("bn-scale-only", nk.BatchNorm(5, bias=False), (4, 5, 7)),
    Row("bn-bias-only", nk.BatchNorm(5, scale=False), (4, 5, 7)),
    Row("bn-bare", nk.BatchNorm(5, scale=False, bias=False), (4, 5, 7)),
    Row("bn-cumulative", nk.BatchNorm(5, decay=None), (4, 5, 7)),
    Row("bn-keep-none", nk.BatchNorm(5, decay=0.0), (4, 5, 7)),
    Row("bn-keep-all", nk.BatchNorm(5, decay=1), (4, 5, 7)),
    Row("bn-population", nk.BatchNorm(5, correction=0), (4, 5, 7)),
    Row("bn-untracked", nk.BatchNorm(5, track_running_stats=False), (4, 5, 7)),
    Row("bn-keras", nk.BatchNorm.keras(7), (4, 5, 7)),
    Row("bn-flax", nk.BatchNorm.flax(7), (4, 5, 7)),
    Row("ln-last", nk.LayerNorm(7), (4, 5, 7)),
    Row("ln-rows", nk.LayerNorm(16), (9, 16)),
    Row("ln-two", nk.LayerNorm((5, 7)), (4, 5, 7)),
    Row("ln-three", nk.LayerNorm((3, 5, 6)), (4, 3, 5, 6)),
    Row("ln-channels-first", nk.LayerNorm(3, axes=1), (4, 3, 5, 6)),
    Row("ln-apart", nk.LayerNorm((4, 4), axes=(1, 3)), (3, 4, 4, 4)),
    Row("ln-equal-lengths", nk.LayerNorm(4, axes=1), (4, 4, 4)),
    Row("ln-one-feature", nk.LayerNorm(1), (4, 5, 1)),
    Row("ln-scale-only", nk.LayerNorm(7, bias=False), (4, 5, 7)),
    Row("ln-bias-only", nk.LayerNorm(7, scale=False), (4, 5, 7)),
    Row("ln-bare", nk.LayerNorm(7, scale=False, bias=False), (4, 5, 7)),
    Row("ln-keras", nk.LayerNorm.keras(7), (4, 5, 7)),
    Row("ln-flax", nk.LayerNorm.flax(7), (4, 5, 7)),
    Row("gn-nchw", nk.GroupNorm(2, 6), (4, 6, 5, 3)),
    Row("gn-nc", nk.GroupNorm(3, 12), (5, 12)),
    Row("gn-nhwc", nk.GroupNorm.flax(2, 6), (4, 5, 3, 6)),
    Row("gn-middle", nk.GroupNorm.keras(2, 4, axis=-2), (4, 4, 4, 4)),
    Row("gn-one-group", nk.GroupNorm(1, 5), (4, 5, 7)),
    Row("gn-each-channel", nk.GroupNorm(5, 5), (4, 5, 7)),
    Row("gn-scale-only", nk.GroupNorm(2, 4, bias=False), (4, 4, 7)),
    Row("gn-bias-only", nk.GroupNorm(2, 4, scale=False), (4, 4, 7)),
    Row("gn-bare", nk.GroupNorm(2, 4, scale=False, bias=False), (4, 4, 7)),
    Row("in-ncl", nk.InstanceNorm(5), (4, 5, 7)),
    Row("in-affine", nk.InstanceNorm(3, scale=True, bias=True), (4, 3, 5, 6)),
    Row("in-nhwc", nk.InstanceNorm.flax(6), (4, 3, 5, 6)),
    Row("in-keras", nk.InstanceNorm.keras(4), (4, 4, 4)),
    Row("in-tracking", nk.InstanceNorm(5, track_running_stats=True), (4, 5, 7)),
    Row(
        "in-tracking-last",
        nk.InstanceNorm.flax(5, decay=None, correction=1, track_running_stats=True),
        (4, 3, 7, 5),
    ),
    Row("in-scale-only", nk.InstanceNorm(5, scale=True), (4, 5, 7)),
    Row("in-bias-only", nk.InstanceNorm(5, bias=True), (4, 5, 7)),
    Row("rms-last", nk.RMSNorm(7), (4, 5, 7)),
    Row("rms-two", nk.RMSNorm((5, 7), eps=1e-5), (4, 5, 7)),
    Row("rms-channels-first", nk.RMSNorm.keras(3, axes=1), (4, 3, 5, 6)),
    Row("rms-equal-lengths", nk.RMSNorm.flax(4, axes=1), (4, 4, 4)),
    Row("rms-one-feature", nk.RMSNorm(1, eps=1e-3), (4, 5, 1)),
    Row("rms-zero-centered", nk.RMSNorm.flax(7, zero_centered=True), (4, 5, 7)),
    Row("rms-after-cast", nk.RMSNorm.flax(7, scale_after_cast=True), (4, 5, 7)),
    Row("rms-bare", nk.RMSNorm(7, scale=False), (4, 5, 7)),
]
BY_NAME = {row.name: row for row in ROWS}
