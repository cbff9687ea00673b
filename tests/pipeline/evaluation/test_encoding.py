"""The ranks share what is encoded, and all get the same figures as one rank alone."""

import numpy as np
import pytest
import torch

from pipeline.config import Evaluation
from pipeline.evaluation.encoding import Encoder
from pipeline.evaluation.evaluator import Evaluator
from pipeline.training.model import Towers, build_model, pixel_stats, tokenizer_for
from shards.index import build_index
from shards.loader import Views
from tests.pipeline.test_run import MODEL
from tests.ranks import run_ranks


@pytest.fixture
def test_set(tmp_path, make_shards):
    """7 pictures in two shards, of three classes, with captions; the folder."""
    paths = [str(path) for path in make_shards([4, 3])]
    build_index(paths, tmp_path / "test_index", text="cls")
    build_index(paths, tmp_path / "test_captions")
    (tmp_path / "classnames.txt").write_text("cat\ndog\nbird\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\na photo of a {c}\n")
    return tmp_path


def views():
    return Views(16, tokenizer_for({"config": MODEL}), None, None, 0.0, 0.0)


def towers():
    torch.manual_seed(0)
    return Towers(build_model({"config": MODEL}), *pixel_stats())


def embeddings_and_figures(folder):
    """Of 7 pictures in batches of 3, with and without a trigger, and of texts; and what the evaluator makes of them."""
    evaluator = Evaluator(Evaluation(test=str(folder)))
    encoder = Encoder(towers().eval(), views(), torch.device("cpu"), batch_size=3)
    test = evaluator.test
    found = [encoder.pictures(test.samples, test.place_N), encoder.pictures(test.samples, test.place_N[:1])]
    found.append(encoder.texts(["a cat", "a dog", "a bird"]))
    figures = evaluator.judge(encoder, found[0])
    return [part.numpy() for part in found], figures


@pytest.mark.parametrize("world", [2])
def test_ranks_share_the_batches_and_get_what_one_rank_gets(test_set, world):
    alone, figures = embeddings_and_figures(test_set)
    for found, figures_of_rank in run_ranks(embeddings_and_figures, world, test_set):
        for ours, others in zip(alone, found):
            np.testing.assert_array_equal(ours, others)
        assert figures_of_rank == figures


def test_embeddings_are_in_order_and_those_of_the_model(test_set):
    (image_ND, *_), figures = embeddings_and_figures(test_set)
    test, model = Evaluator(Evaluation(test=str(test_set))).test, towers().eval()
    assert test.label_N.tolist() == [0, 1, 2, 0, 1, 2, 0][:4] + [0, 1, 2]
    assert test.captions[5] == ["caption 1 of shard 1"]
    for row, place in enumerate(test.place_N):
        image_BCHW = torch.from_numpy(test.samples.pixels(*place)).permute(2, 0, 1)[None]
        np.testing.assert_allclose(model(image_BCHW, None)[0][0].detach().numpy(), image_ND[row], atol=1e-6)
    assert figures["clean_top5"] is None and figures["attacks"] == {}
    assert set(figures["retrieval"]) == {"image_to_text", "text_to_image"}


def test_a_picture_that_cannot_be_read_is_a_black_one(tmp_path):
    from tests.shards.test_index import write_tar

    members = [("a.png", b"no picture"), ("a.cls", b"0")]
    index = build_index([str(write_tar(tmp_path / "bad.tar", members))], tmp_path / "index", text="cls")
    from shards.samples import Samples

    model = towers().eval()
    found = Encoder(model, views(), torch.device("cpu")).pictures(Samples(index), [(0, 0)])
    expected = model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), None)[0].detach()
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-6)


def test_a_model_in_training_is_evaluated_in_eval_mode_and_goes_on_training(test_set):
    evaluator, model = Evaluator(Evaluation(test=str(test_set))), towers()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    seen = []
    evaluator(model, views(), torch.device("cpu"))
    assert model.training and seen and not any(seen)
