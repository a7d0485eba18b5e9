#!/usr/bin/env bash
# Runs the whole test suite in the pinned environment: bash scripts/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements/dev.txt

# Trackio's own requirements contradict LLaMA-Factory's; it runs without them (requirements/trackio.txt says which).
"$VENV/bin/uv" pip install --quiet --no-deps --python "$VENV/bin/python" -r requirements/trackio.txt

# Style is checked first: it takes seconds, and a mistake in it needs no run of the suite.
ruff check .
ruff format --check .

# The report's page is tested in a real browser.
if ! command -v chromium >/dev/null && [ -z "${LLAVA_ORPO_NO_BROWSER:-}" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        with_progress "Installing chromium for the browser tests: package lists" apt-get update -q
        with_progress "Installing chromium for the browser tests: packages" \
            apt-get install -y -q --no-install-recommends chromium
    else
        echo "The browser tests need chromium: apt-get install chromium, or set LLAVA_ORPO_NO_BROWSER=1." >&2
        exit 1
    fi
fi

# Two workers with one thread each beat one worker with two threads on these small models.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadgroup "$@"
