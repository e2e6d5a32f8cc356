// RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) and its gradient: memory-bound, so every
// activation is read once and written once, in 16-byte accesses, and stays in registers between.
//
// forward   A warp owns a row: no barriers. Lane l holds vectors l, l + 32, ... of 8 elements. The
//           f32 weights are staged in shared memory once for all rows of a block; first and second
//           halves of vectors lie apart, so that 16-byte reads of neighbours meet no bank twice.
// backward  A block owns 16 consecutive rows, a thread the same columns of each: the weight's
//           gradient is summed in registers, row after row, and leaves as one partial row a block.
//           A second kernel adds the partial rows in order: no atomics, the same bits every time.
// heads     QK norm: 8 elements a lane, so that a head of 64 takes 8 lanes and a warp four heads.
//
// A row's bits depend on its width alone: which vectors a lane holds, the order in which it adds
// them and the butterfly over lanes are all fixed by it. Vectors beyond what registers hold are
// read again, which changes no order.

#include "common.cuh"

constexpr int WARPS = 8;          // of a forward block: rows in flight
constexpr int BACKWARD_ROWS = 16;  // of a backward block: a partial row costs 1/16 of its traffic
constexpr int BACKWARD_THREADS = 512;
constexpr int BACKWARD_VECTORS = 2;  // of a thread, in registers: widths up to 8192
constexpr int HEAD_THREADS = 256;

__device__ __forceinline__ float square_sum(Pack8 p, float sum) {
    const Float8 v = widen(p);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(v.at[i], v.at[i], sum);
    return sum;
}

__device__ __forceinline__ float reciprocal_rms(float squares, int width, float eps) {
    return 1.0f / sqrtf(squares / (float)width + eps);
}

__device__ __forceinline__ Pack8 scaled(Pack8 p, float rstd, const Float8& weight) {
    Float8 v = widen(p);
#pragma unroll
    for (int i = 0; i < 8; i++) v.at[i] = v.at[i] * rstd * weight.at[i];
    return round8(v);
}

__device__ __forceinline__ Pack8 sum8(Pack8 a, Pack8 b) {
    Float8 x = widen(a);
    const Float8 y = widen(b);
#pragma unroll
    for (int i = 0; i < 8; i++) x.at[i] += y.at[i];
    return round8(x);
}

// HELD vectors of a lane stay in registers. With ADD, the row is `x + delta`, rounded as it is
// stored to `sum`, so that the norm is that of the stored row.
template <int HELD, bool ADD>
__device__ __forceinline__ void forward(int rows, int width, float eps, const bf16* x,
                                        const bf16* delta, const float* weight, bf16* sum, bf16* y,
                                        float* rstd) {
    extern __shared__ float4 staged[];
    const int vectors = width / 8;
    for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
        const Float8 w = load8(weight + 8 * v);
        staged[v] = make_float4(w.at[0], w.at[1], w.at[2], w.at[3]);
        staged[vectors + v] = make_float4(w.at[4], w.at[5], w.at[6], w.at[7]);
    }
    __syncthreads();
    const int lane = threadIdx.x % WARP;
    for (int row = blockIdx.x * WARPS + threadIdx.x / WARP; row < rows; row += gridDim.x * WARPS) {
        const size_t base = (size_t)row * width;
        const auto fetch = [&](int v) {
            Pack8 p = load8(x + base + 8 * v);
            if (ADD) {
                p = sum8(p, load8(delta + base + 8 * v));
                store8(sum + base + 8 * v, p);
            }
            return p;
        };
        Pack8 held[HELD];
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (lane + WARP * k < vectors) held[k] = fetch(lane + WARP * k);
        float squares = 0;
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (lane + WARP * k < vectors) squares = square_sum(held[k], squares);
        for (int v = lane + WARP * HELD; v < vectors; v += WARP) squares = square_sum(fetch(v), squares);
        const float scale = reciprocal_rms(warp_sum(squares), width, eps);
        if (lane == 0) rstd[row] = scale;

        const auto emit = [&](int v, Pack8 p) {
            const float4 a = staged[v], b = staged[vectors + v];
            const Float8 w = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            store8(y + base + 8 * v, scaled(p, scale, w));
        };
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (lane + WARP * k < vectors) emit(lane + WARP * k, held[k]);
        const bf16* again = ADD ? sum : x;
        for (int v = lane + WARP * HELD; v < vectors; v += WARP)
            emit(v, load8(again + base + 8 * v));
    }
}

