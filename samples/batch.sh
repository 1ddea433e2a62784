#!/bin/sh
# A file of prompts, one a line, through a shell loop; each answer is one JSON line with its prompt.
#   sh samples/batch.sh PROMPTS.txt [MODEL_DIR] > answers.jsonl
set -eu
[ $# -gt 1 ] && export DSOPT_MODEL="$2"

while IFS= read -r prompt; do
    [ -n "$prompt" ] || continue
    # </dev/null, or dsopt would read the rest of the file of prompts as its own input.
    dsopt generate "$prompt" -n 48 --json </dev/null |
        PROMPT="$prompt" python3 -c 'import json, os, sys
answer = json.load(sys.stdin)
print(json.dumps({"prompt": os.environ["PROMPT"], "text": answer["text"], "seed": answer["seed"]}))'
done < "$1"
