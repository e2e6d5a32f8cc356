// Sampling from rows of logits, without sorting.
//
// The first kernel is the one pass over the logits that plain sampling needs: it reduces each unit of 128
// tokens to its state, on all processors at once. softmax.cuh gives the order, which is that of logprob's
// kernels, so that a token's log-probability has the bits of training. The second has a block a row, which
// takes the states to shared memory and merges them. Plain sampling then looks for the drawn unit among their
// masses and reads that unit again. With filters, selection.cuh finds where they end, from the units that
// matter; then each warp walks a run of those units in order, and the one in whose run the draw lies walks it
// again.
#include "selection.cuh"

// As in src/sampling.rs.
struct RowSampling {
    unsigned long long seed;
    unsigned sequence, position;
    float temperature, top_p, min_p;
    unsigned top_k;
};

__device__ __forceinline__ float inverse_of(const RowSampling& params) {
    return params.temperature == 0.f ? 1.f : __fdiv_rn(1.f, params.temperature);
}

// Philox4x32-10 (Salmon et al. 2011): a number in [0, 1) with 53 random bits.
__device__ __forceinline__ double uniform(const RowSampling& params) {
    unsigned key[2] = {static_cast<unsigned>(params.seed), static_cast<unsigned>(params.seed >> 32)};
    unsigned counter[4] = {params.sequence, params.position, 0, 0};
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned long long a = 0xd2511f53ull * counter[0], b = 0xcd9e8d57ull * counter[2];
        counter[0] = static_cast<unsigned>(b >> 32) ^ counter[1] ^ key[0];
        counter[2] = static_cast<unsigned>(a >> 32) ^ counter[3] ^ key[1];
        counter[1] = static_cast<unsigned>(b);
        counter[3] = static_cast<unsigned>(a);
        key[0] += 0x9e3779b9u;
        key[1] += 0xbb67ae85u;
    }
    const unsigned long long bits = static_cast<unsigned long long>(counter[1]) << 32 | counter[0];
    return static_cast<double>(bits >> 11) * (1.0 / (1ull << 53));
}

// The point that a share of `total` in [0, 1) falls on, below `total`.
__device__ __forceinline__ Mass point(double share, Mass total) {
    const Mass at = static_cast<Mass>(share * static_cast<double>(total));
    return at < total ? at : total - 1;
}

// Which tokens the filters keep: `low` is the last key of top-k and top-p.
struct Kept {
    Key low;
    float min_p, max;

    // Mass of a token if it is kept.
    __device__ __forceinline__ Mass mass(float z, int token) const {
        const float e = exp_negative(below(z, max));
        return key_of(z, token) >= low && (e >= min_p || z == max) ? to_mass(e) : 0;
    }
};

// The masses of this lane's four tokens.
struct Four {
    Mass at[4];
    __device__ __forceinline__ Four(const Kept& kept, int token, float4 z)
        : at{kept.mass(z.x, token), kept.mass(z.y, token + 1), kept.mass(z.z, token + 2),
             kept.mass(z.w, token + 3)} {}
    __device__ __forceinline__ Mass sum() const { return at[0] + at[1] + at[2] + at[3]; }
};

// Of the warp's 128 masses, in order, the one at which their sum passes `at`, which is below their sum.
__device__ __forceinline__ void pick(const Four& four, int token, Mass at, unsigned* chosen) {
    Mass all, before = warp_before(four.sum(), all);
    if (at < before || at >= before + four.sum()) return;
    int i = 0;
    while (i < 3 && at >= before + four.at[i]) before += four.at[i++];
    *chosen = token + i;
}

// What the warps before this one hold; `scratch` becomes what each holds.
__device__ __forceinline__ Mass of_warps_before(Mass of_lane, Mass& total, Mass (&scratch)[WARPS]) {
    return __shfl_sync(0xffffffffu, block_before(of_lane, total, scratch), 0);
}