#define FORWARD(held)                                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP) rms_norm_##held(                     \
        int rows, int width, float eps, const bf16* x, const float* weight, bf16* y, float* rstd) { \
        forward<held, false>(rows, width, eps, x, nullptr, weight, nullptr, y, rstd);              \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP) add_rms_norm_##held(                 \
        int rows, int width, float eps, const bf16* residual, const bf16* delta,                   \
        const float* weight, bf16* sum, bf16* y, float* rstd) {                                    \
        forward<held, true>(rows, width, eps, residual, delta, weight, sum, y, rstd);              \
    }

FORWARD(4)   // widths up to 1024
FORWARD(16)  // up to 4096 without reading twice

// Gradient of one vector. `h = x rstd`.
struct Gradient {
    Float8 h, dy;

    __device__ __forceinline__ Gradient(Pack8 x, Pack8 dy8, float rstd) : h(widen(x)), dy(widen(dy8)) {
#pragma unroll
        for (int i = 0; i < 8; i++) h.at[i] *= rstd;
    }
    // Adds dy weight h to the row's sum and dy h to the weight's gradient.
    __device__ __forceinline__ float reduce(const Float8& weight, float sum, Float8& dweight) const {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum = fmaf(dy.at[i] * weight.at[i], h.at[i], sum);
            dweight.at[i] = fmaf(dy.at[i], h.at[i], dweight.at[i]);
        }
        return sum;
    }
    // rstd (dy weight - h mean).
    __device__ __forceinline__ Float8 input(const Float8& weight, float rstd, float mean) const {
        Float8 out;
#pragma unroll
        for (int i = 0; i < 8; i++)
            out.at[i] = rstd * fmaf(-h.at[i], mean, dy.at[i] * weight.at[i]);
        return out;
    }
};

extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS)
    rms_norm_backward(int rows, int width, const bf16* dy, const bf16* x, const float* weight,
                      const float* rstd, bf16* dx, float* partial) {
    __shared__ float scratch[2][BACKWARD_THREADS / WARP];
    const int vectors = width / 8, threads = blockDim.x, thread = threadIdx.x;
    partial += (size_t)blockIdx.x * width;
    Float8 w[BACKWARD_VECTORS], dw[BACKWARD_VECTORS] = {};
#pragma unroll
    for (int k = 0; k < BACKWARD_VECTORS; k++) {
        const int v = thread + k * threads;
        if (v < vectors) w[k] = load8(weight + 8 * v);
    }
    // A column beyond those in registers belongs to this thread too: its sum lies in `partial`.
    const int first_beyond = thread + BACKWARD_VECTORS * threads;
    for (int v = first_beyond; v < vectors; v += threads) store8(partial + 8 * v, {});

    const int end = min(rows, ((int)blockIdx.x + 1) * BACKWARD_ROWS);
    for (int row = blockIdx.x * BACKWARD_ROWS; row < end; row++) {
        const size_t base = (size_t)row * width;
        const float scale = rstd[row];
        const auto read = [&](const bf16* p, int v) { return load8(p + base + 8 * v); };
        const auto write = [&](int v, Pack8 before, const Float8& gradient) {
            Float8 out = widen(before);
#pragma unroll
            for (int i = 0; i < 8; i++) out.at[i] += gradient.at[i];
            store8(dx + base + 8 * v, round8(out));
        };
        Pack8 x8[BACKWARD_VECTORS], dy8[BACKWARD_VECTORS], dx8[BACKWARD_VECTORS];
#pragma unroll
        for (int k = 0; k < BACKWARD_VECTORS; k++) {
            const int v = thread + k * threads;
            if (v < vectors) x8[k] = read(x, v), dy8[k] = read(dy, v), dx8[k] = read(dx, v);
        }
        float sum = 0;
#pragma unroll
        for (int k = 0; k < BACKWARD_VECTORS; k++)
            if (thread + k * threads < vectors)
                sum = Gradient(x8[k], dy8[k], scale).reduce(w[k], sum, dw[k]);
        for (int v = first_beyond; v < vectors; v += threads) {
            Float8 total = load8(partial + 8 * v);
            const Gradient g(read(x, v), read(dy, v), scale);
            sum = g.reduce(load8(weight + 8 * v), sum, total);
            store8(partial + 8 * v, total);
        }
        // Two scratch rows take turns, so that one barrier a row is enough.
        const float mean = block_sum(sum, scratch[row % 2]) / (float)width;
#pragma unroll
        for (int k = 0; k < BACKWARD_VECTORS; k++) {
            const int v = thread + k * threads;
            if (v < vectors) write(v, dx8[k], Gradient(x8[k], dy8[k], scale).input(w[k], scale, mean));
        }
        for (int v = first_beyond; v < vectors; v += threads) {
            const Gradient g(read(x, v), read(dy, v), scale);
            write(v, read(dx, v), g.input(load8(weight + 8 * v), scale, mean));
        }
    }
#pragma unroll
    for (int k = 0; k < BACKWARD_VECTORS; k++) {
        const int v = thread + k * threads;
        if (v < vectors) store8(partial + 8 * v, dw[k]);
    }
}

