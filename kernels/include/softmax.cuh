// The log-sum-exp of a row of logits, for logprob (which has them in the accumulators of a product) and
// sampling (which reads them from memory), in one order, so that both have the same bits.
//
// With z = logit * (1 / temperature), rounded, the vocabulary is cut into units of 128 tokens, each
// reduced to (max, sum e^(z - max), sum e^(z - max) (z - max)). A unit is four groups of 32 tokens, a
// group is four quarters: quarter t has the tokens 8j + 2t and 8j + 2t + 1 for j of 0 to 3, which is what a
// lane holds of the accumulators of four m16n8 fragments. A quarter sums in the order of its tokens; then
// quarters (0 + 1) + (2 + 3), then groups likewise. `finish` adds the units: thread i of 256 takes the units
// i, i + 256, ..., lanes are added in a butterfly, warps in order. There, sums are f64.
//
// Products and differences are rounded one by one (`__fmul_rn`), so that no compiler fuses them in one
// kernel and not in the other.
#pragma once

#include "common.cuh"
#include <float.h>

constexpr int UNIT = 128;
constexpr int FINISH_THREADS = 256;

__device__ __forceinline__ float scaled(float logit, float inverse_temperature) {
    return __fmul_rn(logit, inverse_temperature);
}

// e^d for d <= 0, on the special function unit; 0 from -88 on down.
__device__ __forceinline__ float exp_negative(float d) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(__fmul_rn(d, 1.4426950408889634f)));
    return e;
}

// z - max. Where its exponential is 0 it must not be infinite; a NaN stays one.
__device__ __forceinline__ float below(float z, float max) {
    const float d = __fsub_rn(z, max);
    return d < -100.f ? -100.f : d;
}

// Two sums that go everywhere together.
struct Sums {
    float sum = 0, weighted = 0;

    __device__ __forceinline__ void add_logit(float z, float max) {
        const float d = below(z, max), e = exp_negative(d);
        sum = __fadd_rn(sum, e);
        weighted = __fmaf_rn(e, d, weighted);
    }

    __device__ __forceinline__ Sums operator+(const Sums& other) const {
        Sums both;
        both.sum = __fadd_rn(sum, other.sum);
        both.weighted = __fadd_rn(weighted, other.weighted);
        return both;
    }

    // The sums of the lane whose number differs in the bits `mask`, added.
    __device__ __forceinline__ Sums with_lane(int mask) const {
        Sums other;
        other.sum = __shfl_xor_sync(0xffffffffu, sum, mask);
        other.weighted = __shfl_xor_sync(0xffffffffu, weighted, mask);
        return *this + other;
    }
};

// A unit's state: (max, sum, weighted, 0) in one access. Where no logit is finite, max is the least
// finite number.
__device__ __forceinline__ float4 unit_state(float max, const Sums& sums) {
    return make_float4(max, sums.sum, sums.weighted, 0.f);
}

struct LogSumExp {
    float max;      // the greatest z
    double sum;     // of e^(z - max)
    float lse;      // ln sum e^z
    float entropy;  // in nats, or 0
};

// Of a row with these states of units: unit_state's, or (max, sum) where no entropy is asked for, which is then
// 0. All threads of a block of 256 call it and get the same; thread i looks at the units i, i + 256, ... only.
template <class States>
__device__ __forceinline__ LogSumExp finish(const States& states, int units) {
    constexpr bool WEIGHTED = sizeof(states[0]) == sizeof(float4);
    constexpr int WARPS = FINISH_THREADS / WARP;
    __shared__ float warp_maxima[WARPS];
    __shared__ double warp_sums[WARPS][2];
    const int warp = threadIdx.x / WARP;

    float max = -FLT_MAX;
    for (int u = threadIdx.x; u < units; u += FINISH_THREADS) max = fmaxf(max, states[u].x);
    max = warp_max(max);
    if (threadIdx.x % WARP == 0) warp_maxima[warp] = max;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS; w++) max = fmaxf(max, warp_maxima[w]);

    double sum = 0, weighted = 0;
    for (int u = threadIdx.x; u < units; u += FINISH_THREADS) {
        const auto state = states[u];
        const float d = below(state.x, max);
        const double factor = exp_negative(d);
        sum = __fma_rn(factor, static_cast<double>(state.y), sum);
        if constexpr (WEIGHTED)
            weighted = __fma_rn(factor, __fma_rn(static_cast<double>(d), static_cast<double>(state.y),
                                                 static_cast<double>(state.z)), weighted);
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        sum = __dadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, step));
        if constexpr (WEIGHTED) weighted = __dadd_rn(weighted, __shfl_xor_sync(0xffffffffu, weighted, step));
    }
    if (threadIdx.x % WARP == 0) {
        warp_sums[warp][0] = sum;
        if constexpr (WEIGHTED) warp_sums[warp][1] = weighted;
    }
    __syncthreads();
    sum = weighted = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        sum = __dadd_rn(sum, warp_sums[w][0]);
        if constexpr (WEIGHTED) weighted = __dadd_rn(weighted, warp_sums[w][1]);
    }
    const double log_sum = log(sum);
    return {max, sum, static_cast<float>(__dadd_rn(max, log_sum)),
            WEIGHTED ? static_cast<float>(__dadd_rn(log_sum, -__ddiv_rn(weighted, sum))) : 0.f};
}
