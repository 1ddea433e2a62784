#!/bin/sh
# Check everything: style, types, tests. Arguments go to pytest: sh tests/run.sh tests/cli -x
set -eu
cd "$(dirname "$0")/.."
sh .ci/environment test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
