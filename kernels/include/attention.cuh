// What the attention kernels share: lines, tiles, and the canonical reduction.
//
// A *line* is one query head of one query row. All query heads that read one key/value head are
// lines of one tile, row by row, so that a key is loaded once for the whole group and a lone row in
// decode still fills the 16 lines of an mma: line / group is the row, line % group the head.
//
// The canonical reduction, the same on every path: keys in *chunks* of CHUNK_KEYS from position 0. One warp
// reduces a chunk from a fresh state (maximum, sum, weighted values), a *tile* of KEYS after the other, each
// time the maximum rises rescaling what is there (online softmax, Milakov and Gimelshein 2018, arXiv
// 1805.02867). The first chunk's state is taken as it is, the others are merged to it left to right by
// `Merge`. A line's bits depend on its query and its keys alone: the products of a tile are one sequence of
// mma steps over the inner dimension, in which keys out of sight count for exact zeros, and a line is a row
// of the mma, independent of the other 15.
//
// Why 256 keys: in decode a chunk is what one warp does, and its state what it writes to memory and another
// warp reads again, 2 x 4 (D + 2) bytes for each query head of the group, beside 2 x 2 D bytes for each key. With
// seven query heads to a key/value head that adds 22 % to the bytes of chunks of 64 keys, 11 % with 128, 6 %
// with 256. Against longer ones speaks parallelism: a context of up to 256 keys already has one warp for each
// key/value head, so that 32 sequences with two of them are 64 warps. A tile is what fits the registers, and a
// page of the cache.
//
// Exponents are of base 2, with scale * log2(e) multiplied into the scores.
#pragma once

#include "mma.cuh"

constexpr int KEYS = 64;
constexpr int CHUNK_TILES = 4;
constexpr int CHUNK_KEYS = CHUNK_TILES * KEYS;
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

// A row of a tile to come; zeros if it is not there, whatever the address.
struct Source {
    const bf16* at;
    bool there;
};

// Starts copying ROWS rows of D values into a tile; `row` gives a row's source. Not all copies of a lone
// warp at once: the compiler would hold their addresses in registers from tile to tile.
template <int D, int ROWS, int THREADS, class Row>
__device__ __forceinline__ void load_tile(uint32_t tile, Row row) {
    constexpr int CHUNKS = D / CHUNK, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "every thread copies as much");
    const int first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
#pragma unroll 4
    for (int i = first; i < first + ROWS; i += STEP) {
        const Source from = row(i);
        cp_async_16(tile + chunk_offset<D>(i, chunk), from.at + chunk * CHUNK, from.there);
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

// The state of the warp's 16 lines: what this thread holds of lines lane / 4 and lane / 4 + 8.
template <int D>
struct State {
    float values[D / 8][4] = {};
    float max[2] = {-INFINITY, -INFINITY};
    // Of the keys that this thread holds; `add_lanes` makes it the lines'.
    float sum[2] = {};

    __device__ __forceinline__ void add_lanes() {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 1);
            sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 2);
        }
    }
};

// What a tile's keys count for in a state, and what this leaves of the keys before.
struct Weights {
    // exp2(score - max) as fragments of A, by 16 keys.
    uint32_t p[KEYS / 16][4];
    float old[2];
};

// Takes a tile into the maximum and sum of a state. The two lines see its first `sight` keys; none if that
// is not positive, which changes no bit of the state.
template <int D>
__device__ __forceinline__ Weights weigh(State<D>& state, const uint32_t (&q)[D / 16][4], uint32_t keys,
                                         float scale_log2, const int (&sight)[2]) {
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
    Weights weights;
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (sight[half] < KEYS) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (8 * n + column + i >= sight[half]) s[n][2 * half + i] = -INFINITY;
                }
            }
        }
        float max = -INFINITY;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = s[n][2 * half + i];
                score = __fmul_rn(score, scale_log2);
                max = fmaxf(max, score);
            }
        }
        max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
        max = fmaxf(max, state.max[half]);
        // A line that sees nothing yet has no maximum; -inf - -inf would be NaN.
        const float shift = max == -INFINITY ? 0.0f : max;
        weights.old[half] = sight[half] > 0 ? exp2_approx(__fsub_rn(state.max[half], shift)) : 1.0f;
        float sum = __fmul_rn(state.sum[half], weights.old[half]);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = s[n][2 * half + i];
                score = exp2_approx(__fsub_rn(score, shift));
                sum = __fadd_rn(sum, score);
            }
        }
        state.max[half] = max;
        state.sum[half] = sum;
    }
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        weights.p[k][0] = pack_bf16(s[2 * k][0], s[2 * k][1]);
        weights.p[k][1] = pack_bf16(s[2 * k][2], s[2 * k][3]);
        weights.p[k][2] = pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]);
        weights.p[k][3] = pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3]);
    }
    return weights;
}

// Takes the tile's values into the weighted values of a state.
template <int D>
__device__ __forceinline__ void add_values(State<D>& state, const Weights& weights, uint32_t values) {
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float(&value)[4] = state.values[2 * n + i];
#pragma unroll
            for (int e = 0; e < 4; e++) value[e] = __fmul_rn(value[e], weights.old[e / 2]);
        }
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            uint32_t b[4];
            load_b_trans<D>(b, values, 16 * k, 16 * n);
            mma(state.values[2 * n], weights.p[k], b[0], b[1]);
            mma(state.values[2 * n + 1], weights.p[k], b[2], b[3]);
        }
    }
}

