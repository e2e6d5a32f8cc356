// What every kernel needs: eight elements at a time, sums in a fixed order, notes of bad indices.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

constexpr int WARP = 32;

__host__ __device__ constexpr int div_ceil(int a, int b) { return (a + b - 1) / b; }

// Eight bf16 in the 16 bytes that one access moves.
struct Pack8 {
    uint4 bits;
};

struct Float8 {
    float at[8];
};

// Eight elements in one access (two for f32). The address must be a multiple of 16 bytes: launchers
// refuse widths that are no multiple of 8.
__device__ __forceinline__ Pack8 load8(const bf16* p) { return {*reinterpret_cast<const uint4*>(p)}; }

__device__ __forceinline__ Float8 load8(const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

__device__ __forceinline__ void store8(bf16* p, Pack8 value) { *reinterpret_cast<uint4*>(p) = value.bits; }

__device__ __forceinline__ void store8(float* p, const Float8& value) {
    const float* v = value.at;
    reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

// bf16 is the upper half of f32, so that widening is a shift.
__device__ __forceinline__ Float8 widen(Pack8 p) {
    const uint32_t word[4] = {p.bits.x, p.bits.y, p.bits.z, p.bits.w};
    Float8 out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out.at[2 * i] = __uint_as_float(word[i] << 16);
        out.at[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
    return out;
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ uint32_t round2(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ Pack8 round8(const Float8& v) {
    return {make_uint4(round2(v.at[0], v.at[1]), round2(v.at[2], v.at[3]),
                       round2(v.at[4], v.at[5]), round2(v.at[6], v.at[7]))};
}

// Sum over groups of `lanes` neighbouring lanes (a power of two), the same bits in each of them:
// in a butterfly both partners add the same two numbers, and addition is commutative.
__device__ __forceinline__ float group_sum(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// Sum over a block whose size is a multiple of a warp, the same bits in every thread: warps are
// added in order. `scratch` holds one float a warp; the block must pass a barrier before it is
// used again.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    const int warps = blockDim.x / WARP;
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < warps; w++) total += scratch[w];
    return total;
}

// Where a kernel notes an index that points outside of what it indexes. `words` may be null.
struct Fault {
    unsigned* words;  // code, at, value, limit
    unsigned code;    // what the host knows the argument by; never 0
    unsigned unused;
};

// Notes that element `at` of an argument is `value` and not below `limit`, unless something has
// been noted before. The caller must then leave the memory behind `value` alone.
__device__ __forceinline__ void dust_fault(Fault fault, unsigned at, unsigned value, unsigned limit) {
    if (fault.words == nullptr || atomicCAS(fault.words, 0u, fault.code) != 0u) return;
    fault.words[1] = at;
    fault.words[2] = value;
    fault.words[3] = limit;
}
