"""Averaged weights: by the formula at every ZeRO stage, applied and taken back, the same after a resume on other ranks,
and what is evaluated and exported."""

import copy

import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import Train
from pipeline.distributed import comm
from pipeline.training import engine as engines
from pipeline.training.checkpoint import newest_complete
from pipeline.training.export import export_run
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.run import train, train_step
from pipeline.training.weight_average import WeightAverage
from shards.build.shapes import shapes
from shards.views.batch import Batch
from tests.helpers.models import VIT
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config, cut_off

STAGES = ((0, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"))  # of ZeRO
ROWS, STEPS, DECAY = 8, 3, 0.3  # the second step's decay is 0.25 by the warm-up of the decay, the third's 0.3


def averaged(stage, precision, folder):
    """[weights after each step], their average, the weights within `applied`, and after it. Forward passes without
    gradients, after which ZeRO-3 keeps whole weights, are before and within it."""
    settings = Train(batch_size=ROWS, lr=1e-2, eps=1e-2, zero_stage=stage, precision=precision)
    torch.manual_seed(0)
    towers = Towers(build_model({"config": copy.deepcopy(VIT)}), *pixel_stats())
    engine, rows = engines.start_engine(towers, settings, comm.device()), ROWS // comm.world()
    average, seen = WeightAverage(engine, DECAY), [engines.consolidated_state(engine)]
    for step in range(STEPS):
        images = torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8)
        batch = Batch(images, torch.randint(1, 63, (rows, 8)), torch.ones(rows, dtype=bool), torch.arange(rows), [])
        train_step(engine, {}, batch, "clip")
        average.update(step + 1)
        seen.append(engines.consolidated_state(engine))
    state = average.state()
    if comm.is_rank0():
        save_file(state, folder / f"average_{stage}_{precision}_{comm.world()}.safetensors")
    comm.barrier()
    average.load(folder / f"average_{stage}_{precision}_2.safetensors")  # by two ranks, also where one rank reads it
    with torch.no_grad():
        engine(batch.images, batch.tokens)
    with average.applied(), torch.no_grad():
        engine(batch.images, batch.tokens)
        applied = engines.consolidated_state(engine)
    return seen, state, average.state(), applied, engines.consolidated_state(engine)


def averaged_at_all(folder):
    return [averaged(*stage, folder) for stage in STAGES]


def test_it_is_the_formulas_at_every_stage_and_the_same_for_any_number_of_ranks(tmp_path):
    two, _ = run_ranks(averaged_at_all, 2, tmp_path)
    (ones,) = run_ranks(averaged_at_all, 1, tmp_path)
    for (_, precision), (seen, state, _, applied, after), one in zip(STAGES, two, ones):
        for name, value in seen[0].items():
            expected = value.float()
            for step in range(1, STEPS + 1):
                decay = min(DECAY, (1 + step) / (10 + step))
                expected = decay * expected + (1 - decay) * seen[step][name]
            torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6)
            rounded = expected.bfloat16().float() if precision == "bf16" else expected
            torch.testing.assert_close(applied[name], rounded, rtol=1e-2 if precision == "bf16" else 1e-5, atol=1e-6)
            assert torch.equal(after[name], seen[-1][name])
            assert torch.equal(one[2][name], state[name])  # read by one rank, written by two
        assert any(not torch.equal(applied[name], after[name]) for name in after)


def whole_and_cut(whole, cut):
    train(whole)
    cut_off(cut, 13)
    train(cut)


def test_a_run_resumes_with_its_average_which_is_exported(tmp_path):
    shapes(tmp_path / "shapes", pairs=240, test=36)
    whole, cut = (config(tmp_path, name, train__average=0.9) for name in ("whole", "cut"))
    run_ranks(whole_and_cut, 1, whole, cut)
    found = [newest_complete(made.run.dir)[0] / "average.safetensors" for made in (whole, cut)]
    assert found[0].read_bytes() == found[1].read_bytes()
    export_run(whole.run.dir, whole, tmp_path / "export")
    exported, average = load_file(tmp_path / "export" / "open_clip_model.safetensors"), load_file(found[0])
    last = load_file(found[0].with_name("model.safetensors"))
    assert torch.equal(exported["visual.conv1.weight"], average["visual.conv1.weight"])
    assert not torch.equal(average["visual.conv1.weight"], last["visual.conv1.weight"])
