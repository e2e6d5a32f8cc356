// Attention over a paged key/value cache, for prefill and decode, in the bits of the training forward
// pass, and the copy of keys and values into the cache.
//
// prefill   Sequences with several query rows: `forward_tile`, with a chunk's rows found by its page.
//           A page holds exactly one chunk.
// decode    Sequences with one query row, which has far too few lines to fill a GPU: every chunk of
//           keys is reduced by a warp of its own (the lines are the query heads of the group) and its
//           state goes to memory; `merge` then merges each head's states left to right. All bytes of
//           a chunk are under way before any is used. Keys and values are read once for the group.
//
// What a launch does is decided by the sequences in device memory; the grid follows from upper bounds,
// and blocks without work leave at once. So a captured graph serves every step within the bounds. A
// sequence that breaks a bound takes no part and is noted, as is a page outside of the cache.
#include "attention.cuh"
#include "common.cuh"

namespace {

// One sequence of a paged call, as in the Rust `PagedSequence`.
struct alignas(16) PagedSequence {
    uint32_t q_start, q_len, context, first_page;
};

// What the kernels of a paged call share; mirrored in src/cuda/attention.rs.
struct Paged {
    const PagedSequence* sequences;
    const uint32_t* pages;
    const bf16* qkv;
    const bf16* k_cache;
    const bf16* v_cache;
    bf16* out;
    // Chunk states [sequence][q_heads][max_chunks] of one-row sequences: weighted values, and maximum
    // and sum.
    float* values;
    float2* sums;
    uint32_t rows, max_q_len, max_context, page_count, cache_pages;
    int32_t q_heads, kv_heads;
    float scale_log2;
    Fault bad_q_len, bad_context, bad_q_start, bad_first_page, bad_page;

    __device__ int max_chunks() const { return (max_context + KEYS - 1) / KEYS; }

    // Places at which a run of `length` can start among `count`.
    __device__ static uint32_t starts(uint32_t count, uint64_t length) {
        return length <= count ? count - length + 1 : 0;
    }

    // Whether a sequence keeps within the bounds and has queries.
    __device__ bool takes_part(int index, const PagedSequence& s) const {
        if (s.q_len == 0) return false;
        // Unsigned of 64 bits: nothing here can wrap.
        const uint64_t pages = (static_cast<uint64_t>(s.context) + KEYS - 1) / KEYS;
        const bool context = s.context <= max_context;
        const bool q_len = s.q_len <= max_q_len && s.q_len <= s.context;
        const bool q_start = static_cast<uint64_t>(s.q_start) + s.q_len <= rows;
        const bool first_page = s.first_page + pages <= page_count;
        if (context && q_len && q_start && first_page) return true;
        if (threadIdx.x == 0) {
            if (!context) dust_fault(bad_context, index, s.context, max_context + 1);
            if (!q_len) dust_fault(bad_q_len, index, s.q_len, min(max_q_len, s.context) + 1);
            if (!q_start) dust_fault(bad_q_start, index, s.q_start, starts(rows, s.q_len));
            if (!first_page) dust_fault(bad_first_page, index, s.first_page, starts(page_count, pages));
        }
        return false;
    }
};

// Rows of the cache by chunk and place.
struct PagedKeys {
    const Paged& call;
    uint32_t first_page;
    int64_t row = -1;

    __device__ PagedKeys(const Paged& call, uint32_t first_page) : call(call), first_page(first_page) {}

