// Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): advantages inside of a
// group; the clipped surrogate with its variants, and the gradient by log-probability.
//
// One number a token goes in and one comes out, so that all arithmetic is f64: memory is what these
// kernels wait for, and results agree with the CPU's to the last place of f32.
//
// advantages  A warp owns a group; up to 128 rewards stay in registers.
// grpo_loss   A block owns a sequence, and reduces it in an order that its length alone decides. A
//             kernel before it looks at all offsets: if one is wrong, nothing is written at all.

#include "wide.cuh"

constexpr int GROUPS = 4;    // warps, and so groups, of a block of advantages
constexpr int HELD = 4;      // rewards that a lane keeps
constexpr int THREADS = 128;  // of a sequence
constexpr int WARPS = THREADS / WARP;

// The largest magnitude of a log-ratio, in nats; NaN stays.
constexpr double LIMIT = 20;

enum KlEstimator { K1, K2, K3 };

struct Loss {
    double low, high, dual;  // ratios beyond are clipped; dual is infinite where there is none
    double kl_coef;
    int kl;          // KlEstimator
    int whole;       // one ratio a sequence
};

struct SequenceStats {
    float loss, kl, moved, ratio, ratio_deviation, clipped_low, clipped_high, clipped_dual;
};

// A log-ratio after the cut, and the derivative of the cut.
struct Cut {
    double value, slope;

    __device__ __forceinline__ explicit Cut(double x)
        : value(x > LIMIT ? LIMIT : x < -LIMIT ? -LIMIT : x), slope(fabs(x) > LIMIT ? 0.0 : 1.0) {}
};

struct Estimate {
    double value, slope;
};

// KL(policy, reference) and its derivative by log policy, from log ref - log policy.
__device__ __forceinline__ Estimate kl_estimate(int kind, double log_ratio) {
    const Cut d(log_ratio);
    if (kind == K1) return {-d.value, d.slope};
    if (kind == K2) return {d.value * d.value / 2, -d.value * d.slope};
    const double e = expm1(d.value);
    return {e - d.value, -e * d.slope};
}

// The larger; NaN wins, whichever it is.
__device__ __forceinline__ float worse(float a, float b) { return b > a || isnan(b) ? b : a; }

// kernels

extern "C" __global__ void __launch_bounds__(GROUPS* WARP)
    advantages(int groups, int size, int divide_by_std, float eps, const float* rewards,
               float* advantages) {
    const int lane = threadIdx.x % WARP;
    const int group = blockIdx.x * GROUPS + threadIdx.x / WARP;
    if (group >= groups) return;
    rewards += (size_t)group * size;
    advantages += (size_t)group * size;
    float held[HELD];
#pragma unroll
    for (int k = 0; k < HELD; k++) held[k] = lane + WARP * k < size ? rewards[lane + WARP * k] : 0;
    // Calls body(i, reward) for this lane's rewards, in one order throughout.
    const auto each = [&](auto body) {
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (lane + WARP * k < size) body(lane + WARP * k, held[k]);
        for (int i = lane + WARP * HELD; i < size; i += WARP) body(i, rewards[i]);
    };
    const float first = __shfl_sync(0xffffffffu, held[0], 0);
    bool equal = true;
    double sum = 0;
    each([&](int, float r) {
        equal &= r == first;
        sum += (double)r;
    });
    const double mean = warp_sum(sum) / size;
    // Exactly 0, whatever the mean was rounded to.
    if (__all_sync(0xffffffffu, equal)) {
        each([&](int i, float) { advantages[i] = 0; });
        return;
    }
    double divisor = 1;
    if (divide_by_std) {
        double squares = 0;
        each([&](int, float r) { squares += ((double)r - mean) * ((double)r - mean); });
        divisor = sqrt(warp_sum(squares) / size) + (double)eps;
    }
    each([&](int i, float r) { advantages[i] = (float)(((double)r - mean) / divisor); });
}

