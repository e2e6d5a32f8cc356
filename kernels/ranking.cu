// Rewards of rankings, and two losses that train scores to rank: Plackett-Luce (ListMLE, Xia et al.
// 2008) and pairwise logistic (RankNet, Burges et al. 2005).
//
// Lists are short, so that sums over pairs and suffixes are plain double loops over shared memory,
// in f64: a thread owns an item and walks over all others in their order, which is the CPU's.
//
// rewards  A warp owns a ranking of up to 64 items, two a lane.
// losses   A block owns a list. All lanes of a warp look at the same item at a time, so that shared
//          memory is read by broadcast, and meet before they store. An order that is no permutation is
//          noted and its list left alone. Device memory is read and written in the order of items; by rank
//          they are gathered in shared memory.

#include "wide.cuh"

constexpr int RANKINGS = 4;  // warps, and so rankings, of a block of rewards
constexpr int MOST = 64;     // items of a ranking
constexpr int THREADS = 64;  // of a list

enum Reward { PAIRWISE_ACCURACY, NDCG, SELECTION };

// Discounted gain of labels in the order of a ranking, over a warp.
__device__ __forceinline__ double discounted_gain(const float* ranked, int items) {
    double sum = 0;
    for (int rank = threadIdx.x % WARP; rank < items; rank += WARP)
        sum += (exp2((double)ranked[rank]) - 1) / log2((double)(rank + 2));
    return warp_sum(sum);
}

// An integer that orders floats totally, NaN included.
__device__ __forceinline__ int order_key(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (int)((unsigned)(bits >> 31) >> 1);
}

// ln(1 + exp(x)) and its derivative, without overflow.
__device__ __forceinline__ double softplus(double x, double& slope) {
    const double e = exp(-fabs(x));
    slope = (x > 0 ? 1.0 : e) / (1.0 + e);
    return (x > 0 ? x : 0.0) + log1p(e);
}

// kernels