// out[c] += sum over r of partial[r][c], for `columns` of the `stride` columns. A block takes 32
// columns; its warps take the rows in turn and are added in order.
extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    norm_dweight(int rows, int stride, int columns, const float* partial, float* out) {
    __shared__ float sums[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int column = blockIdx.x * WARP + lane;
    float sum = 0;
    if (column < columns)
        for (int row = warp; row < rows; row += WARPS) sum += partial[(size_t)row * stride + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < columns) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += sums[w][lane];
        out[column] += total;
    }
}

// By value: a reference chosen at run time would put both into local memory.
__device__ __forceinline__ Float8 choose(bool first, const Float8& a, const Float8& b) {
    Float8 out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.at[i] = first ? a.at[i] : b.at[i];
    return out;
}

// The 8 weights of a lane, read from global memory once a block. In shared memory first and second
// halves of vectors lie apart, as in `forward`.
struct HeadWeights {
    Float8 q, k;

    __device__ __forceinline__ HeadWeights(const float* q_weight, const float* k_weight, int head_dim,
                                           int lanes) {
        __shared__ float4 staged[2][2][WARP];
        const int v = threadIdx.x % lanes, which = threadIdx.x / lanes;
        if (which < 2 && 8 * v < head_dim) {
            const Float8 w = load8((which == 0 ? q_weight : k_weight) + 8 * v);
            staged[which][0][v] = make_float4(w.at[0], w.at[1], w.at[2], w.at[3]);
            staged[which][1][v] = make_float4(w.at[4], w.at[5], w.at[6], w.at[7]);
        }
        __syncthreads();
        q = k = {};
        if (8 * v < head_dim) {
            const float4 a = staged[0][0][v], b = staged[0][1][v];
            const float4 c = staged[1][0][v], d = staged[1][1][v];
            q = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            k = {c.x, c.y, c.z, c.w, d.x, d.y, d.z, d.w};
        }
    }
};

