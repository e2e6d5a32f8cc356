// Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in NeoX layout, in place:
// (a, b) -> (a cos - b sin, b cos + a sin), a from the first half of a head, b from the second.
//
// A warp owns a row and reads its table row once: each lane keeps 8 cosines and sines and rotates
// the same 8 + 8 elements of head after head. A head of 64 takes 4 lanes, so a warp turns 8 heads
// at a time. Memory-bound: every element is read once and written once, in 16-byte accesses.

#include "common.cuh"

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    rope(int rows, int heads, int width, int head_dim, int lanes, unsigned limit, int inverse,
         const unsigned* positions, const float* cosines, const float* sines, bf16* qkv, Fault fault) {
    const int row = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const unsigned position = positions[row];
    if (position >= limit) {
        if (lane == 0) dust_fault(fault, row, position, limit);
        return;
    }
    const int half = head_dim / 2, column = 8 * (lane % lanes);
    if (column >= half) return;
    const Float8 cosine = load8(cosines + (size_t)position * half + column);
    Float8 sine = load8(sines + (size_t)position * half + column);
#pragma unroll
    for (int i = 0; i < 8; i++) sine.at[i] = inverse ? -sine.at[i] : sine.at[i];

    bf16* const first = qkv + (size_t)row * width + column;
#pragma unroll 4
    for (int head = lane / lanes; head < heads; head += WARP / lanes) {
        bf16* const p = first + head * head_dim;
        const Float8 a = widen(load8(p)), b = widen(load8(p + half));
        Float8 x, y;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x.at[i] = a.at[i] * cosine.at[i] - b.at[i] * sine.at[i];
            y.at[i] = b.at[i] * cosine.at[i] + a.at[i] * sine.at[i];
        }
        store8(p, round8(x));
        store8(p + half, round8(y));
    }
}
