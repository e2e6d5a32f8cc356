// Attention over a paged key/value cache, for prefill and decode, in the bits of the training forward
// pass, and the copy of keys and values into the cache.
//
// prefill   Sequences with several query rows: `forward_tile`, with a tile's rows found by its page.
//           A page holds exactly one tile.
// decode    Sequences with one query row, which has far too few lines to fill a GPU: every chunk of
//           keys is reduced by a warp of its own (the lines are the query heads of the group) and its
//           state goes to memory; `merge` then merges each head's states left to right. A sequence of
//           one chunk needs no merge. Keys and values are read once for the group, through a ring of
//           three tiles: while a warp works on one, two are under way, from the first tile to the last.
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
    // and sum. Those of a sequence of one chunk are left out.
    float* values;
    float2* sums;
    uint32_t rows, max_q_len, max_context, page_count, cache_pages;
    int32_t q_heads, kv_heads;
    float scale_log2;
    Fault bad_q_len, bad_context, bad_q_start, bad_first_page, bad_page;

    __device__ int max_chunks() const { return (max_context + CHUNK_KEYS - 1) / CHUNK_KEYS; }

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

// Rows of the cache by tile and place.
struct PagedKeys {
    const Paged& call;
    uint32_t first_page;
    // The first of the page; 31 bits count more rows than any memory holds.
    int row = NONE;
    static constexpr int NONE = INT32_MIN;

    __device__ PagedKeys(const Paged& call, uint32_t first_page) : call(call), first_page(first_page) {}

    __device__ void prefetch(int tile) {
        const uint32_t page = call.pages[first_page + tile];
        row = static_cast<int>(page * KEYS);
        if (page >= call.cache_pages) {
            row = NONE;
            if (threadIdx.x == 0) dust_fault(call.bad_page, first_page + tile, page, call.cache_pages);
        }
    }
    __device__ int operator()(int, int i) const { return row + i; }
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
    const int context = s.context;
    if (!call.takes_part(blockIdx.z, s) || chunk * CHUNK_KEYS >= context) return;
    const int group = call.q_heads / call.kv_heads;
    const int groups = (group + WARP_LINES - 1) / WARP_LINES;
    const int kv_head = blockIdx.y / groups;
    const int first = blockIdx.y % groups * WARP_LINES;  // head of the group
    const int head = kv_head * group + first;
    const int heads = min(WARP_LINES, group - first);
    const int count = min(CHUNK_KEYS, context - chunk * CHUNK_KEYS);
    const int tiles = (count + KEYS - 1) / KEYS;

    // A tile's keys lie in place 2 tile % 3 of the ring, its values in the next.
    const uint32_t ring = shared_address(memory), queries = ring + 3 * TILE_BYTES<D>;
    const bf16* q = call.qkv + s.q_start * static_cast<int64_t>(call.q_heads + 2 * call.kv_heads) * D;
    const bf16* keys = call.k_cache + kv_head * D;
    const bf16* values = call.v_cache + kv_head * D;
    const int stride = call.kv_heads * D;
    PagedKeys rows(call, s.first_page + chunk * CHUNK_TILES);
    auto place = [&](int turn) { return ring + turn % 3 * TILE_BYTES<D>; };
    auto load = [&](const bf16* cache, int tile, uint32_t to) {
        if (tile < tiles) {
            load_tile<D, KEYS, 32>(to, [&](int i) {
                const int row = tile * KEYS + i < count ? rows(tile, i) : -1;
                return Source{cache + static_cast<int64_t>(row) * stride, row >= 0};
            });
        }
        cp_async_commit();
    };
    load_tile<D, WARP_LINES, 32>(queries, [&](int i) { return Source{q + (head + i) * D, i < heads}; });
    rows.prefetch(0);
    load(keys, 0, place(0));
    load(values, 0, place(1));
    if (tiles > 1) rows.prefetch(1);
    cp_async_wait<1>();
    __syncwarp();
    uint32_t fragments[D / 16][4];
    load_fragments<D>(fragments, queries, 0);

    State<D> state;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        cp_async_wait<1>();
        __syncwarp();
        load(keys, tile + 1, place(2 * tile + 2));
        const int left = count - tile * KEYS;
        const int sight[2] = {left, left};
        const Weights weights = weigh<D>(state, fragments, place(2 * tile), call.scale_log2, sight);
        cp_async_wait<1>();
        __syncwarp();
        load(values, tile + 1, place(2 * tile + 3));
        if (tile + 2 < tiles) rows.prefetch(tile + 2);
        add_values<D>(state, weights, place(2 * tile + 1));
    }
    state.add_lanes();

    if (context <= CHUNK_KEYS) {
        __syncwarp();
        bf16* out = call.out + (static_cast<int64_t>(s.q_start) * call.q_heads + head) * D;
        const float factor[2] = {1.0f / state.sum[0], 1.0f / state.sum[1]};
        store_rows<D>(state.values, factor, ring,
                      [&](int i) { return i < heads ? out + i * D : nullptr; });
        return;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int line = lane / 4 + 8 * half;
        if (line >= heads) continue;
        const int64_t index =
            (static_cast<int64_t>(blockIdx.z) * call.q_heads + head + line) * call.max_chunks() + chunk;
        float* to = call.values + index * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float(&value)[4] = state.values[n];
            *reinterpret_cast<float2*>(to + 8 * n) = make_float2(value[2 * half], value[2 * half + 1]);
        }
        if (lane % 4 == 0) call.sums[index] = make_float2(state.max[half], state.sum[half]);
    }
}

// A warp merges the chunk states of one head; a lane holds two neighbouring elements of every 64.
template <int D>
__device__ __forceinline__ void merge(const Paged& call) {
    constexpr int HELD = D / WARP;
    const int head = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (head >= call.q_heads) return;
    const PagedSequence s = call.sequences[blockIdx.y];
    if (s.q_len != 1 || s.context <= CHUNK_KEYS || !call.takes_part(blockIdx.y, s)) return;
    const int chunks = (static_cast<int>(s.context) + CHUNK_KEYS - 1) / CHUNK_KEYS;
    const int64_t index = (static_cast<int64_t>(blockIdx.y) * call.q_heads + head) * call.max_chunks();
    const float2* sums = call.sums + index;
    const float* values = call.values + index * D + lane * 2;
    float value[HELD];
    float max, sum;
    float2 held = {};
    for (int chunk = 0; chunk < chunks; chunk++) {
        // A lane loads the maximum and sum of every 32nd chunk, for the warp.
        const int from = chunk % WARP;
        if (from == 0 && chunk + lane < chunks) held = sums[chunk + lane];
        const float chunk_max = __shfl_sync(0xffffffff, held.x, from);
        const float chunk_sum = __shfl_sync(0xffffffff, held.y, from);
        float fresh[HELD];
#pragma unroll
        for (int i = 0; i < HELD; i += 2) {
            const float2 pair = *reinterpret_cast<const float2*>(values + chunk * D + i * WARP);
            fresh[i] = pair.x;
            fresh[i + 1] = pair.y;
        }
        if (chunk == 0) {
            max = chunk_max;
            sum = chunk_sum;
#pragma unroll
            for (int i = 0; i < HELD; i++) value[i] = fresh[i];
            continue;
        }
        const Merge merge(max, sum, chunk_max, chunk_sum, true);
#pragma unroll
        for (int i = 0; i < HELD; i++) value[i] = merge(value[i], fresh[i]);
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
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_prefill_64(const __grid_constant__ Paged call) {
    prefill<64>(call);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_prefill_128(const __grid_constant__ Paged call) {
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
