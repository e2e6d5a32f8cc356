// Linear layers: y = x wᵀ + bias and its three gradients. bf16 matrices, f32 sums.
//
//   linear      y[r, o]  = sum_i x[r, i] w[o, i] + bias[o]     both operands with k along their rows
//   linear_dx   dx[r, i] = sum_o dy[r, o] w[o, i]              w with k down its columns
//   linear_dw   dw[o, i] += sum_r dy[r, o] x[r, i]             both with k down their columns
//   linear_dbias  dbias[o] += sum_r dy[r, o]                   rows in order
//
// The mainloop is matmul.cuh's, for which the three products differ in how ldmatrix reads the tiles.
// A block computes one tile of the result and walks all of k; there is no split of k, hence no atomics,
// and an element's bits do not depend on the tile. That is what lets decoding, which has few rows and is
// bound by reading w, use tiles of few rows and still agree with training bit for bit.
// The result passes through shared memory to leave in runs of 16 bytes.
#include "matmul.cuh"

// Tiles of A100 and H100 (164 and 228 KiB of shared memory a multiprocessor).
using Large = Tile<128, 128, 32, 4, 2, 4>;  // 64 KiB: two blocks of 8 warps, 64 sums a thread
using Middle = Tile<64, 64, 64, 4, 2, 2>;   // 64 KiB: decoding of many; 32 sums a thread
using Small = Tile<16, 64, 64, 4, 1, 4>;    // 40 KiB: decoding of few; 5 KiB a warp under way

// kernels

template <class T>
__device__ __forceinline__ void store_tile(const float (&acc)[T::MI][T::NI][4], bf16* out,
                                           int m, int n, int rows, int columns) {
    stage<T, bf16>(acc);
    unstage<T, bf16>([&](int row, int column, uint4 run) {
        if (m + row < rows && n + column < columns)
            *reinterpret_cast<uint4*>(out + static_cast<size_t>(m + row) * columns + n + column) = run;
    });
}

template <class T>
__device__ __forceinline__ void linear(const bf16* x, const bf16* w, const float* bias, bf16* y, int rows,
                                       int inputs, int outputs) {
    const int m = blockIdx.x * T::BM, n = blockIdx.y * T::BN;
    float acc[T::MI][T::NI][4];
    const Operand a{x, static_cast<size_t>(inputs), rows, inputs};
    const Operand b{w, static_cast<size_t>(inputs), outputs, inputs};
    multiply<T, false, false>(acc, a, b, m, n, inputs);
    if (bias) {
        const Place<T> place;
#pragma unroll
        for (int j = 0; j < T::NI; j++) {
            // `outputs` is even: a pair is in or out as a whole.
            const int column = n + place.column(j);
            const bool valid = column < outputs;
            const float b0 = valid ? bias[column] : 0.f, b1 = valid ? bias[column + 1] : 0.f;
#pragma unroll
            for (int i = 0; i < T::MI; i++) {
                acc[i][j][0] += b0;
                acc[i][j][1] += b1;
                acc[i][j][2] += b0;
                acc[i][j][3] += b1;
            }
        }
    }
    store_tile<T>(acc, y, m, n, rows, outputs);
}

template <class T>
__device__ __forceinline__ void linear_dx(const bf16* dy, const bf16* w, bf16* dx, int rows, int inputs,
                                          int outputs) {
    const int m = blockIdx.x * T::BM, n = blockIdx.y * T::BN;
    float acc[T::MI][T::NI][4];
    const Operand a{dy, static_cast<size_t>(outputs), rows, outputs};
    const Operand b{w, static_cast<size_t>(inputs), outputs, inputs};
    multiply<T, false, true>(acc, a, b, m, n, outputs);
    store_tile<T>(acc, dx, m, n, rows, inputs);
}

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
    linear_large(const bf16* x, const bf16* w, const float* bias, bf16* y, int rows, int inputs,
                 int outputs) {
    linear<Large>(x, w, bias, y, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(Middle::THREADS)
    linear_middle(const bf16* x, const bf16* w, const float* bias, bf16* y, int rows, int inputs,
                 int outputs) {
    linear<Middle>(x, w, bias, y, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS)
    linear_small(const bf16* x, const bf16* w, const float* bias, bf16* y, int rows, int inputs,
                 int outputs) {
    linear<Small>(x, w, bias, y, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
    linear_dx_large(const bf16* dy, const bf16* w, bf16* dx, int rows, int inputs, int outputs) {
    linear_dx<Large>(dy, w, dx, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(Middle::THREADS)
    linear_dx_middle(const bf16* dy, const bf16* w, bf16* dx, int rows, int inputs, int outputs) {
    linear_dx<Middle>(dy, w, dx, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS)
    linear_dx_small(const bf16* dy, const bf16* w, bf16* dx, int rows, int inputs, int outputs) {
    linear_dx<Small>(dy, w, dx, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
    linear_dw(const bf16* x, const bf16* dy, float* dw, int rows, int inputs, int outputs) {
    const int m = blockIdx.x * Large::BM, n = blockIdx.y * Large::BN;
    float acc[Large::MI][Large::NI][4];
    const Operand a{dy, static_cast<size_t>(outputs), rows, outputs};
    const Operand b{x, static_cast<size_t>(inputs), rows, inputs};
    multiply<Large, true, true>(acc, a, b, m, n, rows);
    store_tile<Large>(acc, dw, inputs, m, n, outputs, inputs, true);
}

// A thread sums the eight columns of one run of 16 bytes.
extern "C" __global__ void __launch_bounds__(WARP)
    linear_dbias(const bf16* dy, float* dbias, int rows, int outputs) {
    const int column = (blockIdx.x * WARP + threadIdx.x) * CHUNK;
    if (column >= outputs) return;
    float sum[CHUNK] = {};
#pragma unroll 8
    for (int r = 0; r < rows; r++) {
        const Float8 row = widen(load8(dy + static_cast<size_t>(r) * outputs + column));
#pragma unroll
        for (int i = 0; i < CHUNK; i++) sum[i] += row.at[i];
    }
    Float8 total = load8(dbias + column);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) total.at[i] += sum[i];
    store8(dbias + column, total);
}
