"""dsopt as a library: load a compiled model, ask, read the answer as it comes, stop when you like, ask on.

python samples/stream.py MODEL_DIR
"""

import sys
from pathlib import Path

from dsopt.runtime import load
from dsopt.runtime.sampling import Sampler, Sampling


def main() -> None:
    model = load(Path(sys.argv[1]))
    state = model.new_state()  # the conversation: tokens and their key-value cache

    question = model.extend_chat(state, [{"role": "user", "content": "Name a fruit."}])
    for piece in model.stream(question, state=state, limit=16):
        print(piece.text, end="", flush=True)
    print()

    # A second turn: what the cache holds of the first is not computed again.
    question = model.extend_chat(state, [{"role": "user", "content": "And a vegetable."}])
    stream = model.stream(question, state=state, sampler=Sampler(Sampling(temperature=0.7, seed=1)), limit=64)
    for count, piece in enumerate(stream, 1):
        print(piece.text, end="", flush=True)
        if count == 24:
            stream.cancel()  # the state stays valid
    print()
    result = stream.result
    print(f"{result.finish_reason}: {result.answer_tokens} tokens, {result.cached_tokens} of the prompt from the cache")


if __name__ == "__main__":
    main()
