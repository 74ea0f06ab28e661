# mypy: ignore-errors
# (Triton's functions are compiled from their source, and Triton need not be there.)
"""The Triton kernels of a compact block; `fused` chooses and launches them."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

AVAILABLE = triton is not None

if triton is not None:

    @triton.jit
    def norm_silu(
        maps, constants, emb, shifts, weight, bias, rows, kept, pruned, size, channels, eps,
        PER_GROUP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """silu(GroupNorm) of one group of one image, in place; three passes over its kept maps."""
        image, group = tl.program_id(0), tl.program_id(1)
        first = group * PER_GROUP
        maps += image.to(tl.int64) * kept * size
        emb += image * channels
        offsets = tl.arange(0, BLOCK)

        total = tl.zeros([BLOCK], tl.float32)
        shift_total = 0.0
        for channel in range(first, first + PER_GROUP):
            row = tl.load(rows + channel)
            shift_total += tl.load(shifts + channel) + tl.load(emb + channel).to(tl.float32)
            if row >= 0:
                for start in range(0, size, BLOCK):
                    inside = start + offsets < size
                    at = maps + row * size + start + offsets
                    total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        mean = shift_total / PER_GROUP + tl.sum(total, 0) / (PER_GROUP * size)

        squares = tl.zeros([BLOCK], tl.float32)
        constant_squares = 0.0
        for channel in range(first, first + PER_GROUP):
            row = tl.load(rows + channel)
            shift = tl.load(shifts + channel) + tl.load(emb + channel).to(tl.float32) - mean
            if row >= 0:
                for start in range(0, size, BLOCK):
                    inside = start + offsets < size
                    at = maps + row * size + start + offsets
                    value = tl.load(at, mask=inside, other=0.0).to(tl.float32) + shift
                    squares += tl.where(inside, value * value, 0.0)
            else:
                constant_squares += shift * shift
        variance = constant_squares / PER_GROUP + tl.sum(squares, 0) / (PER_GROUP * size)
        inverse = 1.0 / tl.sqrt(variance + eps)

        for channel in range(first, first + PER_GROUP):
            row = tl.load(rows + channel)
            shift = tl.load(shifts + channel) + tl.load(emb + channel).to(tl.float32) - mean
            scale = tl.load(weight + channel) * inverse
            offset = tl.load(bias + channel)
            if row >= 0:
                for start in range(0, size, BLOCK):
                    inside = start + offsets < size
                    at = maps + row * size + start + offsets
                    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                    value = (value + shift) * scale + offset
                    value = value / (1.0 + tl.exp(-value))
                    tl.store(at, value.to(maps.dtype.element_ty), mask=inside)
            else:
                value = shift * scale + offset
                value = value / (1.0 + tl.exp(-value))
                at = constants + image * pruned - 1 - row
                tl.store(at, value.to(constants.dtype.element_ty))

    @triton.jit
    def join(
        out, skip, computed, taps, planes, rows, computed_rows, channels, height, width,
        GATED: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One map of the output: the skip path, conv2's row, and what constants leave behind it."""
        image, channel = tl.program_id(0), tl.program_id(1)
        size = height * width
        position = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        inside = position < size
        map_start = (image.to(tl.int64) * channels + channel) * size
        value = tl.load(skip + map_start + position, mask=inside, other=0.0).to(tl.float32)
        row = channel
        if GATED:
            row = tl.load(rows + channel)
            value += tl.load(planes + channel).to(tl.float32)
        if row >= 0:
            place = image.to(tl.int64) * computed_rows + row
            at = computed + place * size + position
            value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if TAPS == 1:
                value += tl.load(taps + place).to(tl.float32)
            else:
                y, x = position // width, position % width
                for tap in tl.static_range(9):
                    below, right = y + tap // 3 - 1, x + tap % 3 - 1
                    there = (below >= 0) & (below < height) & (right >= 0) & (right < width)
                    weight = tl.load(taps + place * 9 + tap).to(tl.float32)
                    value += tl.where(there, weight, 0.0)
        tl.store(out + map_start + position, value.to(out.dtype.element_ty), mask=inside)