    __device__ void prefetch(int chunk) {
        const uint32_t page = call.pages[first_page + chunk];
        row = static_cast<int64_t>(page) * KEYS;
        if (page >= call.cache_pages) {
            row = -1;
            if (threadIdx.x == 0) dust_fault(call.bad_page, first_page + chunk, page, call.cache_pages);
        }
    }
    __device__ int64_t operator()(int, int i) const { return row < 0 ? -1 : row + i; }
};

template <int D>
__device__ __forceinline__ void prefill(const Paged& call) {
    extern __shared__ __align__(128) char memory[];
    const PagedSequence s = call.sequences[blockIdx.z];
    if (s.q_len == 1 || !call.takes_part(blockIdx.z, s)) return;
    const int group = call.q_heads / call.kv_heads;
    const int end = s.q_len * group;
    const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * LINES;
    if (first >= end) return;
    const int64_t width = static_cast<int64_t>(call.q_heads + 2 * call.kv_heads) * D;
    const int64_t outputs = static_cast<int64_t>(call.q_heads) * D;
    const int head = blockIdx.y * group;
    const Lines<const bf16> q{call.qkv + s.q_start * width + head * D, width, group, D};
    const Lines<bf16> o{call.out + s.q_start * outputs + head * D, outputs, group, D};
    const int kv = blockIdx.y * D;
    forward_tile<D>(shared_address(memory), PagedKeys(call, s.first_page), call.k_cache + kv,
                    call.v_cache + kv, call.kv_heads * D, q, o, Lines<float>{}, s.context - s.q_len,
                    first, end, call.scale_log2);
}

template <int D>
__device__ __forceinline__ void decode(const Paged& call) {
    extern __shared__ __align__(128) char memory[];
    const PagedSequence s = call.sequences[blockIdx.z];
    const int chunk = blockIdx.x, lane = threadIdx.x;
    if (s.q_len != 1 && s.q_len <= call.max_q_len) return;
    if (!call.takes_part(blockIdx.z, s) || chunk * KEYS >= static_cast<int>(s.context)) return;
    const int group = call.q_heads / call.kv_heads;
    const int tiles = (group + WARP_LINES - 1) / WARP_LINES;
    const int kv_head = blockIdx.y / tiles;
    const int first = blockIdx.y % tiles * WARP_LINES;  // head of the group
    const int head = kv_head * group + first;
    const int heads = min(WARP_LINES, group - first);
    const int count = min(KEYS, static_cast<int>(s.context) - chunk * KEYS);

    const uint32_t keys = shared_address(memory);
    const uint32_t values = keys + TILE_BYTES<D>, queries = values + TILE_BYTES<D>;
    const bf16* q = call.qkv + s.q_start * static_cast<int64_t>(call.q_heads + 2 * call.kv_heads) * D;
    load_tile<D, WARP_LINES, 32>(queries, [&](int i) { return i < heads ? q + (head + i) * D : nullptr; });
    PagedKeys rows(call, s.first_page);
    rows.prefetch(chunk);
    const int64_t stride = call.kv_heads * D;
    auto load = [&](const bf16* cache, uint32_t tile) {
        load_tile<D, KEYS, 32>(tile, [&](int i) {
            const int64_t row = i < count ? rows(chunk, i) : -1;
            return row < 0 ? nullptr : cache + row * stride + kv_head * D;
        });
        cp_async_commit();
    };
    load(call.k_cache, keys);
    load(call.v_cache, values);

    cp_async_wait<1>();
    __syncwarp();
    uint32_t fragments[D / 16][4];
    load_fragments<D>(fragments, queries, 0);
    ChunkState state;
    const int sight[2] = {count, count};
    reduce_chunk<D>(state, fragments, keys, call.scale_log2, sight);
    cp_async_wait<0>();
    __syncwarp();
    auto index = [&](int line) {
        return (static_cast<int64_t>(blockIdx.z) * call.q_heads + head + line) * call.max_chunks() + chunk;
    };
    const int low = lane / 4, high = low + 8;
    float* to_low = call.values + index(low) * D + lane % 4 * 2;
    float* to_high = call.values + index(high) * D + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        float fresh[2][4] = {};
        weighted_values<D>(fresh, state, values, n);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int column = 16 * n + 8 * i;
            if (low < heads)
                *reinterpret_cast<float2*>(to_low + column) = make_float2(fresh[i][0], fresh[i][1]);
            if (high < heads)
                *reinterpret_cast<float2*>(to_high + column) = make_float2(fresh[i][2], fresh[i][3]);
        }
    }
    if (lane % 4 == 0) {
        if (low < heads) call.sums[index(low)] = make_float2(state.max[0], state.sum[0]);
        if (high < heads) call.sums[index(high)] = make_float2(state.max[1], state.sum[1]);
    }
}

