// What the CUDA library functions and cub compile to: block-wide collectives and mathematics.
#include <cooperative_groups.h>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cuda_bf16.h>
namespace cg = cooperative_groups;

extern "C" __global__ void block_wide(const int* x, int* sum, int* scan, int* sorted) {
    using Reduce = cub::BlockReduce<int, 128>;
    using Scan = cub::BlockScan<int, 128>;
    using Sort = cub::BlockRadixSort<int, 128, 2>;
    __shared__ union { Reduce::TempStorage r; Scan::TempStorage s; Sort::TempStorage q; } u;
    int t = threadIdx.x, total = Reduce(u.r).Sum(x[t]), before;
    if (t == 0) *sum = total;
    __syncthreads();
    Scan(u.s).ExclusiveSum(x[t], before);
    scan[t] = before;
    __syncthreads();
    int v[2] = {x[2 * t], x[2 * t + 1]};
    Sort(u.q).Sort(v);
    sorted[2 * t] = v[0];
    sorted[2 * t + 1] = v[1];
}

extern "C" __global__ void tiles(const int* x, int* y) {
    auto block = cg::this_thread_block();
    auto tile = cg::tiled_partition<8>(block);
    int v = x[block.thread_rank()];
    for (int d = 4; d > 0; d /= 2) v += tile.shfl_xor(v, d);
    tile.sync();
    if (block.thread_rank() % 3 == 0) {
        auto some = cg::coalesced_threads();
        v += 1000 * some.size() + 100000 * some.thread_rank();
    }
    y[block.thread_rank()] = v;
}

extern "C" __global__ void functions32(const float* x, float* y) {
    int i = threadIdx.x;
    float v = x[i];
    float r[8] = {expf(v), logf(v), powf(v, 1.5f), sinf(v), cosf(v), tanhf(v), erff(v), cbrtf(v)};
    for (int k = 0; k < 8; k++) y[8 * i + k] = r[k];
}

extern "C" __global__ void functions64(const double* x, double* y) {
    int i = threadIdx.x;
    double v = x[i];
    double r[8] = {exp(v), log(v), pow(v, 1.5), sin(v), cos(v), tanh(v), atan(v), cbrt(v)};
    for (int k = 0; k < 8; k++) y[8 * i + k] = r[k];
}

extern "C" __global__ void halves(const __nv_bfloat162* x, __nv_bfloat162* y) {
    int i = threadIdx.x;
    __nv_bfloat162 a = x[2 * i], b = x[2 * i + 1];
    y[i] = __hmax2(__hfma2(a, b, __hadd2(a, b)), __hmul2(a, a));
}
