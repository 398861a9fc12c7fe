# Source this: `. SITE/env.sh` makes SITE, what bundle.py has packed, this shell's environment.
SITE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")")")}
export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$SITE/compiled}   # kernels that are compiled at first use
export FLOWPREFILL_CACHE_DIR=${FLOWPREFILL_CACHE_DIR:-$SITE/cache}
export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1                                   # sgl_kernel is a stand-in
export SGLANG_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo     # there is no network
export HF_HUB_OFFLINE=1
mkdir -p "$FLASHINFER_WORKSPACE_BASE" "$FLOWPREFILL_CACHE_DIR"
