// Causal grouped-query attention over packed sequences, forward: out = softmax(scale q k^T) v, and each
// line's log-sum-exp. The scores are never stored (FlashAttention, Dao et al. 2022, arXiv 2205.14135;
// tiles and loops as in FlashAttention-2, arXiv 2307.08691).
//
// A block owns LINES lines of one segment and one key/value head, and goes through the keys of the
// segment's prefix and of the segment itself, which form one sequence of positions. The prefix is not
// copied for its users. Tiles with the most keys are started first.
//
// Unlike FlashAttention every chunk of 256 keys is reduced from a fresh state and then merged: decode,
// which reduces chunks in parallel, gives the same bits. The price is a second set of weighted values
// and two operations on each of them a chunk.
#include "attention.cuh"

namespace {

// Rows of a segment's keys by position.
struct PackedKeys {
    Segment segment;

    __device__ void prefetch(int) {}
    __device__ int operator()(int tile, int i) const {
        const uint32_t position = tile * KEYS + i;
        return position + (position < segment.prefix_len ? segment.prefix_start
                                                         : segment.start - segment.prefix_len);
    }
};

template <int D>
__device__ __forceinline__ void forward(const Segment* segments, const bf16* qkv, bf16* out, float* lse,
                                        int q_heads, int kv_heads, float scale_log2) {
    extern __shared__ __align__(128) char memory[];
    const Segment segment = segments[blockIdx.z];
    const int group = q_heads / kv_heads;
    const int end = segment.len * group;
    const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * LINES;
    if (first >= end) return;
    const int64_t width = static_cast<int64_t>(q_heads + 2 * kv_heads) * D;
    const int64_t outputs = static_cast<int64_t>(q_heads) * D;
    const int head = blockIdx.y * group;
    const Lines<const bf16> q{qkv + segment.start * width + head * D, width, group, D};
    const Lines<bf16> o{out + segment.start * outputs + head * D, outputs, group, D};
    const Lines<float> sums{lse + static_cast<int64_t>(segment.start) * q_heads + head, q_heads, group, 1};
    const bf16* k = qkv + outputs + blockIdx.y * D;
    forward_tile<D>(shared_address(memory), PackedKeys{segment}, k, k + kv_heads * D, width, q, o, sums,
                    segment.prefix_len, first, end, scale_log2);
}

}  // namespace

// Grid: (tiles of the longest segment, kv_heads, segments).
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_forward_64(const Segment* segments, const bf16* qkv, bf16* out, float* lse, int q_heads,
                         int kv_heads, float scale_log2) {
    forward<64>(segments, qkv, out, lse, q_heads, kv_heads, scale_log2);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_128(const Segment* segments, const bf16* qkv, bf16* out, float* lse, int q_heads,
                          int kv_heads, float scale_log2) {
    forward<128>(segments, qkv, out, lse, q_heads, kv_heads, scale_log2);
}
