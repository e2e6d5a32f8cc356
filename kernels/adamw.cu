// AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) and the global gradient norm.
//
// adamw           One pass: 16 bytes read and 12 to 14 written a parameter, in 16-byte accesses (8
//                 for the copy), four parameters a thread. Every rounding is spelt out, so that the
//                 compiler cannot fuse what the CPU does not.
// sum_of_squares  Two levels: a block adds 16 Ki elements in f64, where squares of f32 are exact; a
//                 second kernel adds the blocks' sums. The order depends on the length alone.
// clip_scale      One warp: the norm never goes to the host. A norm that is no number gives scale
//                 0, by which adamw leaves everything as it was.

#include "wide.cuh"

constexpr int THREADS = 256;
constexpr int CHUNK = 16 * 1024;  // elements of a block: 16 loads of 16 bytes a thread

struct Step {
    float learning_rate, beta1, beta2, correct1, correct2, eps, weight_decay;
};

struct Parameter {
    float p, m, v;
};

__device__ __forceinline__ Parameter update(const Step& s, float scale, float grad, Parameter old) {
    const float g = __fmul_rn(grad, scale);
    const float m = __fmaf_rn(old.m, s.beta1, __fmul_rn(g, 1.0f - s.beta1));
    const float v = __fmaf_rn(old.v, s.beta2, __fmul_rn(__fmul_rn(g, g), 1.0f - s.beta2));
    const float root = __fadd_rn(__fsqrt_rn(__fmul_rn(v, s.correct2)), s.eps);
    const float change = __fdiv_rn(__fmul_rn(m, s.correct1), root);
    const float decayed = __fmaf_rn(old.p, s.weight_decay, change);
    return {__fmaf_rn(decayed, -s.learning_rate, old.p), m, v};
}

// kernels

extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(size_t len, Step step, const float* scale, const float* grad, float* param, float* m,
          float* v, bf16* copy) {
    const float factor = *scale;
    if (factor == 0) return;
    const size_t at = 4 * ((size_t)blockIdx.x * THREADS + threadIdx.x);
    if (at + 4 <= len) {
        const float4 g4 = *reinterpret_cast<const float4*>(grad + at);
        float4& p4 = *reinterpret_cast<float4*>(param + at);
        float4& m4 = *reinterpret_cast<float4*>(m + at);
        float4& v4 = *reinterpret_cast<float4*>(v + at);
        const float4 p = p4, first = m4, second = v4;
        const Parameter a = update(step, factor, g4.x, {p.x, first.x, second.x});
        const Parameter b = update(step, factor, g4.y, {p.y, first.y, second.y});
        const Parameter c = update(step, factor, g4.z, {p.z, first.z, second.z});
        const Parameter d = update(step, factor, g4.w, {p.w, first.w, second.w});
        p4 = make_float4(a.p, b.p, c.p, d.p);
        m4 = make_float4(a.m, b.m, c.m, d.m);
        v4 = make_float4(a.v, b.v, c.v, d.v);
        if (copy != nullptr)
            *reinterpret_cast<uint2*>(copy + at) = make_uint2(round2(a.p, b.p), round2(c.p, d.p));
        return;
    }
    for (size_t i = at; i < len; i++) {
        const Parameter a = update(step, factor, grad[i], {param[i], m[i], v[i]});
        param[i] = a.p, m[i] = a.m, v[i] = a.v;
        if (copy != nullptr) copy[i] = __float2bfloat16_rn(a.p);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sum_of_squares(size_t len, const float* x, double* partial) {
    __shared__ double scratch[THREADS / WARP];
    const size_t first = (size_t)blockIdx.x * CHUNK;
    const int here = (int)min(len - first, (size_t)CHUNK), whole = here / 4;
    x += first;
    double sum = 0;
    const auto add = [&](float value) { sum = fma((double)value, (double)value, sum); };
    for (int i = threadIdx.x; i < whole; i += THREADS) {
        const float4 four = reinterpret_cast<const float4*>(x)[i];
        add(four.x), add(four.y), add(four.z), add(four.w);
    }
    const int last = 4 * whole + threadIdx.x;
    if (last < here) add(x[last]);
    const double total = block_sum(sum, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sum_of_partials(int count, const double* partial, float* out) {
    __shared__ double scratch[THREADS / WARP];
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += partial[i];
    const double total = block_sum(sum, scratch);
    if (threadIdx.x == 0) *out = (float)total;
}

extern "C" __global__ void __launch_bounds__(WARP)
    clip_scale(int sums, float max_norm, const float* squares, float* norm, float* scale) {
    double sum = 0;
    for (int i = threadIdx.x; i < sums; i += WARP) sum += (double)squares[i];
    const float root = (float)sqrt(warp_sum(sum));
    if (threadIdx.x != 0) return;
    *norm = root;
    *scale = isfinite(root) ? fminf(max_norm / root, 1.0f) : 0.0f;
}
