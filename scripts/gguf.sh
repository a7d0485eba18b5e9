#!/usr/bin/env bash
# scripts/export_gguf.py in an environment of its own, .venv-gguf, with a build of llama.cpp in .venv-gguf/llama.cpp (about
# ten minutes of one core on the first call; needs a C++ compiler; JOBS= limits the compilers at work):
#   bash scripts/gguf.sh outputs/tiny/merged outputs/tiny/gguf [q8_0 q4_k_m …]
VENV=${GGUF_VENV:-.venv-gguf}
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements/gguf.txt

# llama.cpp's sources as the source package of llama-cpp-python holds them: whole, at a pinned commit, on PyPI.
PACKAGE=llama-cpp-python==0.3.36
SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
OPTIONS="-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF
-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF"
PROGRAMS="llama-server llama-quantize llama-mtmd-cli"
export LLAMA_CPP="$PWD/$VENV/llama.cpp"
built="$LLAMA_CPP/.built-$(sha256sum <<<"$SHA256 $OPTIONS $PROGRAMS" | cut -c1-16)"

build_llama_cpp() {
    local archive
    rm -rf "$LLAMA_CPP.new" && mkdir -p "$LLAMA_CPP.new"
    python -m pip download --disable-pip-version-check --no-deps --no-binary llama-cpp-python -d "$LLAMA_CPP.new" "$PACKAGE"
    archive=$(echo "$LLAMA_CPP.new"/*.tar.gz)
    sha256sum --check --status <<<"$SHA256  $archive" || { echo "$archive is not the pinned file." >&2; return 1; }
    tar xzf "$archive" -C "$LLAMA_CPP.new" --strip-components=3 --wildcards '*/vendor/llama.cpp'
    rm -rf "$archive" "$LLAMA_CPP"
    mv "$LLAMA_CPP.new" "$LLAMA_CPP"
    cmake -S "$LLAMA_CPP" -B "$LLAMA_CPP/build" -G Ninja $OPTIONS
    ninja -C "$LLAMA_CPP/build" -j "${JOBS:-$(nproc)}" $PROGRAMS
}

if [ ! -e "$built" ]; then
    command -v c++ >/dev/null || { echo "error: llama.cpp is built here and needs a C++ compiler (Debian: apt install g++)." >&2; exit 1; }
    with_progress "Building llama.cpp ($PACKAGE)" build_llama_cpp
    touch "$built"
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error}
# The package is not installed there, because it needs llamafactory, which is not.
export PYTHONPATH="$PWD/plugins:$LLAMA_CPP:$LLAMA_CPP/gguf-py${PYTHONPATH:+:$PYTHONPATH}"
exec python scripts/export_gguf.py "$@"
