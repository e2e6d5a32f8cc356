// A block's tile of a matrix product, for gemm and logprob: bf16 operands, f32 accumulators.
//
// C[BM, BN] += A[BM, K] B[K, BN] runs in steps of BK through a ring of STAGES pairs of tiles in shared
// memory: cp.async fills the pair of step i + STAGES - 1 while step i is multiplied. One barrier a step
// is enough: it shows everyone the step's data, and that all have left the pair that is filled next.
// Either operand may be stored with k along its rows or down its columns; ldmatrix transposes.
//
// Rows and columns outside of the operands are zeros in shared memory. Every accumulator takes the
// products of its row and column in the order of k, 16 at a time, from zero, and a step of zeros
// changes none: an element has the same bits whichever tile computes it, however many rows there are.
#pragma once

#include "mma.cuh"

extern __shared__ __align__(128) unsigned char shared_memory[];

// A matrix as it is stored: `rows` rows of `columns`, `stride` elements apart. Rows are aligned to 16
// bytes and `columns` is a multiple of 8.
struct Operand {
    const bf16* data;
    size_t stride;
    int rows;
    int columns;
};

template <int BM_, int BN_, int BK_, int STAGES_, int WARPS_M_, int WARPS_N_>
struct Tile {
    static constexpr int BM = BM_, BN = BN_, BK = BK_, STAGES = STAGES_;
    static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    // Fragments of a warp: 16 rows, 8 columns each.
    static constexpr int MI = BM / WARPS_M / 16, NI = BN / WARPS_N / 8;
    static_assert(NI % 2 == 0, "fragments of B are loaded in pairs");
    static constexpr uint32_t A_BYTES = BM * BK * sizeof(bf16), B_BYTES = BN * BK * sizeof(bf16);
    static constexpr int PIPELINE_BYTES = STAGES * (A_BYTES + B_BYTES);
};

// Where a thread's accumulators lie: acc[i][j][2 * h + e] is row `row(i, h)`, column `column(j) + e`
// of the block's tile.
template <class T>
struct Place {
    int m = threadIdx.x / 32 / T::WARPS_N * (T::MI * 16);
    int n = threadIdx.x / 32 % T::WARPS_N * (T::NI * 8);
    __device__ int row(int i, int h) const { return m + i * 16 + h * 8 + threadIdx.x % 32 / 4; }
    __device__ int column(int j) const { return n + j * 8 + threadIdx.x % 4 * 2; }
};

// Starts copying the tile [ROWS][COLUMNS] at (row, column) of `from`; zeros beyond its edges.
template <int ROWS, int COLUMNS, int THREADS>
__device__ __forceinline__ void copy_tile(uint32_t to, const Operand& from, int row, int column) {
    constexpr int CHUNKS = COLUMNS / CHUNK;
    static_assert(ROWS * CHUNKS % THREADS == 0, "threads share the chunks evenly");
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        const int r = (threadIdx.x + i * THREADS) / CHUNKS;
        const int c = (threadIdx.x + i * THREADS) % CHUNKS;
        const int at_row = row + r, at_column = column + c * CHUNK;
        const bool valid = at_row < from.rows && at_column < from.columns;
        const bf16* source = from.data + (valid ? at_row * from.stride + at_column : 0);
        cp_async_16(to + chunk_offset<COLUMNS>(r, c), source, valid);
    }
}

