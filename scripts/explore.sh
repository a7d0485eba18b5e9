#!/usr/bin/env bash
# Runs the property tests with new examples, ten times as many: bash scripts/explore.sh [pytest arguments]
# A failure ends with the line that repeats it (@reproduce_failure). The ordinary suite always draws the same examples.
export HYPOTHESIS_PROFILE=explore
exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" -m "hypothesis and not heavy and not real" "$@"