// kernels

// Eight lanes reduce a unit: lane l has the quarters 2 (l % 2) and 2 (l % 2) + 1 of group l / 2.
extern "C" __global__ void __launch_bounds__(THREADS)
    sampling_states(const float* logits, const RowSampling* params, float2* states, int vocab, int units) {
    const int lane = threadIdx.x % 8, unit = blockIdx.y * (THREADS / 8) + threadIdx.x / 8;
    const Row row{logits + static_cast<size_t>(blockIdx.x) * vocab, vocab, inverse_of(params[blockIdx.x])};
    const int token = unit * UNIT + lane / 2 * 32 + lane % 2 * 4;
    float4 z[4];
    float max = -FLT_MAX;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        z[j] = row.four(token + 8 * j);
        max = fmaxf(max, fmaxf(fmaxf(z[j].x, z[j].y), fmaxf(z[j].z, z[j].w)));
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, step));
    // In the order of Sums, without what only the entropy needs.
    float quarter[2] = {0.f, 0.f};
    const auto add = [max](float& sum, float z) { sum = __fadd_rn(sum, exp_negative(below(z, max))); };
#pragma unroll
    for (int j = 0; j < 4; j++) {
        add(quarter[0], z[j].x);
        add(quarter[0], z[j].y);
        add(quarter[1], z[j].z);
        add(quarter[1], z[j].w);
    }
    float sum = __fadd_rn(quarter[0], quarter[1]);
