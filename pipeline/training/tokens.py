"""CLIP's tokens, the same as open_clip's own tokenizer gives, at a tenth of its time and in bounded memory."""

import re
from heapq import heapify, heappop, heappush

import numpy as np
import open_clip
import torch

KEPT = 1 << 17  # words whose tokens are remembered
LONGEST = 64  # characters of a word that is remembered: captions are untrusted
# Printable ASCII without "&": ftfy and html.unescape leave it as it is. They take three quarters of open_clip's time.
PLAIN = re.compile(r"[\t\n -%'-~]*")


class Tokenizer(open_clip.SimpleTokenizer):
    """open_clip.SimpleTokenizer, token for token. list[str] -> int64 (N, L), L the context length.

    No token reaches over white space, so a caption's tokens are those of its words, each of which is looked up.
    """

    def __init__(self, context_length: int = 77, clean: str = "lower", **settings: object):
        super().__init__(context_length=context_length, clean=clean, **settings)
        self.lowers = clean == "lower"
        self.words: dict[str, list[int]] = {}

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> torch.Tensor:
        if self.reduction_fn is not None:
            return super().__call__(texts, context_length)
        length = context_length or self.context_length
        texts = [texts] if isinstance(texts, str) else texts
        tokens_NL = np.zeros((len(texts), length), np.int64)
        for row, text in enumerate(texts):
            tokens = self.encode(text, length - 2)[: length - 2]
            tokens_NL[row, : len(tokens) + 2] = [self.sot_token_id, *tokens, self.eot_token_id]
        return torch.from_numpy(tokens_NL)

    def encode(self, text: str, enough: int | None = None) -> list[int]:
        """The tokens of `text`, without start and end; where `enough` is given it may stop after so
        many."""
        text = text.lower() if self.lowers and PLAIN.fullmatch(text) else self.clean_fn(text)
        tokens: list[int] = []
        for word in text.split():
            found = self.words.get(word)
            tokens += self.of_word(word) if found is None else found
            if enough is not None and len(tokens) >= enough:
                break
        return tokens

    def of_word(self, word: str) -> list[int]:
        """The tokens of a word that was not looked up yet."""
        tokens = [
            self.encoder[part]
            for piece in self.pat.findall(word)
            for part in self.bpe("".join(self.byte_encoder[byte] for byte in piece.encode())).split(" ")
        ]
        if len(self.words) >= KEPT:
            self.words.clear()
        if len(word) <= LONGEST:
            self.words[word] = tokens
        return tokens

    def bpe(self, token: str) -> str:
        """The parts of a word between spaces, as open_clip's; its time grows with the square of the word's length, and
        captions are untrusted."""
        return token if token in self.cache else " ".join(merged([*token[:-1], token[-1] + "</w>"], self.bpe_ranks))


def merged(parts: list[str | None], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding (Sennrich et al. 2016) of a word: merge the pair of parts with the least rank, from the left,
    until no pair has a rank; takes n log n time.

    parts: characters of the word, changed in place. ranks: of the vocabulary's merges. Returns the merged parts.
    """
    end = len(parts)
    after, before = list(range(1, end + 1)), list(range(-1, end - 1))
    pairs = [(ranks[pair], at) for at, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
    heapify(pairs)
    while pairs:
        rank, changed = pairs[0][0], []
        while pairs and pairs[0][0] == rank:
            _, at = heappop(pairs)
            right = after[at]
            if parts[at] is None or right == end or ranks.get((parts[at], parts[right])) != rank:
                continue  # one of them was merged since
            parts[at], parts[right], after[at] = parts[at] + parts[right], None, after[right]
            if after[at] < end:
                before[after[at]] = at
            changed += [before[at], at]
        for at in changed:
            if at >= 0 and parts[at] is not None and after[at] < end:
                found = ranks.get((parts[at], parts[after[at]]))
                if found is not None:
                    heappush(pairs, (found, at))
    return [part for part in parts if part is not None]