// A warp merges the chunk states of one head; a lane holds two neighbouring elements of every 64.
template <int D>
__device__ __forceinline__ void merge(const Paged& call) {
    constexpr int HELD = D / WARP;
    const int head = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (head >= call.q_heads) return;
    const PagedSequence s = call.sequences[blockIdx.y];
    if (s.q_len != 1 || !call.takes_part(blockIdx.y, s)) return;
    const int chunks = (static_cast<int>(s.context) + KEYS - 1) / KEYS;
    const int64_t index = (static_cast<int64_t>(blockIdx.y) * call.q_heads + head) * call.max_chunks();
    const float2* sums = call.sums + index;
    const float* values = call.values + index * D + lane * 2;
    float value[HELD] = {};
    float max = -INFINITY, sum = 0.0f;
    float2 held = {};
    for (int chunk = 0; chunk < chunks; chunk++) {
        // A lane loads the maximum and sum of every 32nd chunk, for the warp.
        const int from = chunk % WARP;
        if (from == 0 && chunk + lane < chunks) held = sums[chunk + lane];
        const float chunk_max = __shfl_sync(0xffffffff, held.x, from);
        const float chunk_sum = __shfl_sync(0xffffffff, held.y, from);
        const Merge merge(max, sum, chunk_max, chunk_sum, true);
#pragma unroll
        for (int i = 0; i < HELD; i += 2) {
            const float2 fresh = *reinterpret_cast<const float2*>(values + chunk * D + i * WARP);
            value[i] = merge(value[i], fresh.x);
            value[i + 1] = merge(value[i + 1], fresh.y);
        }
    }
    const float factor = 1.0f / sum;
    bf16* out = call.out + (static_cast<int64_t>(s.q_start) * call.q_heads + head) * D + lane * 2;
#pragma unroll
    for (int i = 0; i < HELD; i += 2)
        *reinterpret_cast<uint32_t*>(out + i * WARP) =
            pack_bf16(scaled(value[i], factor), scaled(value[i + 1], factor));
}

}  // namespace

// Grid: (tiles of max_q_len rows, kv_heads, sequences).
extern "C" __global__ void __launch_bounds__(128) attention_prefill_64(const __grid_constant__ Paged call) {
    prefill<64>(call);
}

extern "C" __global__ void __launch_bounds__(128) attention_prefill_128(const __grid_constant__ Paged call) {
    prefill<128>(call);
}

// Grid: (chunks of max_context, kv_heads * tiles of the group, sequences).
extern "C" __global__ void __launch_bounds__(32) attention_decode_64(const __grid_constant__ Paged call) {
    decode<64>(call);
}

extern "C" __global__ void __launch_bounds__(32) attention_decode_128(const __grid_constant__ Paged call) {
    decode<128>(call);
}

// Grid: (q_heads / WARPS, sequences).
extern "C" __global__ void __launch_bounds__(128) attention_merge_64(const __grid_constant__ Paged call) {
    merge<64>(call);
}

extern "C" __global__ void __launch_bounds__(128) attention_merge_128(const __grid_constant__ Paged call) {
    merge<128>(call);
}

// Copies the keys and values of `rows` packed rows to their slots, 16 bytes a thread. `qkv` points at
// the first row's keys, which its values follow; `kv_chunks` is the width of either in 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
    cache_write(int rows, int kv_chunks, int row_chunks, uint32_t slot_count, const uint4* qkv,
                const uint32_t* slots, uint4* k_cache, uint4* v_cache, Fault bad_slot) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int row = at / (2 * kv_chunks), place = at % (2 * kv_chunks);
    if (row >= rows) return;
    const uint32_t slot = slots[row];
    if (slot >= slot_count) {
        if (place == 0) dust_fault(bad_slot, row, slot, slot_count);
        return;
    }
    uint4* cache = place < kv_chunks ? k_cache : v_cache;
    cache[static_cast<int64_t>(slot) * kv_chunks + place % kv_chunks] =
        qkv[static_cast<int64_t>(row) * row_chunks + place];
}
