"""Zero-shot classification on embeddings made by hand."""

import numpy as np
import pytest
import torch

from pipeline.evaluation.zero_shot import predicted_classes, top_k_accuracy, zero_shot_classifier
from tests.helpers.embeddings import Texts


def test_a_class_is_the_mean_of_its_prompts_embeddings():
    vectors = {"a cat": [1.0, 0, 0], "the cat": [0, 1.0, 0], "a dog": [0, 0, 1.0], "the dog": [0, 0.6, 0.8]}
    encoder = Texts({text: torch.tensor(vector) for text, vector in vectors.items()})
    classes_KD = zero_shot_classifier(encoder, ["cat", "dog"], ["a {c}", "the {c}"])
    expected = [np.array([1, 1, 0]) / np.sqrt(2), np.array([0, 0.3, 0.9]) / np.sqrt(0.9)]
    np.testing.assert_allclose(classes_KD.numpy(), expected, rtol=1e-6)


def test_top_k_counts_labels_among_the_k_nearest_classes():
    classes_KD = torch.eye(5)
    image_ND = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.4, 0.3, 0.2], [0.5, 0.4, 0.3, 0.2, 0.1]])
    label_N = np.array([0, 2, 4])
    assert predicted_classes(image_ND, classes_KD).tolist() == [0, 1, 0]
    found = [top_k_accuracy(image_ND, classes_KD, label_N, k) for k in (1, 2, 4, 5)]
    assert found == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1.0])
    assert top_k_accuracy(image_ND, classes_KD, label_N, 6) is None
