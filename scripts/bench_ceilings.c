// The machine's own ceilings: f32 multiply-add peak and memory read bandwidth, on N threads.
// Prints one JSON object. Built by bench_peers.py with gcc -O3 -march=native -ffast-math -fopenmp.
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));

// Twelve independent sums hide the latency of the multiply-add (4 cycles x 2 units = 8 in flight).
// Each has a name of its own: an array would be kept in memory.
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

static double fma_gflops(void) {
    const long rounds = 40000000;
    float sink = 0;
    double start = omp_get_wtime();
#pragma omp parallel reduction(+ : sink)
    {
        vec a, b;
        for (int l = 0; l < LANES; l++) a[l] = 0.999f + 1e-6f * omp_get_thread_num(), b[l] = 1e-3f;
#define START(i) vec sum##i = a * (float)i;
        EACH(START)
        for (long r = 0; r < rounds; r++) {
            // The empty statement keeps the compiler from folding the loop.
#define STEP(i) sum##i = sum##i * a + b; __asm__ volatile("" : "+x"(sum##i));
            EACH(STEP)
        }
#define FINISH(i) sink += sum##i[0];
        EACH(FINISH)
    }
    double seconds = omp_get_wtime() - start;
    if (sink == 42) puts("");
    return 2.0 * LANES * 12 * rounds * omp_get_max_threads() / seconds * 1e-9;
}

// Sums 512 MB, far beyond any cache, best of five passes.
static double read_gbs(void) {
    const size_t n = 128u << 20;
    float *data = aligned_alloc(4096, n * sizeof(float));
    if (!data) return 0;
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) data[i] = (float)(i & 7);
    double best = 1e9;
    float sink = 0;
    for (int pass = 0; pass < 5; pass++) {
        double start = omp_get_wtime();
        float sum = 0;
#pragma omp parallel for simd reduction(+ : sum)
        for (size_t i = 0; i < n; i++) sum += data[i];
        double seconds = omp_get_wtime() - start;
        sink += sum;
        if (seconds < best) best = seconds;
    }
    free(data);
    if (sink == 42) puts("");
    return n * sizeof(float) / best * 1e-9;
}

int main(void) {
    printf("{\"fma_gflops\": %.1f, \"read_gbs\": %.1f}\n", fma_gflops(), read_gbs());
    return 0;
}