// The packed rows of attention: query heads, key heads, value heads. `lanes` (a power of two) lanes
// hold a head, 8 elements each.
extern "C" __global__ void __launch_bounds__(HEAD_THREADS)
    qk_norm(int rows, int q_heads, int kv_heads, int head_dim, int lanes, float eps, const bf16* qkv,
            const float* q_weight, const float* k_weight, bf16* out, float* rstd) {
    const int heads = q_heads + 2 * kv_heads, normed = q_heads + kv_heads;
    const int lane = threadIdx.x % lanes, groups = blockDim.x / lanes;
    const bool holds = 8 * lane < head_dim;  // a head of 80 takes 10 of 16 lanes
    const HeadWeights weights(q_weight, k_weight, head_dim, lanes);
    const size_t count = (size_t)rows * heads;
    // The bound is a warp's, so that all of its lanes meet in the sum.
    const size_t warp_first = (size_t)blockIdx.x * groups + threadIdx.x / WARP * (WARP / lanes);
    for (size_t first = warp_first; first < count; first += (size_t)gridDim.x * groups) {
        const size_t item = first + threadIdx.x % WARP / lanes;
        const bool there = holds && item < count;
        const int head = item % heads;
        const size_t at = item * head_dim + 8 * lane;
        const Pack8 p = there ? load8(qkv + at) : Pack8{};
        const float squares = group_sum(square_sum(p, 0), lanes);
        if (!there) continue;
        if (head >= normed) {
            store8(out + at, p);
            continue;
        }
        const float scale = reciprocal_rms(squares, head_dim, eps);
        if (lane == 0) rstd[item / heads * normed + head] = scale;
        store8(out + at, scaled(p, scale, choose(head < q_heads, weights.q, weights.k)));
    }
}

// A block takes 16 rows; each group of lanes every so many-th head of them. `partial` gets, for
// each block, the gradient of q_weight and then that of k_weight.
extern "C" __global__ void __launch_bounds__(HEAD_THREADS)
    qk_norm_backward(int rows, int q_heads, int kv_heads, int head_dim, int lanes, const bf16* qkv,
                     const float* q_weight, const float* k_weight, const float* rstd, bf16* dqkv,
                     float* partial) {
    // Rows are 4 banks apart: a warp stores along a row, and reads 8 rows of 4 columns.
    __shared__ float sums[2][8][HEAD_THREADS + 4];
    const int heads = q_heads + 2 * kv_heads, normed = q_heads + kv_heads;
    const int lane = threadIdx.x % lanes;
    const int group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    const bool holds = 8 * lane < head_dim;
    const HeadWeights weights(q_weight, k_weight, head_dim, lanes);
    Float8 dq = {}, dk = {};
    const int first_row = blockIdx.x * BACKWARD_ROWS;
    const int count = min(rows - first_row, BACKWARD_ROWS) * normed;
    const int in_warp = threadIdx.x % WARP / lanes;
    for (int first = group - in_warp; first < count; first += groups) {
        const int item = first + in_warp;
        const bool there = holds && item < count;
        const int row = first_row + item / normed, head = item % normed;
        const size_t at = ((size_t)row * heads + head) * head_dim + 8 * lane;
        const float scale = there ? rstd[(size_t)row * normed + head] : 0;
        const Gradient g(there ? load8(qkv + at) : Pack8{}, there ? load8(dqkv + at) : Pack8{}, scale);
        const bool query = head < q_heads;
        const Float8 weight = choose(query, weights.q, weights.k);
        Float8 dweight = choose(query, dq, dk);
        const float mean = group_sum(g.reduce(weight, 0, dweight), lanes) / (float)head_dim;
        dq = choose(query, dweight, dq);
        dk = choose(query, dk, dweight);
        if (there) store8(dqkv + at, round8(g.input(weight, scale, mean)));
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sums[0][i][threadIdx.x] = dq.at[i];
        sums[1][i][threadIdx.x] = dk.at[i];
    }
    __syncthreads();
    partial += (size_t)blockIdx.x * 2 * head_dim;
    for (int c = threadIdx.x; c < 2 * head_dim; c += blockDim.x) {
        const int which = c / head_dim, column = c % head_dim;
        float total = 0;
        for (int g = 0; g < groups; g++) total += sums[which][column % 8][g * lanes + column / 8];
        partial[c] = total;
    }
}
