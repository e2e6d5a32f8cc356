// Gradient of attention, without atomics: by query block for dq, by key block for dk and dv. Both
// recompute the probabilities from the log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691):
//
//   p = exp(scale q.k - lse)   ds = p (dout.v - delta)   delta = dout.out
//   dq = scale ds k            dk = scale ds^T q         dv = p^T dout
//
// The second computation of the scores (two of seven products) buys that no two blocks write the same
// place, so that sums have one order: dq over the keys by position; dk and dv over the lines of the own
// segment and then of the segments that have it as their prefix, in the order of the segments.
//
// In the second kernel scores are computed transposed, keys as rows: p^T and ds^T then are fragments
// of A for the products that follow and never pass through shared memory, as in the first.
#include "attention.cuh"
#include "common.cuh"

namespace {

// Lines of a tile in the kernel for dk and dv: both gradients are in registers, so tiles are small.
constexpr int READ_LINES = 32;

struct Backward {
    const Segment* segments;
    const bf16* qkv;
    const bf16* dout;
    const float* lse;
    const float* delta;
    bf16* dqkv;
    int32_t count, q_heads, kv_heads;
    float scale;

    __device__ int group() const { return q_heads / kv_heads; }
    template <int D>
    __device__ int64_t width() const {
        return static_cast<int64_t>(q_heads + 2 * kv_heads) * D;
    }
    // The lines from packed row `row` on, of the heads of a key/value head.
    template <int D, class T>
    __device__ Lines<T> queries(T* base, uint32_t row, int kv_head) const {
        return {base + row * width<D>() + kv_head * group() * D, width<D>(), group(), D};
    }
    template <int D>
    __device__ Lines<const bf16> douts(uint32_t row, int kv_head) const {
        const int64_t outputs = static_cast<int64_t>(q_heads) * D;
        return {dout + row * outputs + kv_head * group() * D, outputs, group(), D};
    }
    __device__ Lines<const float> by_line(const float* base, uint32_t row, int kv_head) const {
        return {base + static_cast<int64_t>(row) * q_heads + kv_head * group(), q_heads, group(), 1};
    }
};

template <int D>
__device__ __forceinline__ void query_gradient(const Backward& call) {
    extern __shared__ __align__(128) char memory[];
    const Segment segment = call.segments[blockIdx.z];
    const int group = call.group();
    const int end = segment.len * group, position = segment.prefix_len;
    const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * LINES;
    if (first >= end) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int own = first + warp * WARP_LINES, kv_head = blockIdx.y;
    const Lines<const bf16> q = call.queries<D>(call.qkv, segment.start, kv_head);
    const Lines<const bf16> dout = call.douts<D>(segment.start, kv_head);
    const Lines<const float> lses = call.by_line(call.lse, segment.start, kv_head);
    const Lines<const float> deltas = call.by_line(call.delta, segment.start, kv_head);
    const bf16* k = call.qkv + (call.q_heads + kv_head) * D;
    const int v_offset = call.kv_heads * D;
    const int context = position + (min(first + LINES, end) - 1) / group + 1;
    const int tiles = (context + KEYS - 1) / KEYS;

    // Two stages of a tile's keys and values; queries and output gradients pass through the second.
    const uint32_t shared = shared_address(memory);
    auto load = [&](int tile) {
        const uint32_t stage = shared + tile % 2 * 2 * TILE_BYTES<D>;
        auto key = [&](int i) {
            const uint32_t at = tile * KEYS + i;
            const uint32_t row = at + (at < segment.prefix_len ? segment.prefix_start
                                                               : segment.start - segment.prefix_len);
            return Source{k + row * call.width<D>(), static_cast<int>(at) < context};
        };
        load_tile<D, KEYS, 32 * WARPS>(stage, key);
        load_tile<D, KEYS, 32 * WARPS>(stage + TILE_BYTES<D>, [&](int i) {
            const Source from = key(i);
            return Source{from.at + v_offset, from.there};
        });
    };
    const uint32_t second = shared + 2 * TILE_BYTES<D>;
    load_tile<D, LINES, 32 * WARPS>(second, [&](int i) { return Source{q(first + i), first + i < end}; });
    load_tile<D, LINES, 32 * WARPS>(second + TILE_BYTES<D>,
                                    [&](int i) { return Source{dout(first + i), first + i < end}; });
    load(0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t queries[D / 16][4], douts[D / 16][4];
    load_fragments<D>(queries, second, warp * WARP_LINES);
    load_fragments<D>(douts, second + TILE_BYTES<D>, warp * WARP_LINES);

    const float scale_log2 = call.scale * LOG2E;
    int sight[2];
    float lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int line = own + lane / 4 + 8 * half;
        sight[half] = position + line / group + 1;
        lse[half] = line < end ? *lses(line) * LOG2E : INFINITY;
        delta[half] = line < end ? *deltas(line) : 0.0f;
    }
    float dq[D / 8][4] = {};
    for (int tile = 0; tile < tiles; tile++) {
        cp_async_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles) load(tile + 1);
        cp_async_commit();
        const uint32_t keys = shared + tile % 2 * 2 * TILE_BYTES<D>;
        const uint32_t values = keys + TILE_BYTES<D>;
        // Half of the keys at a time, for want of registers.
#pragma unroll 1
        for (int slab = 0; slab < KEYS; slab += 32) {
            float s[4][4] = {}, dp[4][4] = {};
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    uint32_t b[4];
                    load_b<D>(b, keys, slab + 16 * n, 16 * step);
                    mma(s[2 * n], queries[step], b[0], b[1]);
                    mma(s[2 * n + 1], queries[step], b[2], b[3]);
                    load_b<D>(b, values, slab + 16 * n, 16 * step);
                    mma(dp[2 * n], douts[step], b[0], b[1]);
                    mma(dp[2 * n + 1], douts[step], b[2], b[3]);
                }
            }
            uint32_t ds[2][4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float gradient[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int key = tile * KEYS + slab + 8 * n + lane % 4 * 2 + i;
                        const float p = exp2_approx(s[n][2 * half + i] * scale_log2 - lse[half]);
                        gradient[i] = key < sight[half] ? p * (dp[n][2 * half + i] - delta[half]) : 0.0f;
                    }
                    ds[n / 2][n % 2 * 2 + half] = pack_bf16(gradient[0], gradient[1]);
                }
            }
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    uint32_t b[4];
                    load_b_trans<D>(b, keys, slab + 16 * step, 16 * n);
                    mma(dq[2 * n], ds[step], b[0], b[1]);
                    mma(dq[2 * n + 1], ds[step], b[2], b[3]);
                }
            }
        }
    }
    __syncthreads();
    const float factor[2] = {call.scale, call.scale};
    const Lines<bf16> to = call.queries<D>(call.dqkv, segment.start, kv_head);
    store_rows<D>(dq, factor, shared + warp * WARP_LINES * D * 2,
                  [&](int i) { return own + i < end ? to(own + i) : nullptr; });
}

