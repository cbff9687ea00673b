"""Scores of any CLIP: the same by any number of processes, in pieces or at once, from pictures or from embeddings."""

import json
import shutil

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.audit.audit import audit
from pipeline.audit.data import AuditData
from pipeline.audit.models import load_scorer
from pipeline.audit.score import score
from pipeline.safety.score_files import load_scores
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SavedMask
from shards.samples.samples import Samples
from tests.helpers.audits import make_model, make_pairs, picture
from tests.helpers.ranks import run_ranks
from tests.helpers.tars import write_tar


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """model/, data/ of 50 pairs in 3 shards, one of which has no caption, and scores/."""
    folder = tmp_path_factory.mktemp("scored")
    paths = make_pairs(folder / "data", [f"a picture of thing {i}" if i != 7 else b"\xff" for i in range(50)])
    model = make_model(folder / "model")
    score(folder / "scores", model, data=paths, workers=0, batch_size=16)
    return folder, paths, model


def cosines(folder):
    return load_scores(folder, SavedMask(folder).mask.counts_S)


def test_cosines_are_open_clips_own(scored):
    folder, _, model = scored
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    tokenize, samples = open_clip.get_tokenizer(f"local-dir:{model}"), Samples(ShardIndex.load(folder / "scores/index"))
    clip.eval()
    with torch.no_grad():
        for row in (0, 21, 49):
            place = divmod(row, 20)
            image = clip.encode_image(preprocess(samples.image(*place))[None], normalize=True)
            text = clip.encode_text(tokenize([samples.caption(*place)]), normalize=True)
            assert abs(float((image * text).sum()) - cosines(folder / "scores")[row]) < 1e-5


def test_of_several_captions_the_least_similar_is_scored_and_shown(scored, tmp_path):
    _, _, model = scored
    captions = ["a red thing", "nothing at all", "seven balls"]
    members = [("a.png", picture(3)), ("a.json", json.dumps({"c": captions}).encode()), ("b.png", picture(4))]
    index = build_index([str(write_tar(tmp_path / "a.tar", members))], tmp_path / "index", text="json:c")
    score(tmp_path / "scores", model, data=[str(tmp_path / "index")], workers=0)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    clip.eval()
    with torch.no_grad():
        image_1D = clip.encode_image(preprocess(Samples(index).image(0, 0))[None], normalize=True)
        text_3D = clip.encode_text(open_clip.get_tokenizer(f"local-dir:{model}")(captions), normalize=True)
    cos_3 = (image_1D * text_3D).sum(1)
    cos_N = load_scores(tmp_path / "scores", index.counts)
    assert abs(float(cos_3.min()) - cos_N[0]) < 1e-5 and np.isnan(cos_N[1])
    shown = pq.read_table(tmp_path / "scores" / "metadata" / "metadata_00000.parquet")["caption"].to_pylist()
    assert shown == [captions[int(cos_3.argmin())], None]


def test_a_checkpoint_as_open_clips_training_writes_it(tmp_path):
    """Names with the prefix of DistributedDataParallel, below the key state_dict beside the optimizer's state."""
    torch.manual_seed(3)
    model = open_clip.create_model("RN50")
    weights = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": weights, "optimizer": {}}, tmp_path / "epoch_1.pt")
    scorer = load_scorer("RN50", str(tmp_path / "epoch_1.pt"))
    tokens = scorer.tokenize(["a thing"])
    with torch.no_grad():
        expected = model.eval().encode_text(tokens, normalize=True)
        found = scorer.encode(torch.zeros(1, 3, 224, 224), tokens)[1]
    torch.testing.assert_close(found, expected)


def test_unreadable_pair_is_a_row_with_its_reason(scored):
    saved = SavedMask(scored[0] / "scores")
    table = saved.table(0)
    assert np.isnan(cosines(scored[0] / "scores")[7]) and np.isnan(cosines(scored[0] / "scores")).sum() == 1
    assert "not UTF-8" in table["reason"][7].as_py() and not saved.mask.flags()[7]


def test_a_shard_of_which_nothing_can_be_read_is_audited_with_the_others(scored, tmp_path):
    _, _, model = scored
    for name, rows in (("first", range(20)), ("all", range(40))):
        paths = make_pairs(tmp_path / name / "data", ["a thing"] * 40, dict.fromkeys(rows, b"no picture"))
        score(tmp_path / name / "scores", model, data=paths, workers=0)
        shapes = [np.load(tmp_path / name / f"scores/img_emb/img_emb_0000{shard}.npy").shape for shard in range(2)]
        assert shapes == [(20, 16), (20, 16)]
        data = AuditData(tmp_path / name / "scores")
        assert not data.images.take(list(rows)).any() and np.isnan(data.score_N).sum() == len(rows)


def score_on_rank(out, model, paths):
    return score(out, model, data=paths, workers=0, batch_size=16)