// A is stored [m][k], or [k][m] if A_TRANS; B is stored [n][k], or [k][n] if B_TRANS. Afterwards shared
// memory is free for other use.
template <class T, bool A_TRANS, bool B_TRANS>
__device__ __forceinline__ void multiply(float (&acc)[T::MI][T::NI][4], const Operand& a, const Operand& b, int m, int n, int k) {
    constexpr int BM = T::BM, BN = T::BN, BK = T::BK;
    const Place<T> place;
    const uint32_t a_tiles = shared_address(shared_memory);
    const uint32_t b_tiles = a_tiles + T::STAGES * T::A_BYTES;
    const int steps = (k + BK - 1) / BK;

    const auto fill = [&](int step) {
        if (step < steps) {
            const uint32_t a_tile = a_tiles + step % T::STAGES * T::A_BYTES;
            const uint32_t b_tile = b_tiles + step % T::STAGES * T::B_BYTES;
            if (A_TRANS)
                copy_tile<BK, BM, T::THREADS>(a_tile, a, step * BK, m);
            else
                copy_tile<BM, BK, T::THREADS>(a_tile, a, m, step * BK);
            if (B_TRANS)
                copy_tile<BK, BN, T::THREADS>(b_tile, b, step * BK, n);
            else
                copy_tile<BN, BK, T::THREADS>(b_tile, b, n, step * BK);
        }
        // Also an empty group: the waits count groups.
        cp_async_commit();
    };

#pragma unroll
    for (int i = 0; i < T::MI; i++)
#pragma unroll
        for (int j = 0; j < T::NI; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;

#pragma unroll
    for (int s = 0; s < T::STAGES - 1; s++) fill(s);

    for (int step = 0; step < steps; step++) {
        cp_async_wait<T::STAGES - 2>();
        __syncthreads();
        fill(step + T::STAGES - 1);
        const uint32_t a_tile = a_tiles + step % T::STAGES * T::A_BYTES;
        const uint32_t b_tile = b_tiles + step % T::STAGES * T::B_BYTES;
#pragma unroll
        for (int kk = 0; kk < BK; kk += 16) {
            uint32_t fa[T::MI][4], fb[T::NI / 2][4];
#pragma unroll
            for (int i = 0; i < T::MI; i++) {
                if (A_TRANS)
                    load_a_trans<BM>(fa[i], a_tile, kk, place.m + i * 16);
                else
                    load_a<BK>(fa[i], a_tile, place.m + i * 16, kk);
            }
#pragma unroll
            for (int j = 0; j < T::NI / 2; j++) {
                if (B_TRANS)
                    load_b_trans<BN>(fb[j], b_tile, kk, place.n + j * 16);
                else
                    load_b<BK>(fb[j], b_tile, place.n + j * 16, kk);
            }
#pragma unroll
            for (int i = 0; i < T::MI; i++)
#pragma unroll
                for (int j = 0; j < T::NI; j++)
                    mma(acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
}

__device__ __forceinline__ void store_pair(float* at, float x, float y) {
    *reinterpret_cast<float2*>(at) = make_float2(x, y);
}

__device__ __forceinline__ void store_pair(bf16* at, float x, float y) {
    *reinterpret_cast<uint32_t*>(at) = round2(x, y);
}

// Where 16 bytes lie in a staged tile of rows of n x 128 bytes. Writes come in pairs of accumulators:
// of bf16 a warp writes eight rows of one chunk, of f32 half a warp writes four rows of two chunks.
template <class T, typename Out>
__device__ __forceinline__ int staged(int row, int chunk) {
    const int turn = sizeof(Out) == 2 ? row & 7 : (row & 3) << 1;
    return row * (T::BN * static_cast<int>(sizeof(Out)) / 16) + (chunk ^ turn);
}

// Lays the accumulators out in shared memory as the tile [BM][BN] of `Out`.
template <class T, typename Out>
__device__ __forceinline__ void stage(const float (&acc)[T::MI][T::NI][4]) {
    constexpr int WIDTH = 16 / sizeof(Out);
    static_assert(T::BM * T::BN * sizeof(Out) <= T::PIPELINE_BYTES, "the tile lies where the ring was");
    static_assert(T::BN * sizeof(Out) % 128 == 0, "rows fill the banks");
    const Place<T> place;
    Out* tile = reinterpret_cast<Out*>(shared_memory);
#pragma unroll
    for (int i = 0; i < T::MI; i++)
#pragma unroll
        for (int j = 0; j < T::NI; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = place.row(i, h), column = place.column(j);
                store_pair(tile + staged<T, Out>(row, column / WIDTH) * WIDTH + column % WIDTH,
                           acc[i][j][2 * h], acc[i][j][2 * h + 1]);
            }
    __syncthreads();
}

// Hands the staged tile on in runs of 16 bytes: `write(row, column, run)` with places in the tile.
// Neighbouring threads have neighbouring runs.
template <class T, typename Out, class Write>
__device__ __forceinline__ void unstage(Write write) {
    constexpr int WIDTH = 16 / sizeof(Out), RUNS = T::BN / WIDTH;
    const uint4* tile = reinterpret_cast<const uint4*>(shared_memory);
#pragma unroll 4
    for (int i = threadIdx.x; i < T::BM * RUNS; i += T::THREADS) {
        const int row = i / RUNS, run = i % RUNS;
        write(row, run * WIDTH, tile[staged<T, Out>(row, run)]);
    }
}

// out[m.., n..] = the tile, or += the tile if `add`; `out` is [rows, columns] with aligned rows `stride`
// apart.
template <class T>
__device__ __forceinline__ void store_tile(const float (&acc)[T::MI][T::NI][4], float* out, size_t stride,
                                           int m, int n, int rows, int columns, bool add) {
    stage<T, float>(acc);
    unstage<T, float>([&](int row, int column, uint4 run) {
        if (m + row >= rows || n + column >= columns) return;
        float4* at = reinterpret_cast<float4*>(out + (m + row) * stride + n + column);
        float4 value = make_float4(__uint_as_float(run.x), __uint_as_float(run.y),
                                   __uint_as_float(run.z), __uint_as_float(run.w));
        if (add) {
            const float4 before = *at;
            value = make_float4(before.x + value.x, before.y + value.y, before.z + value.z,
                                before.w + value.w);
        }
        *at = value;
    });
}
