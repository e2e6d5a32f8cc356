// The linear head fused with log-softmax and the choice of the target. Tokens x vocabulary logits are
// never stored.
//
// Forward: a block computes the logits of 128 rows and one unit of 128 tokens with matmul.cuh's mainloop,
// reduces each row of them to a state of 16 bytes (softmax.cuh) and hands the target's z out; a second kernel
// merges each row's states. What is stored is rows x vocabulary / 128 states, rows a chunk at a time.
//
// Backward: only rows with a gradient are worked on. They are listed in order by one block and their hidden
// states gathered. Then, for a chunk of rows and a chunk of the vocabulary at a time, the logits are computed
// again with the forward's bits and become gradients
//   dz = dlogprob ((v == target) - e^(z - lse)) / temperature,
// in bf16, [chunk of rows][chunk of vocabulary]; and two products take them in:
//   dx[r] += dz[r] head            f32, chunks of the vocabulary in order; rounded and scattered at the end
//   dhead[v] += dz[., v]ᵀ x        f32, chunks of rows in order
// Chunks start at row 0 and token 0 whatever the batch, so that a row's bits do not depend on it.
//
// `logits` writes them for the sampler: the same mainloop, hence the same bits, from tiles of few rows.
#include "matmul.cuh"
#include "softmax.cuh"

using Large = Tile<128, 128, 32, 4, 2, 4>;  // 64 KiB; its four warps along n have a group of 32 tokens each
// Decoding, of many and of few. Twice as wide as those of linear layers, for a vocabulary has columns enough
// to go round: every tile reads the hidden states again.
using Middle = Tile<64, 128, 32, 4, 2, 2>;  // 48 KiB
using Small = Tile<16, 128, 64, 4, 1, 4>;   // 72 KiB
static_assert(Large::BN == UNIT && Large::NI == 4, "a warp's columns are a group, a tile's a unit");

// The rows of a backward chunk: those of `active` from `first` on, at most `most`.
__device__ __forceinline__ int rows_of_chunk(const unsigned* count, int first, int most) {
    return min(most, static_cast<int>(*count) - first);
}

// Columns of dz that hold something; those behind the last token hold zeros.
__device__ __forceinline__ int padded(int tokens) { return div_ceil(tokens, CHUNK) * CHUNK; }

// kernels

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
    logprob_states(const bf16* x, const bf16* head, const unsigned* targets, float inverse_temperature,
                   float4* states, float* target_z, int rows, int hidden, int vocab, int units) {
    const int m = blockIdx.x * Large::BM, n = blockIdx.y * UNIT;
    float z[Large::MI][Large::NI][4];
    const Operand a{x, static_cast<size_t>(hidden), rows, hidden};
    const Operand b{head, static_cast<size_t>(hidden), vocab, hidden};
    multiply<Large, false, false>(z, a, b, m, n, hidden);

    // [warp along n][row]
    float(*maxima)[Large::BM] = reinterpret_cast<float(*)[Large::BM]>(shared_memory);
    Sums(*sums)[Large::BM] = reinterpret_cast<Sums(*)[Large::BM]>(maxima + Large::WARPS_N);
    const Place<Large> place;
    const int group = threadIdx.x / WARP % Large::WARPS_N;
    const bool speaks = threadIdx.x % 4 == 0;
#pragma unroll
    for (int i = 0; i < Large::MI; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = m + place.row(i, h);
            const int target = row < rows ? static_cast<int>(targets[row]) : -1;
            float max = -FLT_MAX;
#pragma unroll
            for (int j = 0; j < Large::NI; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int token = n + place.column(j) + e;
                    float& at = z[i][j][2 * h + e];
                    at = token < vocab ? scaled(at, inverse_temperature) : -INFINITY;
                    if (token == target && token < vocab) target_z[row] = at;
                    max = fmaxf(max, at);
                }
            max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
            max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
            if (speaks) maxima[group][place.row(i, h)] = max;
        }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Large::MI; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = place.row(i, h);
            const float max = fmaxf(fmaxf(maxima[0][row], maxima[1][row]),
                                    fmaxf(maxima[2][row], maxima[3][row]));
            Sums quarter;
#pragma unroll
            for (int j = 0; j < Large::NI; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) quarter.add_logit(z[i][j][2 * h + e], max);
            quarter = quarter.with_lane(1).with_lane(2);
            if (speaks) sums[group][row] = quarter;
        }
    __syncthreads();
    const int row = threadIdx.x;
    if (row < Large::BM && m + row < rows) {
        const float max = fmaxf(fmaxf(maxima[0][row], maxima[1][row]),
                                fmaxf(maxima[2][row], maxima[3][row]));
        const Sums unit = (sums[0][row] + sums[1][row]) + (sums[2][row] + sums[3][row]);
        states[static_cast<size_t>(m + row) * units + blockIdx.y] = unit_state(max, unit);
    }
}

