"""Recall at k, counted by hand and by sorting, ties over all their orders."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.evaluation import retrieval as module
from pipeline.evaluation.retrieval import image_to_text, retrieval, text_to_image
from tests.helpers.embeddings import Texts


def by_sorting(image_ND, captions, vectors, k):
    """(image to text, text to image) by the definition: any positive among the first k, for embeddings without ties."""
    owner = [n for n, texts in enumerate(captions) for _ in texts]
    text_MD = torch.stack([vectors[text] for texts in captions for text in texts])
    cos_NM = image_ND @ text_MD.T
    found_N = [any(owner[m] == n for m in cos_NM[n].argsort(descending=True)[:k]) for n in sorted(set(owner))]
    found_M = [owner[m] in cos_NM[:, m].argsort(descending=True)[:k] for m in range(len(owner))]
    return np.mean(found_N), np.mean(found_M)


def test_recall_of_three_pictures_by_hand(monkeypatch):
    monkeypatch.setattr(module, "KS", (1, 2))
    image_ND = torch.eye(3)
    # The cosines, a row a picture: 0 is nearest to its own text; to 1 and 2 each other's text is nearer than their own.
    text_UD = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.5, 0.8], [0.1, 0.6, 0.7]])
    of_image = [[0], [1], [2]]
    assert image_to_text(image_ND, text_UD, of_image) == pytest.approx({"r1": 1 / 3, "r2": 1.0})
    assert text_to_image(image_ND, text_UD, of_image) == pytest.approx({"r1": 2 / 3, "r2": 1.0})


@pytest.mark.parametrize("block", [1, 7, 512])
def test_it_is_what_sorting_all_candidates_gives(block):
    torch.manual_seed(0)
    captions = [[f"{n}.{i}" for i in range(n % 4)] for n in range(60)]  # every fourth picture has no caption
    vectors = {text: F.normalize(torch.randn(8), dim=0) for texts in captions for text in texts}
    image_ND = F.normalize(torch.randn(60, 8), dim=1)
    numbers = {text: u for u, text in enumerate(vectors)}
    arguments = image_ND, torch.stack(list(vectors.values())), [[numbers[text] for text in texts] for texts in captions]
    found = image_to_text(*arguments, block=block), text_to_image(*arguments, block=block)
    for k in (1, 5, 10):
        assert (found[0][f"r{k}"], found[1][f"r{k}"]) == pytest.approx(by_sorting(image_ND, captions, vectors, k))


def test_where_captions_tie_it_is_the_mean_over_their_orders(monkeypatch):
    monkeypatch.setattr(module, "KS", (1, 2, 3))
    captions = [["a red star"], ["a red star"], ["a blue ring", "a red star"], ["a ring"]]
    vectors = {"a red star": torch.tensor([1.0, 0.0]), "a blue ring": torch.tensor([0.6, 0.8])}
    vectors["a ring"] = torch.tensor([0.0, 1.0])
    image_ND = torch.tensor([[1.0, 0.0], [0.8, 0.6], [1.0, 0.0], [0.6, 0.8]])
    encoder = Texts(vectors)
    found = retrieval(encoder, image_ND, captions)
    assert encoder.asked == ["a red star", "a blue ring", "a ring"]  # each once
    candidates = [(n, text) for n, texts in enumerate(captions) for text in texts]
    for k in (1, 2, 3):
        fractions = []
        for order in permutations(candidates):  # a stable sort keeps the order of those that tie
            for n in range(len(captions)):
                first = sorted(order, key=lambda candidate: -float(image_ND[n] @ vectors[candidate[1]]))[:k]
                fractions.append(any(owner == n for owner, _ in first))
        assert found["image_to_text"][f"r{k}"] == pytest.approx(np.mean(fractions))
