// Where top-k and top-p end, without sorting.
//
// A token's *key* is its z as an integer of the same order, then the token counted backwards. Keys differ,
// and falling keys are the order in which filters keep: the most probable first, equal ones by token. What
// top-k and top-p keep is the keys from some `low` on, which is narrowed down in three ways, from the many
// tokens of a row to one:
//
// states    The states of a row's units (softmax.cuh) say a z below which no kept token can lie: where k
//           units have a token from there on, or where too little mass is left below for top-p: a unit has
//           no more below t than its mass, less its greatest token's if that is not below t, and then no
//           more than 127 e^t. A unit whose greatest z is less is never read again. With a row of a
//           language model that leaves few units.
// list      The keys of the other units' tokens from there on go to shared memory, in any order; bisection
//           over the keys, with the number and the mass of those above, ends where one is left.
// histogram Where they are too many for the list, a histogram over 1024 equal parts of the range of keys
//           tells which part holds the end. Only where probabilities are flat.
//
// Masses are counted in fixed point, 2^-42 of the most probable token's: sums of integers are the same in any
// order, so that threads may add as they come.
#pragma once

#include "softmax.cuh"

constexpr int THREADS = FINISH_THREADS, WARPS = THREADS / WARP;
constexpr int LIST = 2048;  // keys: 16 KiB
constexpr int BINS = 1024;
constexpr int TOKEN_BITS = 20;
constexpr float ONE = 1ull << 42;  // the mass of the most probable token
using Mass = unsigned long long;
using Key = unsigned long long;

__device__ __forceinline__ Mass to_mass(float e) { return static_cast<Mass>(__fmul_rn(e, ONE)); }
__device__ __forceinline__ Mass mass_of(float z, float max) { return to_mass(exp_negative(below(z, max))); }

// Zero has two signs and one value.
__device__ __forceinline__ Key key_of(float z, int token) {
    const unsigned bits = __float_as_uint(__fadd_rn(z, 0.f));
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<Key>(ordered) << TOKEN_BITS | ((1 << TOKEN_BITS) - 1 - token);
}

