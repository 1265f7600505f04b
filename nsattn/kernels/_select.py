"""The choice of Eq 10, shared by block selection and decoding: the best of a row of scores, exactly."""

import triton
import triton.language as tl

INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def keep_best(score, competes, free, FREE: tl.constexpr):
    """Which `free` entries of a row [BC] of float32 scores >= 0 are largest, among those that compete; free <= FREE.

    Bisection on the bits, no sort. Ties go to the lower index, NaN counts as infinity. All are kept if no more than
    `free` compete. FREE is a power of two, at most BC.
    """
    # Scores are not negative, so their bits order like the numbers; -1 stands for blocks that do not compete.
    bits = tl.where(score == score, score.to(tl.int32, bitcast=True), INF_BITS)
    bits = tl.where(competes, bits, -1)
    # Bisect for `low` with the `free` best at or above it and too few at or above `high`; usually the count is
    # exact before the interval closes. Where it closes, the scores equal to `low` tie: lower blocks first.
    # The least of FREE maxima of disjoint parts is a lower bound, and cuts the search by half.
    parts = tl.max(tl.reshape(bits, [score.shape[0] // FREE, FREE]), 0)
    low = tl.maximum(tl.min(parts, 0), 0)
    high = tl.max(bits, 0) + 1
    count = tl.sum((bits >= low).to(tl.int32), 0)
    while (count > free) & (high - low > 1):
        middle = low + (high - low) // 2
        above = tl.sum((bits >= middle).to(tl.int32), 0)
        enough = above >= free
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        count = tl.where(enough, above, count)
    keep = bits >= low
    if count > free:
        greater = bits > low
        room = free - tl.sum(greater.to(tl.int32), 0)
        tied = bits == low
        keep = greater | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    return keep
