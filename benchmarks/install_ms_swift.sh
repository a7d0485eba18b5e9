#!/usr/bin/env bash
# Makes .venv-ms-swift with ms-swift for benchmarks/peers.py, beside and apart from the project's own environment.
#
#   bash benchmarks/install_ms_swift.sh          # VENV=/elsewhere to put it elsewhere, UV=/path/to/uv
#
# torch, transformers and peft are the versions of requirements.txt, so that the peers differ in their own code only.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/progress.sh
VENV=${VENV:-.venv-ms-swift}
UV=${UV:-$(command -v uv || true)}
[ -n "$UV" ] || {
    echo "uv was not found: activate the project's environment (scripts/setup.sh installs uv) or set UV." >&2
    exit 1
}

"$UV" venv --quiet --allow-existing --python 3.11 "$VENV"
uv_install "Installing ms-swift into $VENV" "$UV" "$VENV/bin/python" \
    ms-swift==4.6.0 torch==2.11.0 torchvision==0.26.0 transformers==5.5.4 peft==0.18.1 trl==0.24.0
"$VENV/bin/python" -c 'import swift, torch, transformers as t
print("ms-swift", swift.__version__, "torch", torch.__version__, "transformers", t.__version__)'