__device__ __forceinline__ float z_of(Key key) {
    const unsigned ordered = static_cast<unsigned>(key >> TOKEN_BITS);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// The least key of those that have this z.
__device__ __forceinline__ Key least_key(float z) { return key_of(z, (1 << TOKEN_BITS) - 1); }

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

// What is known of a row's units, in shared memory: the greatest z, and a sum of e^(z - max), where max is
// the unit's at first, the row's later.
struct Units {
    float* max;
    float* sum;
    __device__ __forceinline__ float2 operator[](int unit) const { return {max[unit], sum[unit]}; }
};

// A row of z, with negative infinity behind its end, and its units.
struct Row {
    const float* logits;
    int vocab;
    float inverse;  // of the temperature
    Units units;
    int unit_count;

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

    // Calls f(token, z) for the four tokens of this lane, for each unit that has a z of at least `least`, in
    // order, until it returns true. Each warp has a run of units. Four units are under way at a time.
    template <class F>
    __device__ __forceinline__ void each(float least, F f) const {
        constexpr int BATCH = 4;
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        const int run = div_ceil(unit_count, WARPS);
        const int end = min(unit_count, (warp + 1) * run);
        for (int first = warp * run; first < end; first += WARP) {
            unsigned live =
                __ballot_sync(0xffffffffu, first + lane < end && units.max[first + lane] >= least);
            while (live) {
                int token[BATCH];
                float4 z[BATCH];
#pragma unroll
                for (int b = 0; b < BATCH; b++) {
                    token[b] = -1;
                    if (live) {
                        token[b] = (first + __ffs(live) - 1) * UNIT + lane * 4;
                        z[b] = four(token[b]);
                        live &= live - 1;
                    }
                }
#pragma unroll
                for (int b = 0; b < BATCH; b++)
                    if (token[b] >= 0 && f(token[b], z[b])) return;
            }
        }
    }
};

// How many tokens, and what they hold.
struct Tally {
    unsigned count;
    Mass mass;
    __device__ __forceinline__ Tally operator+(Tally t) const { return {count + t.count, mass + t.mass}; }
    __device__ __forceinline__ Tally operator-(Tally t) const { return {count - t.count, mass - t.mass}; }
};

// A prefix is complete with so many tokens or so much mass.
struct Goal {
    unsigned count;
    Mass mass;
    __device__ __forceinline__ bool reached(Tally t) const { return t.count >= count || t.mass >= mass; }
};

// The keys among which the end of a prefix lies: it keeps those above, and `within` those from the end on.
struct Span {
    Key low, high;
    Tally above, within;
    __device__ __forceinline__ Tally prefix() const { return above + within; }
};

struct Selection {
    union {
        Key keys[LIST];
        struct {
            unsigned count[BINS];
            Mass mass[BINS];
        } bins;
    };
    unsigned listed;
    // Two of each, used in turn: the next sum does not wait until all have read this one.
    unsigned counts[2][WARPS];
    Mass masses[2][WARPS];
    // What the thread that finds the end's bin tells the others.
    unsigned bin;
    Tally above, within;
};

// Finds prefixes of a row. All threads of the block hold the same.
struct Selector {
    Selection& shared;
    const Row& row;
    float max;
    int turn = 0;
    // What the list holds.
    Key list_low = 1, list_high = 0;

    __device__ __forceinline__ Selector(Selection& shared, const Row& row, float max)
        : shared(shared), row(row), max(max) {}

    // Over the block.
    __device__ __forceinline__ Tally sum(Tally t) {
        t.count = __reduce_add_sync(0xffffffffu, t.count);
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2)
            t.mass += __shfl_xor_sync(0xffffffffu, t.mass, step);
        if (threadIdx.x % WARP == 0) {
            shared.counts[turn][threadIdx.x / WARP] = t.count;
            shared.masses[turn][threadIdx.x / WARP] = t.mass;
        }
        __syncthreads();
        t = {0, 0};
#pragma unroll
        for (int w = 0; w < WARPS; w++) t = t + Tally{shared.counts[turn][w], shared.masses[turn][w]};
        turn ^= 1;
        return t;
    }

    // A z that no kept token is below, as the units' states tell: top-k if `count` is not 0, top-p keeps all
    // but `spare` of the mass if that is not 0, min-p the share `least` of the greatest.
    __device__ __forceinline__ float floor(unsigned count, Mass spare, float least) {
        constexpr int STEPS = 4096;
        constexpr float STEP = -88.f / STEPS;  // nothing lower has a mass
        int low = 0, high = STEPS;
#pragma unroll 1
        while (low < high) {
            const int middle = (low + high) / 2;
            const float z = __fadd_rn(max, middle * STEP), e = exp_negative(middle * STEP);
            const Mass most = to_mass((UNIT - 1) * e) + 1;
            Tally mine{0, 0};
            for (int u = threadIdx.x; u < row.unit_count; u += THREADS) {
                const float2 unit = row.units[u];
                const bool above = unit.x >= z;
                const float rest = above ? fmaxf(0.f, unit.y - exp_negative(below(unit.x, max))) : unit.y;
                const Mass below_z = to_mass(rest) + 1;
                mine = mine + Tally{above, above ? min(below_z, most) : below_z};
            }
            const Tally all = sum(mine);
            const bool enough = (count > 0 && all.count >= count) || all.mass < spare || e < 0.999f * least;
            if (enough) high = middle; else low = middle + 1;
        }
        return low < STEPS ? __fadd_rn(max, low * STEP) : -FLT_MAX;
    }

    // Lists the keys of the span, if there is room for all.
    __device__ __forceinline__ bool list(const Span& span) {
        list_low = 1, list_high = 0;
        __syncthreads();
        if (threadIdx.x == 0) shared.listed = 0;
        __syncthreads();
        row.each(z_of(span.low), [&](int token, float4 four) {
            const float z[4] = {four.x, four.y, four.z, four.w};
            Key key[4];
            unsigned lanes[4], count = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                key[i] = key_of(z[i], token + i);
                lanes[i] = __ballot_sync(0xffffffffu, key[i] >= span.low && key[i] <= span.high);
                count += __popc(lanes[i]);
            }
            if (count == 0) return false;
            const int lane = threadIdx.x % WARP;
            unsigned at;
            if (lane == 0) at = atomicAdd(&shared.listed, count);
            at = __shfl_sync(0xffffffffu, at, 0);
            if (at + count > LIST) return true;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (lanes[i] >> lane & 1) shared.keys[at + __popc(lanes[i] & ((1u << lane) - 1))] = key[i];
                at += __popc(lanes[i]);
            }
            return false;
        });
        __syncthreads();
        if (shared.listed > LIST) return false;
        list_low = span.low, list_high = span.high;
        return true;
    }

    // The tally of the listed keys from `low` to `high`.
    __device__ __forceinline__ Tally listed(Key low, Key high) {
        Tally mine{0, 0};
        for (int i = threadIdx.x; i < shared.listed; i += THREADS) {
            const Key key = shared.keys[i];
            if (key >= low && key <= high) mine = mine + Tally{1, mass_of(z_of(key), max)};
        }
        return sum(mine);
    }

    // Narrows the span to one of 1024 parts; false if all of it does not reach the goal.
    __device__ __forceinline__ bool narrow(Span& span, const Goal& goal) {
        constexpr int RUN = BINS / THREADS;
        const int shift = ::max(0, 54 - __clzll(span.high - span.low));
        for (int i = threadIdx.x; i < BINS; i += THREADS) shared.bins.count[i] = 0, shared.bins.mass[i] = 0;
        __syncthreads();
        row.each(z_of(span.low), [&](int token, float4 four) {
            const float z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const Key key = key_of(z[i], token + i);
                if (key < span.low || key > span.high) continue;
                const int bin = static_cast<int>((key - span.low) >> shift);
                atomicAdd(&shared.bins.count[bin], 1u);
                atomicAdd(&shared.bins.mass[bin], mass_of(z[i], max));
            }
            return false;
        });
        __syncthreads();
        // A thread has a run of bins, the first thread the topmost.
        const int top = BINS - 1 - static_cast<int>(threadIdx.x) * RUN;
        Tally run{0, 0}, all;
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            // From a place of its own on: lanes meet in few banks.
            const int bin = top - (i + threadIdx.x) % RUN;
            run = run + Tally{shared.bins.count[bin], shared.bins.mass[bin]};
        }
        Tally above;
        above.count = block_before(run.count, all.count, shared.counts[0]);
        above.mass = block_before(run.mass, all.mass, shared.masses[0]);
        above = span.above + above;
        const bool reached = goal.reached(span.above + all);
        if (!goal.reached(above) && goal.reached(above + run)) {
            int bin = top;
            Tally within{shared.bins.count[bin], shared.bins.mass[bin]};
            while (!goal.reached(above + within)) {
                above = above + within;
                bin--;
                within = {shared.bins.count[bin], shared.bins.mass[bin]};
            }
            shared.bin = bin;
            shared.above = above;
            shared.within = within;
        }
        __syncthreads();
        if (reached) {
            span.low += static_cast<Key>(shared.bin) << shift;
            span.high = min(span.high, span.low + (1ull << shift) - 1);
            span.above = shared.above;
            span.within = shared.within;
        } else {
            span.within = all;
        }
        return reached;
    }

    // The shortest prefix that reaches the goal, or all of the span: the keys from `low` on.
    __device__ __forceinline__ void find(Span& span, const Goal& goal) {
        while (span.low < list_low || span.high > list_high) {
            if (list(span)) break;
            if (!narrow(span, goal) || span.within.count == 1) return;
        }
        span.within = listed(span.low, span.high);
        if (!goal.reached(span.prefix())) return;
#pragma unroll 1
        while (span.within.count > 1) {
            const Key middle = span.low + (span.high - span.low + 1) / 2;
            const Tally upper = listed(middle, span.high);
            if (goal.reached(span.above + upper)) {
                span.low = middle;
                span.within = upper;
            } else {
                span.above = span.above + upper;
                span.within = span.within - upper;
                span.high = middle - 1;
            }
        }
    }
};
