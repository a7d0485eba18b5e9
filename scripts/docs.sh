#!/usr/bin/env bash
# Builds the documentation site into outputs/site/html, in an environment of its own (.venv-docs, made on the first call):
#   bash scripts/docs.sh            # strict: a link or anchor that leads nowhere is an error
#   bash scripts/docs.sh --serve    # and shows it on http://127.0.0.1:8000, built again after every change (PORT= for another)
[ $# = 0 ] || [ "$*" = --serve ] || { echo "error: scripts/docs.sh takes nothing or --serve." >&2; exit 2; }
VENV=${DOCS_VENV:-.venv-docs}
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements/docs.txt

# The package is not installed there, because it needs llamafactory, which is not; mkdocstrings reads its sources.
export PYTHONPATH="$PWD/plugins${PYTHONPATH:+:$PYTHONPATH}"
PAGES=outputs/site/pages
if [ $# = 1 ]; then
    python scripts/make_docs.py --site "$PAGES"
    python scripts/make_docs.py --site "$PAGES" --watch >/dev/null &
    trap 'kill %1 2>/dev/null' EXIT
    zensical serve --dev-addr "127.0.0.1:${PORT:-8000}"
else
    python scripts/make_docs.py --site "$PAGES"
    zensical build --strict --clean
    echo "outputs/site/html/index.html"
fi
