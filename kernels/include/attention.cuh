// What the attention kernels share: lines, tiles, and the canonical reduction.
//
// A *line* is one query head of one query row. All query heads that read one key/value head are
// lines of one tile, row by row, so that a key is loaded once for the whole group and a lone row in
// decode still fills the 16 lines of an mma: line / group is the row, line % group the head.
//
// The canonical reduction, the same on every path: keys in chunks of KEYS from position 0, each chunk
// reduced by one warp from a fresh state (maximum, sum, weighted values), chunk states merged left to
// right by `Merge`. A line's bits depend on its query and its keys alone: the products of a chunk are
// one sequence of mma steps over the inner dimension, in which keys out of sight count for exact zeros,
// and a line is a row of the mma, independent of the other 15.
//
// Exponents are of base 2, with scale * log2(e) multiplied into the scores.
#pragma once

#include "mma.cuh"

constexpr int KEYS = 64;
constexpr int WARP_LINES = 16;
constexpr int WARPS = 4;
constexpr int LINES = WARPS * WARP_LINES;
constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;

// Bytes of a tile of KEYS or LINES rows.
template <int D>
constexpr int TILE_BYTES = KEYS * D * 2;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// One sequence of a packed batch, as in the Rust `Segment`.
struct alignas(16) Segment {
    uint32_t start, len, prefix_start, prefix_len;
};

// Lines of packed rows: `base` is the first head of the group in the first row.
template <class T>
struct Lines {
    T* base;
    int64_t row_stride;
    int group;
    int head_stride;

    __device__ T* operator()(int line) const {
        return base + line / group * row_stride + line % group * head_stride;
    }
};

// Starts copying ROWS rows of D values into a tile; `row` gives a row's address, or null for zeros.
template <int D, int ROWS, int THREADS, class Row>
__device__ __forceinline__ void load_tile(uint32_t tile, Row row) {
    constexpr int CHUNKS = D / CHUNK;
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies as much");
#pragma unroll
    for (int step = 0; step < ROWS * CHUNKS / THREADS; step++) {
        const int at = step * THREADS + static_cast<int>(threadIdx.x);
        const bf16* from = row(at / CHUNKS);
        cp_async_16(tile + chunk_offset<D>(at / CHUNKS, at % CHUNKS), from + at % CHUNKS * CHUNK,
                    from != nullptr);
    }
}

// The warp's 16 rows of a tile, as fragments of A.
template <int D>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[D / 16][4], uint32_t tile, int row) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) load_a<D>(a[k], tile, row, 16 * k);
}

// The 0 makes -0 of sums of zeros +0, which otherwise could depend on how many zeros were added; no
// contraction of the two, for the same reason.
__device__ __forceinline__ float scaled(float value, float factor) {
    return __fadd_rn(__fmul_rn(value, factor), 0.0f);
}

// Writes a warp's 16 x D results, times `factor` of the line, as bf16: through 16 tile rows of its own
// at `tile`, so that memory is written 16 bytes at a time. `row` gives a row's address, or null to leave it out.
template <int D, class Row>
__device__ __forceinline__ void store_rows(const float (&c)[D / 8][4], const float (&factor)[2],
                                           uint32_t tile, Row row) {
    const int lane = threadIdx.x % 32;
    const uint32_t at = lane % 4 * 4;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        const uint32_t low = pack_bf16(scaled(c[n][0], factor[0]), scaled(c[n][1], factor[0]));
        const uint32_t high = pack_bf16(scaled(c[n][2], factor[1]), scaled(c[n][3], factor[1]));
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + chunk_offset<D>(lane / 4, n) + at), "r"(low)
                     : "memory");
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + chunk_offset<D>(lane / 4 + 8, n) + at),
                     "r"(high)
                     : "memory");
    }
    __syncwarp();
    constexpr int CHUNKS = D / CHUNK;
#pragma unroll
    for (int step = 0; step < WARP_LINES * CHUNKS / 32; step++) {
        const int i = step * 32 + lane;
        uint4 value;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "r"(tile + chunk_offset<D>(i / CHUNKS, i % CHUNKS))
                     : "memory");
        bf16* to = row(i / CHUNKS);
        if (to != nullptr) *reinterpret_cast<uint4*>(to + i % CHUNKS * CHUNK) = value;
    }
}

// The fresh state of a chunk for the warp's 16 lines: what this thread holds of lines lane / 4 and
// lane / 4 + 8. The weighted values are left to `weighted_values`, a few columns at a time.
struct ChunkState {
    // exp2(score - max) as fragments of A, by 16 keys.
    uint32_t p[KEYS / 16][4];
    float max[2];
    float sum[2];
};

// Reduces a chunk of which the two lines see the first `sight` keys; none if that is not positive.
template <int D>
__device__ __forceinline__ void reduce_chunk(ChunkState& state, const uint32_t (&q)[D / 16][4],
                                             uint32_t keys, float scale_log2, const int (&sight)[2]) {
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            uint32_t b[4];
            load_b<D>(b, keys, 16 * n, 16 * k);
            mma(s[2 * n], q[k], b[0], b[1]);
            mma(s[2 * n + 1], q[k], b[2], b[3]);
        }
    }
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float max = -INFINITY;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = s[n][2 * half + i];
                score = 8 * n + column + i < sight[half] ? score * scale_log2 : -INFINITY;
                max = fmaxf(max, score);
            }
        }
        max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
        // A line that sees nothing has no maximum; -inf - -inf would be NaN.
        const float shift = sight[half] > 0 ? max : 0.0f;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = s[n][2 * half + i];
                score = exp2_approx(score - shift);
                sum += score;
            }
        }
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        state.max[half] = max;
        state.sum[half] = sum;
    }
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        state.p[k][0] = pack_bf16(s[2 * k][0], s[2 * k][1]);
        state.p[k][1] = pack_bf16(s[2 * k][2], s[2 * k][3]);
        state.p[k][2] = pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]);
        state.p[k][3] = pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3]);
    }
}

