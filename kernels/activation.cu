// SwiGLU (Shazeer 2020, arXiv 2002.05202) and its gradient: elementwise, memory-bound, one 16-byte
// vector of gates and of ups a thread.
//
// Sigmoid s(g) and 1 - s(g) both come from exp(-|g|), which neither overflows nor cancels. Where g
// is itself a factor it is cut to +-88, beyond which the other factor is 0, so that an infinite
// gate gives 0 or its own size and not NaN.

#include "common.cuh"

constexpr int THREADS = 256;
constexpr float LIMIT = 88.0f;

struct Sigmoid {
    float value, rest;  // s(g), 1 - s(g)

    __device__ __forceinline__ explicit Sigmoid(float g) {
        const float e = __expf(-fabsf(g));
        const float large = __fdividef(1.0f, 1.0f + e), small = e * large;
        value = g >= 0 ? large : small;
        rest = g >= 0 ? small : large;
    }
};

// `vectors` of 8 in a row of the output; `count` in all rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu(int count, int vectors, const bf16* gate_up, bf16* out) {
    const int v = blockIdx.x * THREADS + threadIdx.x;
    if (v >= count) return;
    const bf16* gates = gate_up + 8 * ((size_t)v + v / vectors * vectors);
    const Float8 gate = widen(load8(gates)), up = widen(load8(gates + 8 * vectors));
    Float8 y;
#pragma unroll
    for (int i = 0; i < 8; i++)
        y.at[i] = fmaxf(gate.at[i], -LIMIT) * Sigmoid(gate.at[i]).value * up.at[i];
    store8(out + 8 * (size_t)v, round8(y));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_backward(int count, int vectors, const bf16* gate_up, const bf16* dout, bf16* dgate_up) {
    const int v = blockIdx.x * THREADS + threadIdx.x;
    if (v >= count) return;
    const size_t at = 8 * ((size_t)v + v / vectors * vectors);
    const Float8 gate = widen(load8(gate_up + at)), up = widen(load8(gate_up + at + 8 * vectors));
    const Float8 d = widen(load8(dout + 8 * (size_t)v));
    Float8 dgate, dup;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const Sigmoid s(gate.at[i]);
        const float above = fmaxf(gate.at[i], -LIMIT), both = fminf(above, LIMIT);
        dgate.at[i] = d.at[i] * up.at[i] * (s.value * fmaf(both, s.rest, 1.0f));
        dup.at[i] = d.at[i] * (above * s.value);
    }
    store8(dgate_up + at, round8(dgate));
    store8(dgate_up + at + 8 * vectors, round8(dup));
}
