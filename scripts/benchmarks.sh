#!/usr/bin/env bash
# Runs evals/benchmarks.py in an environment of its own, made on the first run:
#   bash scripts/benchmarks.sh recipes/llava16_orpo_qlora.yaml models=base,outputs/llava16_orpo_qlora tasks=pope
VENV=${BENCHMARKS_VENV:-.venv-benchmarks}
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements/benchmarks.txt
exec python evals/benchmarks.py "$@"
