"""The ranks share what is encoded, and all get the same figures as one rank alone."""

import re
import tarfile

import numpy as np
import pytest
import torch

from pipeline.config.schema import Config, Evaluation
from pipeline.evaluation.encoding import Encoder
from pipeline.evaluation.evaluators import Evaluators
from pipeline.evaluation.held_out import Embedded
from pipeline.evaluation.linear_probe import linear_probe
from pipeline.evaluation.retrieval import retrieval
from pipeline.evaluation.zero_shot import predicted_classes, zero_shot_classifier
from pipeline.training.model import Towers, build_model, pixel_stats, tokenizer_for
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.samples.samples import Samples
from shards.views.batch import Views
from tests.helpers.models import MODEL
from tests.helpers.ranks import run_ranks
from tests.helpers.tars import write_tar


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


def evaluators_of(folder, overlay=None):
    config = Config(evaluation=Evaluation(test=str(folder)))
    config.data.workers = 0
    return Evaluators(config, overlay=overlay)


def embeddings_and_figures(folder):
    """Of 7 pictures in batches of 3, with and without a trigger, and of texts; and what evaluators make of them."""
    evaluators = evaluators_of(folder)
    encoder = Encoder(towers().eval(), views(), torch.device("cpu"), batch_size=3)
    test = evaluators.data.test
    found = [encoder.pictures(test.samples, test.place_N), encoder.pictures(test.samples, test.place_N[:1])]
    found.append(encoder.texts(["a cat", "a dog", "a bird"]))
    figures = evaluators.figures(Embedded(encoder, evaluators.data))
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
    test, model = evaluators_of(test_set).data.test, towers().eval()
    assert test.label_N.tolist() == [0, 1, 2, 0, 1, 2, 0][:4] + [0, 1, 2]
    assert test.captions[5] == ["caption 1 of shard 1"]
    for row, place in enumerate(test.place_N):
        image_BCHW = torch.from_numpy(test.samples.pixels(*place)).permute(2, 0, 1)[None]
        np.testing.assert_allclose(model(image_BCHW, None)[0][0].detach().numpy(), image_ND[row], atol=1e-6)
    assert figures["clean_top5"] is None and "attacks" not in figures
    assert set(figures["retrieval"]) == {"image_to_text", "text_to_image"}


@pytest.mark.parametrize("text, got", [("a {c}\na photo of a {}\n", "got 'a photo of a {}'"), ("\n", "got ''")])
def test_prompts_without_a_place_for_the_class_are_refused(test_set, text, got):
    """They would read every picture as the first class."""
    (test_set / "zeroshot_classification_templates.txt").write_text(text)
    with pytest.raises(UserError, match=re.escape(got) + ".*a photo of a {c}"):
        evaluators_of(test_set)


@pytest.mark.parametrize("label, said", [(None, "no label"), (b"-1", "label -1"), (b"9" * 20, "large"), (b"", "''")])
def test_a_label_that_is_no_class_is_named_with_its_sample(test_set, label, said):
    members = [("a.png", b"x"), ("a.cls", b"0"), ("b.png", b"x"), *([] if label is None else [("b.cls", label)])]
    build_index([str(write_tar(test_set / "labels.tar", members))], test_set / "test_index", text="cls")
    with pytest.raises(UserError, match=f"labels.tar: sample 'b': .*{said}.*; expected class numbers from 0 on"):
        evaluators_of(test_set)


def damaged(folder, rows):
    """The test set with the pictures of these rows broken."""
    paths = sorted(folder.rglob("*.tar"))
    for shard, path in enumerate(paths):
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        keys = [name for name, _ in members if name.endswith(".png")]
        broken = {key for n, key in enumerate(keys) if 4 * shard + n in rows}
        write_tar(path, [(name, b"no picture" if name in broken else data) for name, data in members])
    build_index([str(path) for path in paths], folder / "test_index", text="cls")
    build_index([str(path) for path in paths], folder / "test_captions")


def test_pictures_that_cannot_be_read_are_counted_and_in_no_figure(test_set):
    (image_ND, *_), _ = embeddings_and_figures(test_set)
    damaged(test_set, {1, 6})
    (found_ND, *_), figures = embeddings_and_figures(test_set)
    rest = [0, 2, 3, 4, 5]
    assert (found_ND[[1, 6]] == 0).all() and figures["unreadable"] == 2
    np.testing.assert_allclose(found_ND[rest], image_ND[rest], atol=1e-6)
    test = evaluators_of(test_set).data.test
    encoder = Encoder(towers().eval(), views(), torch.device("cpu"))
    classes_KD = zero_shot_classifier(encoder, test.classnames, test.templates)
    read_N = predicted_classes(torch.from_numpy(found_ND), classes_KD)
    assert read_N[[1, 6]].tolist() == [-1, -1]
    assert figures["clean_top1"] == pytest.approx((read_N == test.label_N)[rest].mean())
    captions = [test.captions[row] for row in rest]
    assert figures["retrieval"] == retrieval(encoder, torch.from_numpy(found_ND[rest]), captions)


def test_without_any_picture_that_can_be_read_there_are_no_figures(test_set):
    damaged(test_set, range(7))
    with pytest.raises(UserError, match="of the 7 pictures of .* 0 can be read"):
        embeddings_and_figures(test_set)


def test_clean_accuracy_leaves_out_the_pictures_that_attacks_are_about(test_set):
    index = evaluators_of(test_set).data.test.samples.index

    class Overlay:
        classes, source_fingerprint = ["cat", "dog", "bird"], index.fingerprint
        kinds = {"near": {"judged": "class_to_class", "source_class": 0, "target_class": 1, "source_phrase": None}}

        def trigger(self, name):
            return None

    evaluators = evaluators_of(test_set, Overlay())
    embedded = evaluators.embedded(towers().eval(), views(), torch.device("cpu"))
    label_N = evaluators.data.test.label_N
    right_N = predicted_classes(embedded.image_ND, embedded.classes_KD) == label_N
    others = [row for row, label in enumerate(label_N) if label != 0]
    assert right_N.mean() != right_N[others].mean()
    assert evaluators.figures(embedded)["clean_top1"] == pytest.approx(right_N[others].mean())


def test_a_probe_of_one_class_has_no_figure(test_set):
    paths = [str(path) for path in sorted(test_set.rglob("*.tar"))]
    labels = Samples(build_index(paths[1:], test_set / "labels", text="cls"))
    embedded = evaluators_of(test_set).embedded(towers().eval(), views(), torch.device("cpu"))
    given = embedded.encoder, embedded.image_ND, embedded.data.test
    assert linear_probe(*given, labels, labels, 0) is not None
    damaged(test_set, {5, 6})  # of the second shard one picture is left
    labels = Samples(build_index(paths[1:], test_set / "labels", text="cls"))
    assert linear_probe(*given, labels, labels, 0) is None


def test_a_model_is_evaluated_in_eval_mode_and_then_in_training_mode_again(test_set):
    evaluators, model = evaluators_of(test_set), towers()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    seen = []
    evaluators(model, views(), torch.device("cpu"))
    assert model.training and seen and not any(seen)
