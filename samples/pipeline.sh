#!/bin/sh
# dsopt as a filter: text in on stdin, the answer and nothing else on stdout, statistics on stderr, exit codes that tell.
#   sh samples/pipeline.sh [MODEL_DIR]
set -eu
[ $# -gt 0 ] && export DSOPT_MODEL="$1"

# Piped text stands before the prompt.
answer=$(printf 'error: disk quota exceeded on /home\n' | dsopt generate "What went wrong? Answer in one line." -n 40)
printf 'answer: %s\n' "$answer"

# One JSON object, for tools that read JSON.
dsopt generate "Name a colour." -n 12 --json </dev/null |
    python3 -c 'import json, sys; done = json.load(sys.stdin); print("finished by:", done["finish_reason"])'

# A reader that leaves early ends the writer quietly.
dsopt generate "Count to one hundred." -n 40 </dev/null | head -c 20 >/dev/null

# 2 says that the call was wrong, 1 that it could not be done.
dsopt generate </dev/null 2>/dev/null || echo "without a prompt: exit code $?"