// Columns 16 n .. 16 n + 15 of a chunk's weighted values.
template <int D>
__device__ __forceinline__ void weighted_values(float (&o)[2][4], const ChunkState& state,
                                                uint32_t values, int n) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        uint32_t b[4];
        load_b_trans<D>(b, values, 16 * k, 16 * n);
        mma(o[0], state.p[k], b[0], b[1]);
        mma(o[1], state.p[k], b[2], b[3]);
    }
}

// Merges the state of a chunk into that of the chunks before: value = value * old + chunk * now.
struct Merge {
    float old, now;

    // `visible`: whether the line sees anything of the chunk.
    __device__ Merge(float& max, float& sum, float chunk_max, float chunk_sum, bool visible) {
        const float both = fmaxf(max, chunk_max);
        old = visible ? exp2_approx(max - both) : 1.0f;
        now = visible ? exp2_approx(chunk_max - both) : 0.0f;
        max = both;
        sum = (*this)(sum, chunk_sum);
    }

    __device__ float operator()(float value, float chunk) const { return fmaf(chunk, now, value * old); }
};

// One block's tile of lines over all the keys in their sight: fills `out`, and `lse` if it is not null.
//
// `keys(chunk, i)` gives the row of a chunk's key in `k` and `v`; `keys.prefetch(chunk)` is told of the
// chunk that is asked for next. While a chunk is at work the next one's keys and then its values are
// copied, two stages of each; the queries pass through what becomes the second stage of the keys.
template <int D, class Keys>
__device__ __forceinline__ void forward_tile(uint32_t shared, Keys keys, const bf16* k, const bf16* v,
                                             int64_t stride, Lines<const bf16> q, Lines<bf16> out,
                                             Lines<float> lse, int position, int first, int end,
                                             float scale_log2) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t key_tiles = shared, value_tiles = shared + 2 * TILE_BYTES<D>;
    // Keys in sight of all lines, of the last line.
    const int context = position + (min(first + LINES, end) - 1) / q.group + 1;
    const int chunks = (context + KEYS - 1) / KEYS;
    int sight[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int line = first + warp * WARP_LINES + lane / 4 + 8 * half;
        sight[half] = position + line / q.group + 1;
    }
    auto load = [&](const bf16* from, uint32_t tiles, int chunk) {
        if (chunk < chunks) {
            load_tile<D, KEYS, 32 * WARPS>(tiles + chunk % 2 * TILE_BYTES<D>, [&](int i) {
                const int64_t row = chunk * KEYS + i < context ? keys(chunk, i) : -1;
                return row < 0 ? nullptr : from + row * stride;
            });
        }
        cp_async_commit();
    };

    keys.prefetch(0);
    load_tile<D, LINES, 32 * WARPS>(key_tiles + TILE_BYTES<D>, [&](int i) {
        return first + i < end ? q(first + i) : nullptr;
    });
    load(k, key_tiles, 0);
    load(v, value_tiles, 0);
    if (chunks > 1) keys.prefetch(1);
    cp_async_wait<1>();
    __syncthreads();
    uint32_t queries[D / 16][4];
    load_fragments<D>(queries, key_tiles + TILE_BYTES<D>, warp * WARP_LINES);

    float o[D / 8][4] = {};
    float max[2] = {-INFINITY, -INFINITY};
    float sum[2] = {};
    for (int chunk = 0; chunk < chunks; chunk++) {
        const uint32_t stage = chunk % 2 * TILE_BYTES<D>;
        cp_async_wait<1>();
        __syncthreads();
        load(k, key_tiles, chunk + 1);
        ChunkState state;
        const int here[2] = {sight[0] - chunk * KEYS, sight[1] - chunk * KEYS};
        reduce_chunk<D>(state, queries, key_tiles + stage, scale_log2, here);
        const Merge low(max[0], sum[0], state.max[0], state.sum[0], here[0] > 0);
        const Merge high(max[1], sum[1], state.max[1], state.sum[1], here[1] > 0);
        cp_async_wait<1>();
        __syncthreads();
        load(v, value_tiles, chunk + 1);
        if (chunk + 2 < chunks) keys.prefetch(chunk + 2);
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            float fresh[2][4] = {};
            weighted_values<D>(fresh, state, value_tiles + stage, n);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float(&value)[4] = o[2 * n + i];
                value[0] = low(value[0], fresh[i][0]);
                value[1] = low(value[1], fresh[i][1]);
                value[2] = high(value[2], fresh[i][2]);
                value[3] = high(value[3], fresh[i][3]);
            }
        }
    }

    __syncthreads();
    const float factor[2] = {1.0f / sum[0], 1.0f / sum[1]};
    const int own = first + warp * WARP_LINES;
    store_rows<D>(o, factor, shared + warp * WARP_LINES * D * 2, [&](int i) {
        return own + i < end ? out(own + i) : nullptr;
    });
    if (lse.base != nullptr && lane % 4 == 0) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int line = own + lane / 4 + 8 * half;
            if (line < end) *lse(line) = max[half] * LN2 + logf(sum[half]);
        }
    }
}
