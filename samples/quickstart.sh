#!/bin/sh
# From a fresh clone to an answer: makes an environment, installs dsopt, compiles the built-in model and streams.
#   sh samples/quickstart.sh "Why is the sky blue?"
set -eu
cd "$(dirname "$0")/.."
sh .ci/environment
# Its weights as they are, in ten seconds; without --quant the fastest kernels are searched, in four minutes.
model=$(.venv/bin/dsopt compile smollm2 --quant int4-min,head=int8)
exec .venv/bin/dsopt generate -m "$model" -- "${1:-Why is the sky blue?}"
