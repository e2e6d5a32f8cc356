#!/bin/sh
# Compiles the kernels of this folder to the PTX that is committed beside them, so that the tests
# need no compiler: NVCC=path/to/nvcc ./build.sh
set -e
cd "$(dirname "$0")"
for f in basic.cu gemm.cu speed.cu; do
    "${NVCC:-nvcc}" -ptx -arch=compute_80 -O3 -std=c++17 --generate-line-info "$f" -o "${f%.cu}.ptx"
done
"${NVCC:-nvcc}" -ptx -arch=compute_80 -O3 -std=c++17 --generate-line-info -DNO_WAIT gemm.cu -o gemm_no_wait.ptx
# Without line information: most of it would be of library headers.
"${NVCC:-nvcc}" -ptx -arch=compute_80 -O3 -std=c++17 library.cu -o library.ptx
# Absolute paths would differ from machine to machine.
sed -i -e "s|\"$PWD/|\"|" -e "s|\"/[^\"]*/include/|\"|" *.ptx
