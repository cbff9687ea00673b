"""EDA with WordNet's synonyms, with the shipped table's, and the default preset's form of it: what they do to captions,
and at what cost.

OMP_NUM_THREADS=1 python -m tests.benchmarks.eda DATA...     folders of `safeclip data`, with index/; prints Markdown

2,000 captions a set, 16 views of each. "Synonyms": fraction of the words (clean, all occurrences) that may be replaced.
"Changed": fraction of the views that differ from the caption in the same form. "Edits": words inserted, deleted or
substituted at the least, a view. "Variants": different views among a caption's 16. Microseconds a view: the first over
the captions, when words are looked up, and later.
"""

import sys
import time
from pathlib import Path

import numpy as np

from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples
from shards.views import eda
from shards.views.augment import sample_rng
from shards.views.eda import Eda, cleaned, synonym_source

CAPTIONS, VIEWS = 2_000, 16


def read_captions(folder):
    """Of random samples of the index in `folder`, the same ones in every call."""
    index = ShardIndex.load(Path(folder) / "index")
    samples, rng = Samples(index), np.random.default_rng(0)
    rows = np.sort(rng.permutation(index.samples)[:CAPTIONS])
    return [samples.caption(int(shard), int(position)) for shard, position in zip(*index.place(rows))]


def edits(old, new):
    """Levenshtein distance of two lists of words."""
    costs = list(range(len(new) + 1))
    for i, a in enumerate(old, 1):
        before, costs[0] = costs[0], i
        for j, b in enumerate(new, 1):
            before, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, before + (a != b))
    return costs[-1]


def draw(view, captions, number):
    """(views, microseconds of one): number `number` of each caption."""
    rngs = [sample_rng(0, 0, 0, i, number) for i in range(len(captions))]
    begin = time.perf_counter()
    drawn = [view(caption, rng) for caption, rng in zip(captions, rngs)]
    return drawn, (time.perf_counter() - begin) * 1e6 / len(captions)


def measure(view, captions):
    """The columns of a row, as text."""
    for cache in (eda.synonyms, eda.clean_synonyms):
        cache.cache_clear()
    drawn, micros = zip(*(draw(view, captions, number) for number in range(VIEWS)))
    words = [cleaned(caption) if view.clean else caption.split() for caption in captions]
    pairs = [(old, new.split()) for views in drawn for old, new in zip(words, views)]
    if view.clean:
        known = [bool(view.synonyms(word)) for caption in words for word in caption]
    else:
        known = [bool(eda.synonyms(view.folder, w.lower().strip(eda.MARKS))) for caption in words for w in caption]
    return [
        f"{np.mean(known):.1%}",
        f"{np.mean([old != new for old, new in pairs]):.1%}",
        f"{np.mean([edits(old, new) for old, new in pairs]):.2f}",
        f"{np.mean([len(set(views)) for views in zip(*drawn)]):.1f} of {VIEWS}",
        f"{micros[0]:.0f}",
        f"{np.median(micros[1:]):.0f}",
    ]


def main(folders):
    forms = {"WordNet": Eda(), "table": Eda(source="table"), "default preset": Eda(source="table", clean=False)}
    if forms["WordNet"].folder is None:
        sys.exit("WordNet is not installed: safeclip data wordnet data/wordnet")
    print(f"{synonym_source()}; strength 0.1\n")
    print("| data | EDA | synonyms | changed | edits | variants | us, first | us |")
    print("|---|---|---|---|---|---|---|---|")
    for folder in folders:
        captions = read_captions(folder)
        for name, view in forms.items():
            print(f"| {Path(folder).name} | {name} | {' | '.join(measure(view, captions))} |")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
