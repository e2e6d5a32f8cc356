// C = A B^T in bf16 with f32 sums: cp.async into two stages, ldmatrix, mma.sync.
#include <cuda_bf16.h>
#include <stdint.h>

#define TILE 64
#define DEPTH 32
// 16-byte pieces of a row are permuted so that ldmatrix has no bank conflicts.
__device__ __forceinline__ int place(int row, int piece) { return row * DEPTH + ((piece ^ (row >> 1 & 3)) << 3); }

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(to)), "l"(from));
}

// Four warps, each 32 x 32 of a 64 x 64 tile. M, N multiples of 64, K of 32.
extern "C" __global__ void __launch_bounds__(128) gemm(int M, int N, int K, const __nv_bfloat16* A, const __nv_bfloat16* B, float* C) {
    __shared__ __align__(16) __nv_bfloat16 as[2][TILE * DEPTH], bs[2][TILE * DEPTH];
    int t = threadIdx.x, lane = t % 32, warp = t / 32;
    int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE, wm = warp / 2 * 32, wn = warp % 2 * 32;
    float acc[2][4][4] = {};
    auto load = [&](int stage, int k0) {
        for (int i = t; i < TILE * DEPTH / 8; i += 128) {
            int row = i / 4, piece = i % 4;
            copy16(&as[stage][place(row, piece)], A + (size_t)(m0 + row) * K + k0 + piece * 8);
            copy16(&bs[stage][place(row, piece)], B + (size_t)(n0 + row) * K + k0 + piece * 8);
        }
        asm volatile("cp.async.commit_group;\n");
    };
    load(0, 0);
    for (int k0 = 0, stage = 0; k0 < K; k0 += DEPTH, stage ^= 1) {
#ifndef NO_WAIT
        asm volatile("cp.async.wait_group 0;\n" ::: "memory");
#endif
        __syncthreads();
        if (k0 + DEPTH < K) load(stage ^ 1, k0 + DEPTH);
#pragma unroll
        for (int kk = 0; kk < DEPTH; kk += 16) {
            uint32_t a[2][4], b[4][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int row = wm + i * 16 + lane % 16, piece = kk / 8 + lane / 16;
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                             : "=r"(a[i][0]), "=r"(a[i][1]), "=r"(a[i][2]), "=r"(a[i][3])
                             : "r"(shared_address(&as[stage][place(row, piece)])));
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int row = wn + j * 8 + lane % 8, piece = kk / 8 + lane / 8 % 2;
                asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
                             : "=r"(b[j][0]), "=r"(b[j][1])
                             : "r"(shared_address(&bs[stage][place(row, piece)])));
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                                 : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]), "+f"(acc[i][j][3])
                                 : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
        }
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int e = 0; e < 4; e++) {
                int row = m0 + wm + i * 16 + lane / 4 + e / 2 * 8, col = n0 + wn + j * 8 + lane % 4 * 2 + e % 2;
                C[(size_t)row * N + col] = acc[i][j][e];
            }
}
