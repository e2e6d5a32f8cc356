// Tensor-core building blocks of sm_80, for gemm, logprob and attention.
//
// Matrices lie in shared memory as bf16 tiles [rows][COLUMNS], cut into chunks of 16 bytes, which are
// what cp.async copies and ldmatrix reads. A chunk's place within its row is permuted by the row
// (`chunk_offset`), such that the eight chunks of one column of chunks, which ldmatrix reads at once,
// lie in different banks; no padding is needed.
//
// mma.sync m16n8k16 holds, in the lane with g = lane / 4 and t = lane % 4,
//   A: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)   rows of m, pairs along k
//   B: (2t.., g), (2t + 8.., g)                                     pairs along k, columns of n
//   C: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#pragma once

#include "common.cuh"

// bf16 elements of a chunk.
constexpr int CHUNK = 8;

// The bits of a chunk's place that the row permutes.
template <int COLUMNS>
constexpr int PERMUTED = COLUMNS / CHUNK >= 8 ? 7 : COLUMNS / CHUNK - 1;

// Where chunk `chunk` of row `row` lies in a tile [rows][COLUMNS], in bytes.
template <int COLUMNS>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
    constexpr int CHUNKS = COLUMNS / CHUNK;
    static_assert(CHUNKS == 2 || CHUNKS == 4 || CHUNKS % 8 == 0, "rows of 32, 64 or n x 128 bytes");
    // Rows shorter than all 32 banks share them: only every second or fourth row moves on.
    constexpr int SHARE = CHUNKS >= 8 ? 1 : 8 / CHUNKS;
    return static_cast<uint32_t>(row * CHUNKS + (chunk ^ (row / SHARE & PERMUTED<COLUMNS>))) * 16;
}

// The address of chunk (lane_row, lane_chunk) of the fragment at (row, column) of a tile aligned to 128
// bytes; `row` is a multiple of 8, `column` of 16. The permutation then is that of `lane_row`, and `column`
// flips bits of an address that all columns have in common: a fragment costs one instruction and no
// register that outlives it.
template <int COLUMNS>
__device__ __forceinline__ uint32_t fragment_address(uint32_t tile, int row, int column, int lane_row,
                                                     int lane_chunk) {
    const uint32_t chunk = column / CHUNK, flipped = chunk & PERMUTED<COLUMNS>;
    return ((tile + chunk_offset<COLUMNS>(lane_row, lane_chunk)) ^ flipped * 16) + (chunk - flipped) * 16 +
           row * COLUMNS * 2;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes, or writes 16 zero bytes where `valid` is false; then `from` is not read.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `PENDING` of this thread's groups are under way. Other threads see the data
// after a barrier.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Likewise, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// c += a b, 16 x 8 x 16.
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The 16 x 16 fragment of A at (row, column) of a tile stored [m][k].
template <int COLUMNS>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(a, fragment_address<COLUMNS>(tile, row, column, lane % 16, lane / 16));
}

// The 16 x 16 fragment of A whose tile is stored [k][m]: (row, column) count k and m.
template <int COLUMNS>
__device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], uint32_t tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(
        a, fragment_address<COLUMNS>(tile, row, column, lane % 8 + lane / 16 * 8, lane / 8 % 2));
}

// Two 16 x 8 fragments of B, side by side along n, of a tile stored [n][k]: {b[0], b[1]} is the first.
template <int COLUMNS>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(b, fragment_address<COLUMNS>(tile, row, column, lane % 8 + lane / 16 * 8, lane / 8 % 2));
}

// Likewise, of a tile stored [k][n]: (row, column) count k and n.
template <int COLUMNS>
__device__ __forceinline__ void load_b_trans(uint32_t (&b)[4], uint32_t tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(b, fragment_address<COLUMNS>(tile, row, column, lane % 16, lane / 16));
}

// Two f32 as bf16, rounded to nearest even; `low` is the first in memory.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