def test_two_processes_give_the_same_files(scored, tmp_path):
    folder, paths, model = scored
    lines = run_ranks(score_on_rank, 2, tmp_path / "two", model, paths)
    assert lines[0] == lines[1]
    for name in ("safe.npy", "img_emb/img_emb_00001.npy", "cells/cells_00002.npy", "metadata/metadata_00000.parquet"):
        assert (tmp_path / "two" / name).read_bytes() == (folder / "scores" / name).read_bytes()
    np.testing.assert_array_equal(cosines(tmp_path / "two"), cosines(folder / "scores"))


def test_scoring_resumes_with_the_shards_that_are_missing(scored, tmp_path):
    folder, paths, model = scored
    out = tmp_path / "scores"
    shutil.copytree(folder / "scores", out)
    for name in ("mask.json", "scores/00001.parquet", "img_emb/img_emb_00001.npy"):
        (out / name).unlink()
    before = (out / "scores/00000.parquet").stat().st_mtime_ns
    score(out, model, data=paths, workers=0, batch_size=16)
    assert (out / "scores/00000.parquet").stat().st_mtime_ns == before
    np.testing.assert_array_equal(cosines(out), cosines(folder / "scores"))


def test_a_folder_of_other_scores_is_refused(scored, tmp_path):
    folder, paths, _ = scored
    with pytest.raises(UserError, match="scores of another model"):
        score(folder / "scores", make_model(tmp_path / "other"), data=paths[:2], workers=0)


def test_embeddings_of_clip_retrieval_give_the_same_cosines(scored, tmp_path):
    folder, _, _ = scored
    theirs = tmp_path / "theirs"
    for kind in ("img_emb", "text_emb"):
        (theirs / kind).mkdir(parents=True)
        for number in range(3):
            shutil.copy(folder / f"scores/{kind}/{kind}_{number:05d}.npy", theirs / kind / f"{kind}_{number}.npy")
    (theirs / "metadata").mkdir()
    for number in range(3):
        count = len(np.load(theirs / f"img_emb/img_emb_{number}.npy"))
        columns = {"image_path": [f"{number}/{i}" for i in range(count)], "caption": ["a caption"] * count}
        pq.write_table(pa.table(columns), theirs / f"metadata/metadata_{number}.parquet")
    score(tmp_path / "out", embeddings=theirs)
    np.testing.assert_allclose(cosines(tmp_path / "out"), cosines(folder / "scores"), atol=2e-3)
    assert SavedMask(tmp_path / "out").table(2, ("key",))["key"][3].as_py() == "2/3"
    assert json.loads((tmp_path / "out/score.json").read_text())["complete"]
    audit(tmp_path / "out", tmp_path / "audit", detectors=["mismatch"])
    assert '"command":""' in (tmp_path / "audit/report.html").read_text()  # there are no shards that it could filter
    np.save(theirs / "text_emb/text_emb_1.npy", np.zeros((20, 3)))
    with pytest.raises(UserError, match=r"img_emb_1.npy: \[16\] numbers a row, but \[3\] in its text_emb"):
        score(tmp_path / "again", embeddings=theirs)
    (theirs / "text_emb/text_emb_1.npy").unlink()
    with pytest.raises(UserError, match="3 img_emb, 2 text_emb"):
        score(tmp_path / "again", embeddings=theirs)
    for kind in ("img_emb", "text_emb", "metadata"):
        for path in (theirs / kind).iterdir():
            path.unlink()
    for kind in ("img_emb", "text_emb"):
        np.save(theirs / f"{kind}/{kind}_0.npy", np.zeros((0, 16)))
    pq.write_table(pa.table({"caption": pa.array([], pa.string())}), theirs / "metadata/metadata_0.parquet")
    with pytest.raises(UserError, match="no row in any of its 1 parts"):
        score(tmp_path / "again", embeddings=theirs)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": "no-such-model", "data": ["x.tar"]}, "no name that open_clip knows"),
        ({"model": "ViT-B-32", "data": ["x.tar"]}, "random weights"),
        ({"model": "ViT-B-32", "pretrained": "./none.pt", "data": ["x.tar"]}, "no such file"),
        ({"data": ["x.tar"]}, "--model: missing"),
        ({"model": "m", "embeddings": "e"}, "leave --model"),
    ],
)
def test_mistakes_are_named(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        score(tmp_path / "out", **options)


def test_picture_size_does_not_matter(tmp_path):
    import io

    file = io.BytesIO()
    Image.new("L", (300, 20)).save(file, "PNG")
    paths = make_pairs(tmp_path / "data", ["grey and long", "square"], {0: file.getvalue()})
    score(tmp_path / "out", make_model(tmp_path / "model"), data=paths, workers=0)
    assert not np.isnan(cosines(tmp_path / "out")).any()
