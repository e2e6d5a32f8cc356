// Rows of a table by index, and the scatter that is their gradient, without atomics.
//
// gather   A warp copies a row, 16 bytes a lane.
// scatter  Rows with equal targets must be added in their order, whatever runs first. So a first
//          kernel sorts the row numbers by target, stably: a row's place is the number of rows with
//          a smaller target, or an equal one and before it, counted by comparing all pairs (for
//          16,384 rows 2.7e8 integer comparisons, far less than the rows' traffic takes). Then a
//          block owns each run of equal targets: it reads the target's row once, adds the run in
//          f32 in order, and writes it once. 4 elements a thread, so that neighbours of an f32
//          target fill whole sectors.
//
// An index that is too large is noted and its row left alone.

#include "common.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    gather_rows(int rows, int width, unsigned limit, const unsigned* index, const bf16* table,
                bf16* out, Fault fault) {
    const int row = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const unsigned source = index[row];
    if (source >= limit) {
        if (lane == 0) dust_fault(fault, row, source, limit);
        return;
    }
    const bf16* from = table + (size_t)source * width;
    bf16* to = out + (size_t)row * width;
#pragma unroll 4
    for (int c = 8 * lane; c < width; c += 8 * WARP) store8(to + c, load8(from + c));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_order(int rows, const unsigned* index, unsigned* order) {
    __shared__ uint4 tile[THREADS / 4];
    const unsigned row = blockIdx.x * THREADS + threadIdx.x;
    const unsigned target = row < rows ? index[row] : 0;
    unsigned place = 0;
    const auto count = [&](unsigned other_row, unsigned other) {
        place += other < target || (other == target && other_row < row);
    };
    for (unsigned first = 0; first < rows; first += THREADS) {
        const unsigned mine = first + threadIdx.x;
        // What stands for rows that are not there is below no target and before no row.
        reinterpret_cast<unsigned*>(tile)[threadIdx.x] = mine < rows ? index[mine] : UINT32_MAX;
        __syncthreads();
#pragma unroll 8
        for (unsigned k = 0; k < THREADS / 4; k++) {
            const uint4 four = tile[k];
            count(first + 4 * k, four.x);
            count(first + 4 * k + 1, four.y);
            count(first + 4 * k + 2, four.z);
            count(first + 4 * k + 3, four.w);
        }
        __syncthreads();
    }
    if (row < rows) order[place] = row;
}

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

__device__ __forceinline__ float4 load4(const bf16* p) {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                       __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
}

__device__ __forceinline__ void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }

__device__ __forceinline__ void store4(bf16* p, float4 v) {
    *reinterpret_cast<uint2*>(p) = make_uint2(round2(v.x, v.y), round2(v.z, v.w));
}

template <class T>
__device__ __forceinline__ void scatter_add(int rows, int width, unsigned limit, const unsigned* index,
                                            const unsigned* order, const bf16* __restrict__ dense,
                                            T* out, Fault fault) {
    __shared__ int end_of_run;
    const int begin = blockIdx.x;
    const unsigned target = index[order[begin]];
    if (threadIdx.x == 0) {
        const auto same = [&](int place) { return index[order[place]] == target; };
        int end = begin;
        if (begin == 0 || !same(begin - 1)) {
            // Targets are sorted: the run's end is found by doubling steps, then halving them.
            int step = 1;
            for (end = begin + 1; end + step <= rows && same(end + step - 1); step *= 2) end += step;
            for (; step > 0; step /= 2)
                if (end + step <= rows && same(end + step - 1)) end += step;
            if (target >= limit) {
                dust_fault(fault, order[begin], target, limit);
                end = begin;
            }
        }
        end_of_run = end;
    }
    __syncthreads();
    const int end = end_of_run;
    if (end == begin) return;
    for (int c = 4 * threadIdx.x; c < width; c += 4 * blockDim.x) {
        T* const to = out + (size_t)target * width + c;
        float4 sum = load4(to);
#pragma unroll 4
        for (int place = begin; place < end; place++) {
            const float4 x = load4(dense + (size_t)order[place] * width + c);
            sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        }
        store4(to, sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_add_f32(int rows, int width, unsigned limit, const unsigned* index, const unsigned* order,
                    const bf16* dense, float* out, Fault fault) {
    scatter_add(rows, width, limit, index, order, dense, out, fault);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_add_bf16(int rows, int width, unsigned limit, const unsigned* index,
                     const unsigned* order, const bf16* dense, bf16* out, Fault fault) {
    scatter_add(rows, width, limit, index, order, dense, out, fault);
}