#pragma unroll
    for (int step = 1; step < 8; step *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, step));
    if (lane == 0 && unit < units)
        states[static_cast<size_t>(blockIdx.x) * units + unit] = make_float2(max, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sampling_draw(const float* logits, const RowSampling* params, const float2* states, unsigned* tokens,
                  float* logprob, float* kept_mass, int vocab, int units) {
    extern __shared__ float of_units[];
    __shared__ Selection selection;
    __shared__ unsigned chosen, chosen_unit;
    __shared__ Mass warp_mass[WARPS], inside, of_unit;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const RowSampling setting = params[blockIdx.x];
    const Row row{logits + static_cast<size_t>(blockIdx.x) * vocab, vocab, inverse_of(setting),
                  {of_units, of_units + units}, units};
    for (int u = threadIdx.x; u < units; u += THREADS) {
        const float2 state = states[static_cast<size_t>(blockIdx.x) * units + u];
        row.units.max[u] = state.x;
        row.units.sum[u] = state.y;
    }
    const LogSumExp all = finish(row.units, units);

    const bool valid = setting.temperature >= 0.f && setting.temperature < INFINITY &&
                       setting.top_p == setting.top_p && setting.min_p == setting.min_p &&
                       all.sum > 0.0 && all.sum < INFINITY;
    if (!valid) {
        if (threadIdx.x == 0) {
            tokens[blockIdx.x] = ~0u;
            logprob[blockIdx.x] = NAN;
            kept_mass[blockIdx.x] = 0.f;
        }
        return;
    }
    // From here on, a unit's sum is relative to the row's greatest.
    for (int u = threadIdx.x; u < units; u += THREADS)
        row.units.sum[u] = __fmul_rn(row.units.sum[u], exp_negative(below(row.units.max[u], all.max)));
    if (threadIdx.x == 0) chosen_unit = units, chosen = ~0u;
    __syncthreads();
    const bool top_k = setting.top_k > 0 && setting.top_k < static_cast<unsigned>(vocab);
    const bool top_p = setting.top_p < 1.f, min_p = setting.min_p > 0.f;
    float share = 1.f;

    if (setting.temperature == 0.f) {
        // The first unit that holds the greatest z, and the first place in it.
        for (int u = threadIdx.x; u < units; u += THREADS)
            if (row.units.max[u] == all.max) {
                atomicMin(&chosen_unit, static_cast<unsigned>(u));
                break;
            }
        __syncthreads();
        const int token = chosen_unit * UNIT + lane * 4;
        if (warp == 0) {
            const float4 z = row.four(token);
            const int at = z.x == all.max ? 0 : z.y == all.max ? 1 : z.z == all.max ? 2 : 3;
            if (z.x == all.max || z.y == all.max || z.z == all.max || z.w == all.max)
                atomicMin(&chosen, static_cast<unsigned>(token + at));
        }
    } else if (!(top_k || top_p || min_p)) {
        // A warp has a run of units.
        const int run = div_ceil(units, WARPS), first = warp * run, last = min(units, first + run);
        Mass of_lane = 0, total;
        for (int u = first + lane; u < last; u += WARP) of_lane += to_mass(row.units.sum[u]);
        Mass before = of_warps_before(of_lane, total, warp_mass);
        const Mass at = point(uniform(setting), total);
        if (before <= at && at < before + warp_mass[warp])
            for (int u = first + lane; before <= at; u += WARP) {
                const Mass mass = u < last ? to_mass(row.units.sum[u]) : 0;
                Mass of_step;
                const Mass here = before + warp_before(mass, of_step);
                if (here <= at && at < here + mass) {
                    chosen_unit = u;
                    inside = at - here;
                    of_unit = mass;
                }
                before += of_step;
            }
        __syncthreads();
        if (warp == 0) {
            // Within the unit, masses are relative to its greatest.
            const int token = chosen_unit * UNIT + lane * 4;
            const Four four({0, 0.f, row.units.max[chosen_unit]}, token, row.four(token));
            Mass sum;
            warp_before(four.sum(), sum);
            pick(four, token, point(static_cast<double>(inside) / static_cast<double>(of_unit), sum), &chosen);
        }
    } else {
        const float least = min_p ? fminf(setting.min_p, 1.f) : 0.f;
        Selector selector(selection, row, all.max);
        // Top-p needs the mass of all that top-k keeps. A little less than top-p may drop: the states' masses
        // are rounded.
        const double spare = top_p ? all.sum * ((1.0 - setting.top_p) * 0.999 - 4e-6) : 0.0;
        const float floor = top_k ? selector.floor(setting.top_k, 0, 0.f)
                                  : selector.floor(0, spare > 0.0 ? static_cast<Mass>(spare * ONE) : 0, least);
        Span span{least_key(floor), key_of(all.max, 0), {0, 0}, {0, 0}};
        if (top_k) {
            selector.find(span, {setting.top_k, ~0ull});
            span = {span.low, key_of(all.max, 0), {0, 0}, span.prefix()};
        }
        if (top_p) {
            const double goal = setting.top_p * (top_k ? static_cast<double>(span.within.mass) : all.sum * ONE);
            // The most probable token is always kept.
            selector.find(span, {~0u, goal < 1.0 ? 1 : static_cast<Mass>(ceil(goal))});
        }

        const Kept kept{span.low, least, all.max};
        Mass of_lane = 0, total;
        row.each(z_of(kept.low), [&](int token, float4 z) {
            of_lane += Four(kept, token, z).sum();
            return false;
        });
        Mass before = of_warps_before(of_lane, total, warp_mass);
        share = fminf(1.f, static_cast<float>(static_cast<double>(total) / (all.sum * ONE)));
        const Mass at = point(uniform(setting), total);
        if (before <= at && at < before + warp_mass[warp])
            row.each(z_of(kept.low), [&](int token, float4 z) {
                const Four four(kept, token, z);
                Mass of_step;
                warp_before(four.sum(), of_step);
                if (at < before + of_step) {
                    pick(four, token, at - before, &chosen);
                    return true;
                }
                before += of_step;
                return false;
            });
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        tokens[blockIdx.x] = chosen;
        logprob[blockIdx.x] = __fsub_rn(row.at(chosen), all.lse);
        kept_mass[blockIdx.x] = share;
    }
}
