"""Which tokens the head of a model that drafts can say. Most of a large vocabulary is seldom said, and a guess that is
never made costs only what it would have gained, while each row of the head is read for every token drafted."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from dsopt.compiler.pruning.tensors import Indices
from dsopt.compiler.self_text import Windows


def choose_head(windows: Windows, count: int, vocab_size: int, always: Iterable[int] = ()) -> Indices:
    """`count` token ids, ascending: those of `always`, then the most frequent ones of the windows, then the lowest
    ids, which a tokenizer learnt first because they are frequent."""
    seen = Counter(np.concatenate(windows).tolist())
    often = sorted(seen, key=lambda token: (-seen[token], token))
    ranked = dict.fromkeys([*always, *often, *range(vocab_size)])
    return np.array(sorted(list(ranked)[:count]), np.int64)
