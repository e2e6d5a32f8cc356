// Sums in f64, for operations that read one number a token, a parameter or an item: exactness there
// costs no time, as memory is what they wait for.
#pragma once

#include "common.cuh"

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// As block_sum of f32: the same bits in every thread, warps in order.
__device__ __forceinline__ double block_sum(double x, double* scratch) {
    x = warp_sum(x);
    const int warps = blockDim.x / WARP;
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < warps; w++) total += scratch[w];
    return total;
}