// The tiles of lines that read a block of keys, in their fixed order.
struct Readers {
    const Segment* segments;
    int count, group;
    // The block's segment and its first key there.
    uint32_t owner, first_key;
    int next;  // the segment to look at next
    // Lines `line .. end` from packed row `row` on are left of the current reader. Its row r sees keys up
    // to r of the block where it is the owner itself, else the first `keys`.
    uint32_t row;
    int line, end, keys;
    bool causal, done;

    __device__ Readers(const Segment* segments, int count, int group, Segment owner, uint32_t first_key)
        : segments(segments), count(count), group(group), owner(owner.start), first_key(first_key),
          // Only a segment without a prefix can be one.
          next(owner.prefix_len == 0 ? 0 : count), row(owner.start + first_key), line(0),
          end((owner.len - first_key) * group), keys(0), causal(true), done(false) {}

    __device__ void advance() {
        line += READ_LINES;
        if (line < end) return;
        for (; next < count; next++) {
            const Segment user = segments[next];
            if (user.len == 0 || user.prefix_start != owner || user.prefix_len <= first_key) continue;
            row = user.start;
            line = 0;
            end = user.len * group;
            keys = user.prefix_len - first_key;
            causal = false;
            next++;
            return;
        }
        done = true;
    }
};

// What a tile of lines needs beside queries and output gradients.
struct LineFigures {
    float lse[READ_LINES];  // times log2(e)
    float delta[READ_LINES];
    int sight[READ_LINES];
};