// A block merges the states of one row. `first` is the number of row 0, for the note of a bad target.
extern "C" __global__ void __launch_bounds__(FINISH_THREADS)
    logprob_finish(const float4* states, const unsigned* targets, float* logprob, float* lse,
                   float* entropy, int units, unsigned vocab, unsigned first, Fault fault) {
    const int row = blockIdx.x;
    const LogSumExp result = finish(states + static_cast<size_t>(row) * units, units);
    if (threadIdx.x != 0) return;
    lse[row] = result.lse;
    entropy[row] = result.entropy;
    if (targets[row] < vocab) {
        logprob[row] = __fsub_rn(logprob[row], result.lse);
    } else {
        dust_fault(fault, first + row, targets[row], vocab);
        logprob[row] = NAN;
    }
}

// Lists the rows that have a gradient, in order, and counts them.
extern "C" __global__ void __launch_bounds__(1024)
    logprob_active(const float* dlogprob, const unsigned* targets, unsigned* active, unsigned* count,
                   int rows, unsigned vocab, Fault fault) {
    __shared__ unsigned warp_counts[1024 / WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned before = 0;
    for (int first = 0; first < rows; first += 1024) {
        const int row = first + threadIdx.x;
        const bool on = row < rows && dlogprob[row] != 0.f;
        if (row < rows && targets[row] >= vocab) dust_fault(fault, row, targets[row], vocab);
        const unsigned peers = __ballot_sync(0xffffffffu, on);
        if (lane == 0) warp_counts[warp] = __popc(peers);
        __syncthreads();
        unsigned at = before + __popc(peers & ((1u << lane) - 1));
#pragma unroll
        for (int w = 0; w < 1024 / WARP; w++) {
            const unsigned of_warp = warp_counts[w];
            before += of_warp;
            if (w < warp) at += of_warp;
        }
        if (on) active[at] = row;
        __syncthreads();
    }
    if (threadIdx.x == 0) *count = before;
}

// gathered[i] = x[active[first + i]]; a block copies a row.
extern "C" __global__ void __launch_bounds__(128)
    logprob_gather(const bf16* x, const unsigned* active, const unsigned* count, bf16* gathered, int first,
                   int most, int hidden) {
    const int row = blockIdx.x;
    if (row >= rows_of_chunk(count, first, most)) return;
    const bf16* from = x + static_cast<size_t>(active[first + row]) * hidden;
    bf16* to = gathered + static_cast<size_t>(row) * hidden;
    for (int i = threadIdx.x * CHUNK; i < hidden; i += 128 * CHUNK) store8(to + i, load8(from + i));
}

// dz [most][stride] of a chunk of rows and the `tokens` tokens from `token` on; `head` is the first's row.
// Columns up to the end of the tile become zero.
extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
    logprob_gradient(const bf16* x, const bf16* head, const unsigned* targets, const float* lse,
                     const float* dlogprob, const unsigned* active, const unsigned* count,
                     float inverse_temperature, bf16* dz, int first, int most, int token, int tokens,
                     int hidden, int stride) {
    const int m = blockIdx.x * Large::BM, n = blockIdx.y * Large::BN;
    const int rows = rows_of_chunk(count, first, most);
    if (m >= rows) return;
    float z[Large::MI][Large::NI][4];
    const Operand a{x, static_cast<size_t>(hidden), rows, hidden};
    const Operand b{head, static_cast<size_t>(hidden), tokens, hidden};
    multiply<Large, false, false>(z, a, b, m, n, hidden);
    const Place<Large> place;
#pragma unroll
    for (int i = 0; i < Large::MI; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = m + place.row(i, h);
            float row_lse = 0.f, factor = 0.f;
            int target = -1;
            if (row < rows) {
                const unsigned from = active[first + row];
                row_lse = lse[from];
                factor = __fmul_rn(dlogprob[from], inverse_temperature);
                target = static_cast<int>(targets[from]) - token;
            }
#pragma unroll
            for (int j = 0; j < Large::NI; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = n + place.column(j) + e;
                    float& at = z[i][j][2 * h + e];
                    const float p = exp_negative(__fsub_rn(scaled(at, inverse_temperature), row_lse));
                    at = column < tokens ? factor * ((column == target ? 1.f : 0.f) - p) : 0.f;
                }
        }
    stage<Large, bf16>(z);
    unstage<Large, bf16>([&](int row, int column, uint4 run) {
        if (m + row < rows)
            *reinterpret_cast<uint4*>(dz + static_cast<size_t>(m + row) * stride + n + column) = run;
    });
}

// sums[most][hidden] (+)= dz head: `add` is 0 for the first chunk of the vocabulary.
extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
    logprob_dx(const bf16* dz, const bf16* head, const unsigned* count, float* sums, int first, int most,
               int tokens, int hidden, int stride, int add) {
    const int m = blockIdx.x * Large::BM, n = blockIdx.y * Large::BN;
    const int rows = rows_of_chunk(count, first, most);
    if (m >= rows) return;
    float acc[Large::MI][Large::NI][4];
    const Operand a{dz, static_cast<size_t>(stride), rows, padded(tokens)};
    const Operand b{head, static_cast<size_t>(hidden), tokens, hidden};
    multiply<Large, false, true>(acc, a, b, m, n, tokens);
    store_tile<Large>(acc, sums, hidden, m, n, rows, hidden, add);
}

// dhead[tokens][hidden] += dzᵀ x.
extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
    logprob_dhead(const bf16* dz, const bf16* x, const unsigned* count, float* dhead, int first, int most,
                  int tokens, int hidden, int stride) {
    const int m = blockIdx.x * Large::BM, n = blockIdx.y * Large::BN;
    const int rows = rows_of_chunk(count, first, most);
    if (rows <= 0) return;
    float acc[Large::MI][Large::NI][4];
    const Operand a{dz, static_cast<size_t>(stride), rows, padded(tokens)};
    const Operand b{x, static_cast<size_t>(hidden), rows, hidden};
    multiply<Large, true, true>(acc, a, b, m, n, rows);
    store_tile<Large>(acc, dhead, hidden, m, n, tokens, hidden, true);
}

// dx[active[first + i]] = sums[i]; a block rounds a row. The other rows have been set to zero.
extern "C" __global__ void __launch_bounds__(128)
    logprob_scatter(const float* sums, const unsigned* active, const unsigned* count, bf16* dx, int first,
                    int most, int hidden) {
    const int row = blockIdx.x;
    if (row >= rows_of_chunk(count, first, most)) return;
    const float* from = sums + static_cast<size_t>(row) * hidden;
    bf16* to = dx + static_cast<size_t>(active[first + row]) * hidden;
    for (int i = threadIdx.x * CHUNK; i < hidden; i += 128 * CHUNK) store8(to + i, round8(load8(from + i)));
}

template <class T>
__device__ __forceinline__ void write_logits(const bf16* x, const bf16* head, float* logits, int rows,
                                             int hidden, int vocab) {
    const int m = blockIdx.x * T::BM, n = blockIdx.y * T::BN;
    float acc[T::MI][T::NI][4];
    const Operand a{x, static_cast<size_t>(hidden), rows, hidden};
    const Operand b{head, static_cast<size_t>(hidden), vocab, hidden};
    multiply<T, false, false>(acc, a, b, m, n, hidden);
    stage<T, float>(acc);
    unstage<T, float>([&](int row, int column, uint4 run) {
        if (m + row >= rows) return;
        uint32_t* to = reinterpret_cast<uint32_t*>(logits) + static_cast<size_t>(m + row) * vocab + n + column;
        const uint32_t value[4] = {run.x, run.y, run.z, run.w};
        if (vocab % 4 == 0) {
            if (n + column < vocab) *reinterpret_cast<uint4*>(to) = run;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (n + column + i < vocab) to[i] = value[i];
        }
    });
}

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
    logits_large(const bf16* x, const bf16* head, float* logits, int rows, int hidden, int vocab) {
    write_logits<Large>(x, head, logits, rows, hidden, vocab);
}

extern "C" __global__ void __launch_bounds__(Middle::THREADS)
    logits_middle(const bf16* x, const bf16* head, float* logits, int rows, int hidden, int vocab) {
    write_logits<Middle>(x, head, logits, rows, hidden, vocab);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS)
    logits_small(const bf16* x, const bf16* head, float* logits, int rows, int hidden, int vocab) {
    write_logits<Small>(x, head, logits, rows, hidden, vocab);
}