// Merges the state of a chunk into that of the chunks before: value = value * old + chunk * now.
struct Merge {
    float old, now;

    // `visible`: whether the line sees anything of the chunk.
    __device__ Merge(float& max, float& sum, float chunk_max, float chunk_sum, bool visible) {
        const float both = fmaxf(max, chunk_max);
        old = visible ? exp2_approx(__fsub_rn(max, both)) : 1.0f;
        now = visible ? exp2_approx(__fsub_rn(chunk_max, both)) : 0.0f;
        max = both;
        sum = (*this)(sum, chunk_sum);
    }

    __device__ float operator()(float value, float chunk) const {
        return fmaf(chunk, now, __fmul_rn(value, old));
    }
};

// One block's tile of lines over all the keys in their sight: fills `out`, and `lse` if it is not null.
//
// `keys(tile, i)` gives the row of a tile's key in `k` and `v`, or a negative number; `keys.prefetch(tile)` is told of the tile
// that is asked for next. While a tile is at work the next one's keys and then its values are copied, two
// stages of each; the queries pass through what becomes the second stage of the keys.
template <int D, class Keys>
__device__ __forceinline__ void forward_tile(uint32_t shared, Keys keys, const bf16* k, const bf16* v,
                                             int stride, Lines<const bf16> q, Lines<bf16> out,
                                             Lines<float> lse, int position, int first, int end,
                                             float scale_log2) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t key_tiles = shared, value_tiles = shared + 2 * TILE_BYTES<D>;
    // Keys in sight of all lines, of the last line.
    const int context = position + (min(first + LINES, end) - 1) / q.group + 1;
    const int tiles = (context + KEYS - 1) / KEYS;
    int sight[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int line = first + warp * WARP_LINES + lane / 4 + 8 * half;
        sight[half] = position + line / q.group + 1;
    }
    auto load = [&](const bf16* from, uint32_t stages, int tile) {
        if (tile < tiles) {
            load_tile<D, KEYS, 32 * WARPS>(stages + tile % 2 * TILE_BYTES<D>, [&](int i) {
                const int row = tile * KEYS + i < context ? keys(tile, i) : -1;
                return Source{from + static_cast<int64_t>(row) * stride, row >= 0};
            });
        }
        cp_async_commit();
    };

    keys.prefetch(0);
    load_tile<D, LINES, 32 * WARPS>(key_tiles + TILE_BYTES<D>, [&](int i) {
        return Source{q(first + i), first + i < end};
    });
    load(k, key_tiles, 0);
    load(v, value_tiles, 0);
    if (tiles > 1) keys.prefetch(1);
    cp_async_wait<1>();
    __syncthreads();
    uint32_t queries[D / 16][4];
    load_fragments<D>(queries, key_tiles + TILE_BYTES<D>, warp * WARP_LINES);

    State<D> all;
    for (int from = 0; from < tiles; from += CHUNK_TILES) {
        State<D> chunk;
        const int to = min(from + CHUNK_TILES, tiles);
        for (int tile = from; tile < to; tile++) {
            const uint32_t stage = tile % 2 * TILE_BYTES<D>;
            cp_async_wait<1>();
            __syncthreads();
            load(k, key_tiles, tile + 1);
            const int here[2] = {sight[0] - tile * KEYS, sight[1] - tile * KEYS};
            const Weights weights = weigh<D>(chunk, queries, key_tiles + stage, scale_log2, here);
            cp_async_wait<1>();
            __syncthreads();
            load(v, value_tiles, tile + 1);
            if (tile + 2 < tiles) keys.prefetch(tile + 2);
            add_values<D>(chunk, weights, value_tiles + stage);
        }
        chunk.add_lanes();
        if (from == 0) {
            all = chunk;
            continue;
        }
        const Merge low(all.max[0], all.sum[0], chunk.max[0], chunk.sum[0], sight[0] > from * KEYS);
        const Merge high(all.max[1], all.sum[1], chunk.max[1], chunk.sum[1], sight[1] > from * KEYS);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float(&value)[4] = all.values[n];
            value[0] = low(value[0], chunk.values[n][0]);
            value[1] = low(value[1], chunk.values[n][1]);
            value[2] = high(value[2], chunk.values[n][2]);
            value[3] = high(value[3], chunk.values[n][3]);
        }
    }

    __syncthreads();
    const float factor[2] = {1.0f / all.sum[0], 1.0f / all.sum[1]};
    const int own = first + warp * WARP_LINES;
    store_rows<D>(all.values, factor, shared + warp * WARP_LINES * D * 2, [&](int i) {
        return own + i < end ? out(own + i) : nullptr;
    });
    if (lse.base != nullptr && lane % 4 == 0) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int line = own + lane / 4 + 8 * half;
            if (line < end) *lse(line) = all.max[half] * LN2 + logf(all.sum[half]);
        }
    }
}
