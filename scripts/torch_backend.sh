# Sourced by setup.sh: which of torch 2.11's wheels this machine's NVIDIA driver can run.
#
# PyPI has those for CUDA 13, which need driver 580 or newer; download.pytorch.org has the same version for CUDA 12.8 and
# 12.6. Without a driver PyPI's serve, on the CPU. UV_TORCH_BACKEND=cu126 (or another of uv's words) chooses by hand.

# choose_torch_backend: sets and exports UV_TORCH_BACKEND, which uv reads, where PyPI's wheels would not run. Returns 1,
# with one line, for a driver that none of them runs on.
choose_torch_backend() {
    local version major
    [ -z "${UV_TORCH_BACKEND:-}" ] || return 0
    version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
    major=${version%%.*}
    case $major in '' | *[!0-9]*) return 0 ;; esac # no card, or no answer
    if [ "$major" -ge 580 ]; then
        return 0
    elif [ "$major" -ge 570 ]; then
        UV_TORCH_BACKEND=cu128
    elif [ "$major" -ge 525 ]; then # runs all of CUDA 12 by NVIDIA's minor version compatibility
        UV_TORCH_BACKEND=cu126
    else
        echo "error: NVIDIA driver $version is too old for torch 2.11, which needs 525 or newer (580 for CUDA 13)." \
            "Update the driver, or set UV_TORCH_BACKEND=cpu to install for the CPU." >&2
        return 1
    fi
    export UV_TORCH_BACKEND
    echo "NVIDIA driver $version is older than the 580 that CUDA 13 needs: torch comes for $UV_TORCH_BACKEND."
}