template <int D>
__device__ __forceinline__ void key_gradient(const Backward& call) {
    extern __shared__ __align__(128) char memory[];
    __shared__ LineFigures figures[2];
    const Segment segment = call.segments[blockIdx.z];
    const uint32_t first_key = blockIdx.x * KEYS;
    if (first_key >= segment.len) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int kv_head = blockIdx.y;
    const int count = min(static_cast<uint32_t>(KEYS), segment.len - first_key);
    const int64_t width = call.width<D>();
    const int64_t block_at = (segment.start + first_key) * width + (call.q_heads + kv_head) * D;
    const int v_offset = call.kv_heads * D;

    constexpr uint32_t READ_BYTES = READ_LINES * D * 2;
    const uint32_t keys = shared_address(memory), values = keys + TILE_BYTES<D>;
    const uint32_t stages = values + TILE_BYTES<D>;
    const bf16* k = call.qkv + block_at;
    load_tile<D, KEYS, 32 * WARPS>(keys, [&](int i) { return Source{k + i * width, i < count}; });
    load_tile<D, KEYS, 32 * WARPS>(values,
                                   [&](int i) { return Source{k + v_offset + i * width, i < count}; });

    // The first warp holds a line's figures in registers until the tile before is done.
    float lse = 0.0f, delta = 0.0f;
    int sight = 0;
    auto load = [&](const Readers& reader, int stage) {
        const uint32_t tile = stages + stage * 2 * READ_BYTES;
        const Lines<const bf16> q = call.queries<D>(call.qkv, reader.row, kv_head);
        const Lines<const bf16> dout = call.douts<D>(reader.row, kv_head);
        load_tile<D, READ_LINES, 32 * WARPS>(tile, [&](int i) {
            return Source{q(reader.line + i), reader.line + i < reader.end};
        });
        load_tile<D, READ_LINES, 32 * WARPS>(tile + READ_BYTES, [&](int i) {
            return Source{dout(reader.line + i), reader.line + i < reader.end};
        });
        cp_async_commit();
        if (warp == 0) {
            const int line = reader.line + lane;
            const bool there = line < reader.end;
            // exp(-inf) keeps lines that are not there out of every sum.
            lse = there ? *call.by_line(call.lse, reader.row, kv_head)(line) * LOG2E : INFINITY;
            delta = there ? *call.by_line(call.delta, reader.row, kv_head)(line) : 0.0f;
            sight = reader.causal ? line / reader.group + 1 : reader.keys;
        }
    };
    auto keep_figures = [&](int stage) {
        if (warp == 0) {
            figures[stage].lse[lane] = lse;
            figures[stage].delta[lane] = delta;
            figures[stage].sight[lane] = sight;
        }
    };

    const float scale_log2 = call.scale * LOG2E;
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    Readers reader(call.segments, call.count, call.group(), segment, first_key);
    load(reader, 0);
    keep_figures(0);
    for (int stage = 0; !reader.done; stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        reader.advance();
        if (!reader.done) load(reader, stage ^ 1);
        const uint32_t q = stages + stage * 2 * READ_BYTES, dout = q + READ_BYTES;

        float s[4][4] = {}, dp[4][4] = {};
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            uint32_t a[4], b[4];
            load_a<D>(a, keys, warp * 16, 16 * step);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                load_b<D>(b, q, 16 * n, 16 * step);
                mma(s[2 * n], a, b[0], b[1]);
                mma(s[2 * n + 1], a, b[2], b[3]);
            }
            load_a<D>(a, values, warp * 16, 16 * step);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                load_b<D>(b, dout, 16 * n, 16 * step);
                mma(dp[2 * n], a, b[0], b[1]);
                mma(dp[2 * n + 1], a, b[2], b[3]);
            }
        }
        uint32_t p[2][4], ds[2][4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int column = 8 * n + lane % 4 * 2;
            const float2 lses = *reinterpret_cast<const float2*>(figures[stage].lse + column);
            const float2 deltas = *reinterpret_cast<const float2*>(figures[stage].delta + column);
            const int2 sights = *reinterpret_cast<const int2*>(figures[stage].sight + column);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int key = warp * 16 + lane / 4 + 8 * half;
                const float low = exp2_approx(s[n][2 * half] * scale_log2 - lses.x);
                const float high = exp2_approx(s[n][2 * half + 1] * scale_log2 - lses.y);
                const float p_low = key < sights.x ? low : 0.0f, p_high = key < sights.y ? high : 0.0f;
                p[n / 2][n % 2 * 2 + half] = pack_bf16(p_low, p_high);
                ds[n / 2][n % 2 * 2 + half] = pack_bf16(p_low * (dp[n][2 * half] - deltas.x),
                                                        p_high * (dp[n][2 * half + 1] - deltas.y));
            }
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
#pragma unroll
            for (int step = 0; step < 2; step++) {
                uint32_t b[4];
                load_b_trans<D>(b, dout, 16 * step, 16 * n);
                mma(dv[2 * n], p[step], b[0], b[1]);
                mma(dv[2 * n + 1], p[step], b[2], b[3]);
                load_b_trans<D>(b, q, 16 * step, 16 * n);
                mma(dk[2 * n], ds[step], b[0], b[1]);
                mma(dk[2 * n + 1], ds[step], b[2], b[3]);
            }
        }
        if (!reader.done) keep_figures(stage ^ 1);
    }

    // A warp alone reads its rows of the keys and values, which make room for the results.
    __syncwarp();
    const float one[2] = {1.0f, 1.0f}, factor[2] = {call.scale, call.scale};
    bf16* to = call.dqkv + block_at;
    auto row = [&](int i) { return warp * 16 + i < count ? to + (warp * 16 + i) * width : nullptr; };
    store_rows<D>(dk, factor, keys + warp * 16 * D * 2, row);
    store_rows<D>(dv, one, values + warp * 16 * D * 2, [&](int i) {
        bf16* at = row(i);
        return at == nullptr ? at : at + v_offset;
    });
}

}  // namespace

