// Kernels that between them use most of what a compiler emits for plain code.
#include <stdint.h>

extern "C" __global__ void saxpy(int n, float a, const float* x, float* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}

// One block per row; shuffles, then shared memory.
extern "C" __global__ void row_sum(int n, const float* x, float* out) {
    __shared__ float part[32];
    float s = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) s += x[blockIdx.x * n + i];
    for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(0xffffffff, s, d);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x < 32) {
        s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.0f;
        for (int d = 16; d > 0; d /= 2) s += __shfl_down_sync(0xffffffff, s, d);
        if (threadIdx.x == 0) out[blockIdx.x] = s;
    }
}

extern "C" __global__ void transpose(int rows, int cols, const float* x, float* y) {
    __shared__ float tile[32][33];
    int c = blockIdx.x * 32 + threadIdx.x, r0 = blockIdx.y * 32;
    for (int r = threadIdx.y; r < 32; r += blockDim.y)
        if (c < cols && r0 + r < rows) tile[r][threadIdx.x] = x[(size_t)(r0 + r) * cols + c];
    __syncthreads();
    int r = r0 + threadIdx.x, c0 = blockIdx.x * 32;
    for (int k = threadIdx.y; k < 32; k += blockDim.y)
        if (r < rows && c0 + k < cols) y[(size_t)(c0 + k) * rows + r] = tile[threadIdx.x][k];
}

// The same with a tile whose columns fall into one bank.
extern "C" __global__ void transpose_conflicts(int n, const float* x, float* y) {
    __shared__ float tile[32][32];
    int c = blockIdx.x * 32, r = blockIdx.y * 32;
    tile[threadIdx.y][threadIdx.x] = x[(r + threadIdx.y) * n + c + threadIdx.x];
    __syncthreads();
    y[(c + threadIdx.y) * n + r + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
}

extern "C" __global__ void softmax(int n, const float* x, float* y) {
    extern __shared__ float row[];
    __shared__ float red[32];
    const float* in = x + (size_t)blockIdx.x * n;
    float m = -INFINITY;
    for (int i = threadIdx.x; i < n; i += blockDim.x) { row[i] = in[i]; m = fmaxf(m, in[i]); }
    for (int d = 16; d > 0; d /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
    if (threadIdx.x % 32 == 0) red[threadIdx.x / 32] = m;
    __syncthreads();
    m = red[0];
    for (int w = 1; w < blockDim.x / 32; w++) m = fmaxf(m, red[w]);
    float s = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) { float e = __expf(row[i] - m); row[i] = e; s += e; }
    for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(~0u, s, d);
    __syncthreads();
    if (threadIdx.x % 32 == 0) red[threadIdx.x / 32] = s;
    __syncthreads();
    s = 0;
    for (int w = 0; w < blockDim.x / 32; w++) s += red[w];
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[(size_t)blockIdx.x * n + i] = row[i] / s;
}

extern "C" __global__ void histogram(int n, const uint8_t* x, unsigned* bins) {
    __shared__ unsigned own[256];
    own[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&own[x[i]], 1u);
    __syncthreads();
    if (own[threadIdx.x]) atomicAdd(&bins[threadIdx.x], own[threadIdx.x]);
}

__device__ __noinline__ long long collatz(long long n, int limit) {
    int steps = 0;
    while (n != 1 && steps < limit) { n = n & 1 ? 3 * n + 1 : n >> 1; steps++; }
    return steps;
}

__device__ __noinline__ unsigned fib(unsigned n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }

extern "C" __global__ void functions(int n, int* steps, unsigned* f) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    steps[i] = (int)collatz(i + 1, 1000);
    f[i] = fib(i % 12);
}

// A local array indexed at run time.
extern "C" __global__ void local_sort(int n, const int* x, int* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int a[16];
    for (int k = 0; k < 16; k++) a[k] = x[i * 16 + k];
    for (int k = 1; k < 16; k++) {
        int v = a[k], j = k;
        while (j > 0 && a[j - 1] > v) { a[j] = a[j - 1]; j--; }
        a[j] = v;
    }
    for (int k = 0; k < 16; k++) y[i * 16 + k] = a[k];
}

// Positions of the positive values: ballot and prefix counts.
extern "C" __global__ void compact(int n, const int* x, int* out, int* count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    bool keep = i < n && x[i] > 0;
    unsigned votes = __ballot_sync(~0u, keep);
    int base = 0;
    if (lane == 0 && votes) base = atomicAdd(count, __popc(votes));
    base = __shfl_sync(~0u, base, 0);
    if (keep) out[base + __popc(votes & ((1u << lane) - 1))] = i;
}

__constant__ int table[8] = {3, 1, 4, 1, 5, 9, 2, 6};
__device__ int counter = 5;

// A switch, constant memory, a device variable, votes and matches.
extern "C" __global__ void mixed(const int* x, int* out) {
    int i = threadIdx.x, v = x[i], r;
    switch (v) {
        case 0: r = 11 * i; break;
        case 1: r = i - 7; break;
        case 2: r = i * i; break;
        case 3: r = ~i; break;
        case 4: r = i << 3; break;
        case 5: r = i % 5; break;
        case 6: r = __brev(i); break;
        default: r = table[i & 7];
    }
    r += __popc(__match_any_sync(~0u, v));
    r += __reduce_add_sync(~0u, v);
    if (__all_sync(~0u, v >= 0)) r += counter;
    out[i] = r;
}

struct Point { double x; float y; int n; };

extern "C" __global__ void by_value(Point p, double* out) {
    int i = threadIdx.x;
    out[i] = sqrt(p.x * i) / (p.y + 1.0) + sin((double)i * p.n);
}

// Sums by a tree of f64, f16 and 64-bit values.
extern "C" __global__ void wide(int n, const double* x, const long long* k, double* sum, unsigned long long* mul) {
    __shared__ double s[128];
    double a = 0;
    unsigned long long p = 1;
    for (int i = threadIdx.x; i < n; i += 128) { a += x[i]; p *= (unsigned long long)k[i]; }
    s[threadIdx.x] = a;
    for (int d = 64; d > 0; d /= 2) {
        __syncthreads();
        if (threadIdx.x < d) s[threadIdx.x] += s[threadIdx.x + d];
    }
    if (threadIdx.x == 0) *sum = s[0];
    mul[threadIdx.x] = p / 3 + __umul64hi(p, 0x123456789abcdefull) % 1000;
}

// The last block sums what the others left: ordered by fence and atomic.
extern "C" __global__ void last_block(int n, const int* x, int* part, unsigned* done, int* out) {
    __shared__ bool last;
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int v = __reduce_add_sync(~0u, i < n ? x[i] : 0);
    if (threadIdx.x == 0) {
        part[blockIdx.x] = v;
        __threadfence();
        last = atomicAdd(done, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        int s = 0;
        for (int b = 0; b < gridDim.x; b++) s += part[b];
        *out = s;
    }
}