// Looks at the offsets: `valid` becomes whether they ascend from 0 to at most `tokens`.
extern "C" __global__ void __launch_bounds__(THREADS)
    grpo_offsets(int sequences, int tokens, const unsigned* offsets, Fault fault, unsigned* valid) {
    bool good = true;
    for (int s = threadIdx.x; s <= sequences; s += THREADS) {
        const unsigned here = offsets[s];
        const unsigned limit = s == 0 ? 1u : (unsigned)tokens + 1u;
        // One that is above its successor, if there is one.
        const unsigned next = s < sequences ? offsets[s + 1] : here;
        if (here >= limit || next < here) {
            dust_fault(fault, s, here, here >= limit ? limit : next + 1u);
            good = false;
        }
    }
    const int all = __syncthreads_and(good);
    if (threadIdx.x == 0) *valid = all;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    grpo_loss(int sequences, int tokens, Loss config, const unsigned* valid, const unsigned* offsets,
              const float* weights, const float* advantages, const float* newer, const float* older,
              const float* reference, float* dlogprob, SequenceStats* stats) {
    __shared__ double sums[5][WARPS];
    __shared__ float deviations[WARPS];
    __shared__ int counts[3][WARPS];
    if (!*valid) return;
    const int s = blockIdx.x;
    // The block after the last sequence clears what belongs to none.
    if (s == sequences) {
        for (int t = offsets[s] + threadIdx.x; t < tokens; t += THREADS) dlogprob[t] = 0;
        return;
    }
    const int first = offsets[s], length = offsets[s + 1] - first;
    const double weight = weights[s], advantage = advantages[s];
    newer += first, older += first, dlogprob += first;
    if (reference != nullptr) reference += first;
    // A sequence's ratio depends on each token by 1 / tokens, and its surrogate counts once a token,
    // so that the derivative is what it is with a ratio of the token's own.
    double whole = 0;
    if (config.whole) {
        double sum = 0;
        for (int t = threadIdx.x; t < length; t += THREADS) sum += (double)newer[t] - (double)older[t];
        whole = block_sum(sum, sums[4]) / length;
    }
    double loss = 0, kl_sum = 0, moved = 0, ratios = 0;
    float deviation = 0;
    int low = 0, high = 0, dual = 0;
    for (int t = threadIdx.x; t < length; t += THREADS) {
        const double now = newer[t], own = now - (double)older[t];
        const Cut d(config.whole ? whole : own);
        const double ratio = exp(d.value);
        // On a boundary itself a ratio is not clipped; NaN comes through.
        double surrogate = ratio * advantage, slope = surrogate * d.slope;
        const bool above = advantage > 0 && ratio > config.high;
        const bool below = advantage < 0 && ratio < config.low;
        const bool beyond = advantage < 0 && !below && ratio > config.dual;
        if (above || below || beyond) {
            surrogate = (above ? config.high : below ? config.low : config.dual) * advantage;
            slope = 0;
            high += above, low += below, dual += beyond;
        }
        Estimate kl = {0, 0}, penalty = {0, 0};
        if (reference != nullptr) kl = kl_estimate(config.kl, (double)reference[t] - now);
        if (config.kl_coef != 0) penalty = {config.kl_coef * kl.value, config.kl_coef * kl.slope};
        dlogprob[t] = (float)(weight * (penalty.slope - slope));
        loss += penalty.value - surrogate;
        kl_sum += kl.value;
        const double kept = Cut(own).value;
        moved += expm1(kept) - kept;
        ratios += ratio;
        deviation = worse(deviation, (float)fabs(ratio - 1));
    }
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    loss = warp_sum(loss), kl_sum = warp_sum(kl_sum);
    moved = warp_sum(moved), ratios = warp_sum(ratios);
    low = __reduce_add_sync(0xffffffffu, low);
    high = __reduce_add_sync(0xffffffffu, high);
    dual = __reduce_add_sync(0xffffffffu, dual);
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
        deviation = worse(deviation, __shfl_xor_sync(0xffffffffu, deviation, step));
    if (lane == 0) {
        sums[0][warp] = loss, sums[1][warp] = kl_sum, sums[2][warp] = moved, sums[3][warp] = ratios;
        counts[0][warp] = low, counts[1][warp] = high, counts[2][warp] = dual;
        deviations[warp] = deviation;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int w = 1; w < WARPS; w++) {
        loss += sums[0][w], kl_sum += sums[1][w], moved += sums[2][w], ratios += sums[3][w];
        low += counts[0][w], high += counts[1][w], dual += counts[2][w];
        deviation = worse(deviation, deviations[w]);
    }
    float4* out = reinterpret_cast<float4*>(stats + s);
    out[0] = make_float4((float)(weight * loss), (float)kl_sum, (float)moved, (float)ratios);
    out[1] = make_float4(deviation, (float)low, (float)high, (float)dual);
}
