// Sampling from rows of logits, without sorting.
//
// The first kernel is the one pass over the logits that plain sampling needs: it reduces each unit of 128
// tokens to its state, on all processors at once. softmax.cuh gives the order, which is that of logprob's
// kernels, so that a token's log-probability has the bits of training. The second has a block a row: it merges
// the states; plain sampling then looks for the drawn unit among their masses and reads that unit again.
//
// Masses are counted in fixed point, 2^-42 of the most probable token's. Integers add up to the same sum in any
// order: threads may add to a histogram as they come, and a cumulative sum reaches its total exactly.
//
// Top-k and top-p keep a prefix of the tokens in falling order, equal ones in rising order of tokens. Where it
// ends is found by radix selection: an f32 maps to an integer of the same order; three passes, over 11, 11 and
// 10 of its bits from the top, make histograms of the number and the mass of the tokens that share the bits
// found so far, and the end lies in the first bin, from the top, at which the sum reaches what is asked for.
// (Duane Merrill's radix selection, with masses.) The first digit holds the sign, the exponent and two bits of
// the fraction, so that logits spread over many bins and few lanes of a warp meet in one.
// Then each warp walks a run of tokens in order, and the one in whose run the draw lies walks it again.
#include "softmax.cuh"

constexpr int THREADS = FINISH_THREADS, WARPS = THREADS / WARP;
constexpr int STEP = UNIT;        // tokens that a warp reads at once, four a lane
constexpr int BINS = 1 << 11;     // of a histogram: 24 KiB with masses
constexpr float ONE = 1ull << 42;  // the mass of the most probable token
using Mass = unsigned long long;

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

// A row of z, with negative infinity behind its end.
struct Row {
    const float* logits;
    int vocab;
    float inverse;

    __device__ __forceinline__ float4 four(int token) const {
        float4 l = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        if (vocab % 4 == 0) {
            // Then rows are aligned to 16 bytes.
            if (token < vocab) l = *reinterpret_cast<const float4*>(logits + token);
        } else {
            if (token < vocab) l.x = logits[token];
            if (token + 1 < vocab) l.y = logits[token + 1];
            if (token + 2 < vocab) l.z = logits[token + 2];
            if (token + 3 < vocab) l.w = logits[token + 3];
        }
        // Negative infinity times the inverse stays what it is.
        return make_float4(scaled(l.x, inverse), scaled(l.y, inverse), scaled(l.z, inverse),
                           scaled(l.w, inverse));
    }

    __device__ __forceinline__ float at(int token) const { return scaled(logits[token], inverse); }
};

__device__ __forceinline__ Mass to_mass(float e) { return static_cast<Mass>(__fmul_rn(e, ONE)); }
__device__ __forceinline__ Mass mass_of(float z, float max) { return to_mass(exp_negative(below(z, max))); }

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

// Sum of the lanes before this one; `total` becomes that of all.
template <typename T>
__device__ __forceinline__ T warp_before(T x, T& total) {
    const int lane = threadIdx.x % WARP;
    T sum = x;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const T other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
    }
    total = __shfl_sync(0xffffffffu, sum, WARP - 1);
    return sum - x;
}

// Likewise of the threads of the block. `scratch` is free again after the caller's next barrier.
template <typename T>
__device__ __forceinline__ T block_before(T x, T& total, T (&scratch)[WARPS]) {
    const int warp = threadIdx.x / WARP;
    T of_warp;
    T before = warp_before(x, of_warp);
    if (threadIdx.x % WARP == 0) scratch[warp] = of_warp;
    __syncthreads();
    total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) before += scratch[w];
        total += scratch[w];
    }
    return before;
}

// Where a prefix of the falling order ends: it holds what has a greater key and the first `ties` tokens that
// have this one. Key 0 is below every logit's.
struct End {
    unsigned key, ties;
    bool all_ties;
};