extern "C" __global__ void __launch_bounds__(RANKINGS* WARP)
    ranking_reward(int rankings, int items, int kind, float invalid, const unsigned* order,
                   const float* labels, float* rewards) {
    __shared__ float shared[RANKINGS][2][MOST];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int ranking = blockIdx.x * RANKINGS + warp;
    if (ranking >= rankings) return;
    order += (size_t)ranking * items;
    labels += (size_t)ranking * items;
    float* ranked = shared[warp][0];
    float* ideal = shared[warp][1];
    // Two labels a lane, loaded side by side and handed from lane to lane.
    const float low = lane < items ? labels[lane] : 0.f;
    const float high = lane + WARP < items ? labels[lane + WARP] : 0.f;
    unsigned long long seen = 0;
    bool inside = true;
    for (int first = 0; first < items; first += WARP) {
        const int rank = first + lane;
        const unsigned item = rank < items ? order[rank] : 0;
        const float a = __shfl_sync(0xffffffffu, low, item % WARP);
        const float b = __shfl_sync(0xffffffffu, high, item % WARP);
        if (rank < items) {
            ranked[rank] = item < WARP ? a : b;
            if (item < items) seen |= 1ull << item; else inside = false;
        }
    }
    const int different = __popc(__reduce_or_sync(0xffffffffu, (unsigned)seen)) +
                          __popc(__reduce_or_sync(0xffffffffu, (unsigned)(seen >> 32)));
    if (!__all_sync(0xffffffffu, inside) || different != items) {
        if (lane == 0) rewards[ranking] = invalid;
        return;
    }
    __syncwarp();
    float reward = ranked[0] > 0;
    if (kind == PAIRWISE_ACCURACY) {
        int pairs = 0, right = 0;
        for (int rank = lane; rank < items; rank += WARP)
            for (int lower = rank + 1; lower < items; lower++) {
                pairs += ranked[rank] != ranked[lower];
                right += ranked[rank] > ranked[lower];
            }
        pairs = __reduce_add_sync(0xffffffffu, pairs);
        right = __reduce_add_sync(0xffffffffu, right);
        if (pairs > 0) reward = (float)((double)right / (double)pairs);
    } else if (kind == NDCG) {
        // Each label to its place in the best order: after all that are greater, and the equal
        // ones before it.
        for (int rank = lane; rank < items; rank += WARP) {
            int place = 0;
            const int key = order_key(ranked[rank]);
            for (int other = 0; other < items; other++) {
                const int that = order_key(ranked[other]);
                place += that > key || (other < rank && that == key);
            }
            ideal[place] = ranked[rank];
        }
        __syncwarp();
        const double best = discounted_gain(ideal, items);
        reward = best == 0 ? 0.0f : (float)(discounted_gain(ranked, items) / best);
    }
    if (lane == 0) rewards[ranking] = reward;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    plackett_luce_loss(int items, float weight, const float* scores, const unsigned* order,
                       Fault outside, Fault repeated, float* loss, float* dscores) {
    __shared__ double scratch[THREADS / WARP];
    // By rank: one over the sum of the suffix, its largest score, the score, the item; by item: the score,
    // later its gradient; then a bit an item.
    extern __shared__ double share[];
    float* top = reinterpret_cast<float*>(share + items);
    float* score = top + items;
    unsigned* item_at = reinterpret_cast<unsigned*>(score + items);
    float* of_item = reinterpret_cast<float*>(item_at + items);
    unsigned* seen = reinterpret_cast<unsigned*>(of_item + items);
    const size_t list = (size_t)blockIdx.x * items;
    for (int i = threadIdx.x; i < div_ceil(items, 32); i += THREADS) seen[i] = 0;
    for (int i = threadIdx.x; i < items; i += THREADS) of_item[i] = scores[list + i];
    __syncthreads();
    bool good = true;
    for (int rank = threadIdx.x; rank < items; rank += THREADS) {
        const unsigned item = order[list + rank];
        item_at[rank] = item;
        if (item >= items) {
            dust_fault(outside, list + rank, item, items);
            good = false;
        } else if (atomicOr(&seen[item / 32], 1u << item % 32) >> item % 32 & 1) {
            dust_fault(repeated, list + item, 2, 2);
            good = false;
        } else {
            score[rank] = of_item[item];
        }
    }
    if (!__syncthreads_and(good)) return;
    double part = 0;
    for (int first = 0; first < items; first += THREADS) {
        const int rank = first + threadIdx.x;
        float largest = -INFINITY;
        double total = 0;
        for (int k = first; k < items; k++)
            if (k >= rank && score[k] > largest) largest = score[k];
        for (int k = first; k < items; k++)
            if (k >= rank) total += exp((double)score[k] - (double)largest);
        if (rank < items) {
            share[rank] = 1 / total;
            top[rank] = largest;
            part += log(total) + ((double)largest - (double)score[rank]);
        }
    }
    const double all = block_sum(part, scratch);
    if (threadIdx.x == 0) loss[blockIdx.x] = (float)((double)weight * all);
    for (int first = 0; first < items; first += THREADS) {
        const int rank = first + threadIdx.x;
        double gradient = -1;
        // The choice made, and the share in every choice at or above the rank.
        for (int k = min(first + THREADS, items) - 1; k >= 0; k--)
            if (k <= rank && rank < items)
                gradient += exp((double)score[rank] - (double)top[k]) * share[k];
        __syncwarp();
        if (rank < items) of_item[item_at[rank]] = (float)((double)weight * gradient);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < items; i += THREADS) dscores[list + i] = of_item[i];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    pairwise_logistic_loss(int items, float weight, const float* scores, const float* labels,
                           float* loss, float* dscores) {
    __shared__ double scratch[THREADS / WARP];
    __shared__ int counts[THREADS / WARP];
    extern __shared__ float score[];
    float* label = score + items;
    const size_t list = (size_t)blockIdx.x * items;
    for (int i = threadIdx.x; i < items; i += THREADS) {
        score[i] = scores[list + i];
        label[i] = labels[list + i];
    }
    __syncthreads();
    int pairs = 0;
    for (int i = threadIdx.x; i < items; i += THREADS)
        for (int j = 0; j < items; j++) pairs += label[i] > label[j];
    pairs = __reduce_add_sync(0xffffffffu, pairs);
    if (threadIdx.x % WARP == 0) counts[threadIdx.x / WARP] = pairs;
    __syncthreads();
    pairs = counts[0] + counts[1];
    const double share = 1.0 / max(pairs, 1);
    double part = 0;
    for (int first = 0; first < items; first += THREADS) {
        const int i = first + threadIdx.x;
        double gradient = 0;
        for (int j = 0; i < items && j < items; j++) {
            double slope;
            if (label[i] > label[j]) {
                part += softplus((double)score[j] - (double)score[i], slope);
                gradient -= slope;
            } else if (label[j] > label[i]) {
                softplus((double)score[i] - (double)score[j], slope);
                gradient += slope;
            }
        }
        __syncwarp();
        if (i < items) dscores[list + i] = (float)((double)weight * (gradient * share));
    }
    const double all = block_sum(part, scratch);
    if (threadIdx.x == 0) loss[blockIdx.x] = (float)((double)weight * (all * share));
}