// delta[i] = dout[i] . out[i] over `lines` runs of `head_dim` elements, `lanes` = head_dim / 8 lanes each.
extern "C" __global__ void __launch_bounds__(256)
    attention_delta(int64_t lines, int lanes, const bf16* out, const bf16* dout, float* delta) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const bool there = at / lanes < lines;
    const Float8 x = there ? widen(load8(out + 8 * at)) : Float8{};
    const Float8 y = there ? widen(load8(dout + 8 * at)) : Float8{};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(x.at[i], y.at[i], sum);
    sum = group_sum(sum, lanes);
    if (there && at % lanes == 0) delta[at / lanes] = sum;
}

// Grid: (tiles of the longest segment, kv_heads, segments).
extern "C" __global__ void __launch_bounds__(128) attention_dq_64(const __grid_constant__ Backward call) {
    query_gradient<64>(call);
}

extern "C" __global__ void __launch_bounds__(128) attention_dq_128(const __grid_constant__ Backward call) {
    query_gradient<128>(call);
}

// Grid: (tiles of keys of the longest segment, kv_heads, segments).
extern "C" __global__ void __launch_bounds__(128) attention_dkv_64(const __grid_constant__ Backward call) {
    key_gradient<64>(call);
}

extern "C" __global__ void __launch_bounds__(128) attention_dkv_128(const __grid_constant__ Backward call) {
    key_gradient<128>(call);
}