// Integers in the order of floats. Zero has two signs and one value.
__device__ __forceinline__ unsigned key_of(float z) {
    const unsigned bits = __float_as_uint(__fadd_rn(z, 0.f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Histogram {
    unsigned count[BINS];
    Mass mass[BINS];
    unsigned count_scratch[WARPS];
    Mass mass_scratch[WARPS];
    // What the thread that finds the bin tells the others.
    unsigned bin, count_above, count_in;
    Mass mass_above, mass_in;
};

// The shortest prefix that holds `count` tokens or the share `top_p` of the mass `total`, or of the row's
// where `total` is 0. `mass` becomes what it holds.
__device__ __forceinline__ End prefix_end(Histogram& h, const Row& row, float max, unsigned count,
                                          double top_p, Mass total, Mass& mass) {
    unsigned found = 0, count_above = 0;
    Mass mass_above = 0, target = 0;
#pragma unroll 1
    for (int pass = 0; pass < 3; pass++) {
        const int low = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
        for (int i = threadIdx.x; i < BINS; i += THREADS) h.count[i] = 0, h.mass[i] = 0;
        __syncthreads();
        const auto add = [&](float z) {
            const unsigned key = key_of(z);
            if (pass > 0 && key >> (low + bits) != found) return;
            const unsigned bin = key >> low & ((1u << bits) - 1);
            atomicAdd(&h.count[bin], 1u);
            atomicAdd(&h.mass[bin], mass_of(z, max));
        };
        for (int token = threadIdx.x * 4; token < row.vocab; token += THREADS * 4) {
            const float4 z = row.four(token);
            add(z.x);
            if (token + 1 < row.vocab) add(z.y);
            if (token + 2 < row.vocab) add(z.z);
            if (token + 3 < row.vocab) add(z.w);
        }
        __syncthreads();
        // A thread has a run of bins, the first thread the topmost. It adds them from a place of its own
        // on, so that lanes meet in few banks.
        constexpr int RUN = BINS / THREADS;
        const int top = BINS - 1 - static_cast<int>(threadIdx.x) * RUN;
        unsigned count_of_run = 0, all_count;
        Mass mass_of_run = 0, all_mass;
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            const int bin = top - (i + threadIdx.x) % RUN;
            count_of_run += h.count[bin];
            mass_of_run += h.mass[bin];
        }
        unsigned count_before = count_above + block_before(count_of_run, all_count, h.count_scratch);
        Mass mass_before = mass_above + block_before(mass_of_run, all_mass, h.mass_scratch);
        if (pass == 0) {
            const Mass whole = total > 0 ? total : all_mass;
            const double share = top_p * static_cast<double>(whole);
            // The most probable token is always kept.
            target = top_p >= 1.0 ? ~0ull : share < 1.0 ? 1 : min(static_cast<Mass>(ceil(share)), whole);
        }
        const auto reached = [&](unsigned c, Mass m) { return c >= count || m >= target; };
        if (!reached(count_before, mass_before) &&
            reached(count_before + count_of_run, mass_before + mass_of_run)) {
            int bin = top;
            while (!reached(count_before + h.count[bin], mass_before + h.mass[bin])) {
                count_before += h.count[bin];
                mass_before += h.mass[bin];
                bin--;
            }
            h.bin = bin;
            h.count_above = count_before;
            h.mass_above = mass_before;
            h.count_in = h.count[bin];
            h.mass_in = h.mass[bin];
        }
        __syncthreads();
        found = found << bits | h.bin;
        count_above = h.count_above;
        mass_above = h.mass_above;
    }
    // The last bin holds equal tokens.
    const unsigned equal = h.count_in;
    const Mass each = h.mass_in / equal;
    unsigned ties = min(equal, count - count_above);
    if (target - mass_above <= h.mass_in)
        ties = min(ties, static_cast<unsigned>((target - mass_above + each - 1) / each));
    mass = mass_above + ties * each;
    return {found, ties, ties == equal};
}

// Which tokens the filters keep.
struct Kept {
    End end;
    float min_p, max;

    // Mass of a token if it is kept, `rank` equal ones before it.
    __device__ __forceinline__ Mass mass(float z, unsigned rank) const {
        const unsigned key = key_of(z);
        const float e = exp_negative(below(z, max));
        const bool in = key > end.key || (key == end.key && (end.all_ties || rank < end.ties));
        return in && (e >= min_p || z == max) ? to_mass(e) : 0;
    }
};

// The masses of this lane's four tokens, and what the lanes before hold. `rank` counts the ties that the
// warp has passed.
struct Four {
    Mass at[4];
    __device__ __forceinline__ Four(const Row& row, const Kept& kept, int token, unsigned& rank) {
        const float4 four = row.four(token);
        const float z[4] = {four.x, four.y, four.z, four.w};
        unsigned mine = rank;
        if (!kept.end.all_ties) {
            unsigned ties = 0, all;
#pragma unroll
            for (int i = 0; i < 4; i++) ties += token + i < row.vocab && key_of(z[i]) == kept.end.key;
            mine += warp_before(ties, all);
            rank += all;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            at[i] = token + i < row.vocab ? kept.mass(z[i], mine) : 0;
            if (key_of(z[i]) == kept.end.key) mine++;
        }
    }
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

// kernels

// Eight lanes reduce a unit: lane l has the quarters 2 (l % 2) and 2 (l % 2) + 1 of group l / 2.
extern "C" __global__ void __launch_bounds__(THREADS)
    sampling_states(const float* logits, const RowSampling* params, float4* states, int vocab, int units) {
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
    Sums quarter[2];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        quarter[0].add_logit(z[j].x, max);
        quarter[0].add_logit(z[j].y, max);
        quarter[1].add_logit(z[j].z, max);
        quarter[1].add_logit(z[j].w, max);
    }
    const Sums sums = (quarter[0] + quarter[1]).with_lane(1).with_lane(2).with_lane(4);
    if (lane == 0 && unit < units)
        states[static_cast<size_t>(blockIdx.x) * units + unit] = unit_state(max, sums);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sampling_draw(const float* logits, const RowSampling* params, const float4* states, unsigned* tokens,
                  float* logprob, float* kept_mass, int vocab, int units) {
    __shared__ Histogram histogram;
    __shared__ unsigned chosen, chosen_unit;
    __shared__ Mass warp_mass[WARPS], inside, of_unit;
    __shared__ unsigned warp_ties[WARPS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const RowSampling setting = params[blockIdx.x];
    const Row row{logits + static_cast<size_t>(blockIdx.x) * vocab, vocab, inverse_of(setting)};
    states += static_cast<size_t>(blockIdx.x) * units;
    const LogSumExp all = finish(states, units);

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
    const bool top_k = setting.top_k > 0 && setting.top_k < static_cast<unsigned>(vocab);
    const bool top_p = setting.top_p < 1.f, min_p = setting.min_p > 0.f;
    float share = 1.f;

    if (setting.temperature == 0.f) {
        // The first unit that holds the greatest z, and the first place in it.
        if (threadIdx.x == 0) chosen_unit = units, chosen = ~0u;
        __syncthreads();
        for (int u = threadIdx.x; u < units; u += THREADS)
            if (states[u].x == all.max) {
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
        // A thread has a run of units.
        const auto mass_of_unit = [&](int u) {
            const float4 state = states[u];
            return to_mass(__fmul_rn(state.y, exp_negative(below(state.x, all.max))));
        };
        const int run = div_ceil(units, THREADS);
        const int first = threadIdx.x * run, last = min(units, first + run);
        Mass of_run = 0, total;
        for (int u = first; u < last; u++) of_run += mass_of_unit(u);
        Mass before = block_before(of_run, total, warp_mass);
        const Mass at = point(uniform(setting), total);
        if (before <= at && at < before + of_run) {
            int u = first;
            Mass mass = mass_of_unit(u);
            while (at >= before + mass) {
                before += mass;
                mass = mass_of_unit(++u);
            }
            chosen_unit = u;
            inside = at - before;
            of_unit = mass;
        }
        __syncthreads();
        if (warp == 0) {
            // Within the unit, masses are relative to its greatest.
            const Kept everything{{0, 0, true}, 0.f, states[chosen_unit].x};
            const int token = chosen_unit * UNIT + lane * 4;
            unsigned rank = 0;
            const Four four(row, everything, token, rank);
            Mass sum;
            warp_before(four.sum(), sum);
            pick(four, token, point(static_cast<double>(inside) / static_cast<double>(of_unit), sum), &chosen);
        }
    } else {
        Kept kept{{0, 0, true}, min_p ? fminf(setting.min_p, 1.f) : 0.f, all.max};
        Mass mass = 0;
        if (top_k) kept.end = prefix_end(histogram, row, all.max, setting.top_k, 1.0, 0, mass);
        if (top_p) kept.end = prefix_end(histogram, row, all.max, ~0u, setting.top_p, mass, mass);

        const int run = div_ceil(div_ceil(vocab, STEP), WARPS) * STEP;
        const int first = warp * run, last = min(vocab, first + run);
        unsigned rank = 0;
        if (!kept.end.all_ties) {
            // How many ties the warps before have.
            unsigned ties = 0, of_warp;
            for (int step = first; step < last; step += STEP) {
                const float4 four = row.four(step + lane * 4);
                const float z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int i = 0; i < 4; i++)
                    ties += step + lane * 4 + i < vocab && key_of(z[i]) == kept.end.key;
            }
            warp_before(ties, of_warp);
            if (lane == 0) warp_ties[warp] = of_warp;
            __syncthreads();
            for (int w = 0; w < warp; w++) rank += warp_ties[w];
        }
        Mass of_lane = 0, of_warp, total = 0, before = 0;
        unsigned passed = rank;
        for (int step = first; step < last; step += STEP)
            of_lane += Four(row, kept, step + lane * 4, passed).sum();
        warp_before(of_lane, of_warp);
        if (lane == 0) warp_mass[warp] = of_warp;
        __syncthreads();
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) before += warp_mass[w];
            total += warp_mass[w];
        }
        share = fminf(1.f, static_cast<float>(static_cast<double>(total) / (all.sum * ONE)));
        const Mass at = point(uniform(setting), total);
        if (before <= at && at < before + of_warp) {
            passed = rank;
            for (int step = first; step < last; step += STEP) {
                const Four four(row, kept, step + lane * 4, passed);
                Mass of_step;
                warp_before(four.sum(), of_step);
                if (at < before + of_step) {
                    pick(four, step + lane * 4, at - before, &chosen);
                    break;
                }
                before += of_step;
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        tokens[blockIdx.x] = chosen;
        logprob[blockIdx.x] = __fsub_rn(row.at(chosen), all.lse);
        kept_mass[blockIdx.x] = share;
    }
}
