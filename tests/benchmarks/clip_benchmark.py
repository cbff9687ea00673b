"""Our zero-shot accuracy and retrieval of a run beside those of the clip_benchmark package on its export.

python -m tests.benchmarks.clip_benchmark RUN [--program clip_benchmark]

Needs clip_benchmark (`pip install clip_benchmark "numpy<2.3"`: version 1.6.2 fails with NumPy 2.4), best in a virtual
environment of its own: --program names its command. Prints both figures of every measure, and exits with code 1 where
they differ by more than one picture. Classification is of the whole test set. Retrieval is of the first test picture
with each caption: where captions are equal, clip_benchmark's figure depends on the order in which they come, and ours
is the mean over all orders.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.config.schema import Config, Evaluation
from pipeline.distributed import comm
from pipeline.evaluation.evaluators import Evaluators
from pipeline.evaluation.run import load_run
from pipeline.training.export import export_run
from pipeline.training.start import make_views
from shards.build.write import write_test_set
from shards.index.build_index import build_index
from shards.storage.files import write_bytes

RETRIEVAL = {"text_retrieval_recall@": "image_to_text", "image_retrieval_recall@": "text_to_image"}


def theirs(program, export, task, root, out):
    """The metrics of clip_benchmark's `task` on a test set, by its command line."""
    words = [program, "eval", "--dataset", "wds/test", "--dataset_root", root, "--task", task, "--output", out]
    words += ["--model", f"local-dir:{export}", "--pretrained", "", "--no_amp", "--num_workers", "0"]
    words += ["--recall_k", "1", "5", "10"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program} failed:\n{done.stderr}")
    return json.loads(Path(out).read_text())["metrics"]


def distinct_captions(test, out):
    """Write the first picture with each caption as a test set of its own in the folder `out`."""
    seen = {}
    for place, texts in zip(test.place_N, test.captions):
        if len(texts) == 1:
            seen.setdefault(texts[0], place)
    samples = (
        {
            "__key__": f"{number:06d}",
            "png" if (data := test.samples.reader.image_bytes(*place)).startswith(b"\x89PNG") else "jpg": data,
            "cls": test.samples.label(*place),
            "txt": text,
        }
        for number, (text, place) in enumerate(seen.items())
    )
    paths = [str(path) for path in write_test_set(samples, test.classnames, test.templates, out)]
    write_bytes(out / "dataset_type.txt", b"retrieval\n")
    build_index(paths, out / "test_index", text="cls", workers=1)
    build_index(paths, out / "test_captions", workers=1)


def compared(run, program):
    """[(measure, ours, theirs, pictures)] of a run directory."""
    config, _, towers = load_run(run)
    arguments = towers, make_views(config), comm.device()
    evaluators = Evaluators(config)
    test = evaluators.data.test
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        export_run(run, config, folder / "export")
        root, count = test.root.absolute(), len(test.place_N)
        found = theirs(program, folder / "export", "zeroshot_classification", root, folder / "classification.json")
        ours = evaluators(*arguments)
        rows = [(key, ours[key], found[name], count) for key, name in (("clean_top1", "acc1"), ("clean_top5", "acc5"))]
        if not test.captions:
            return rows
        root = folder / "distinct"
        distinct_captions(test, root)
        evaluators = Evaluators(Config(evaluation=Evaluation(test=str(root))))
        found = theirs(program, folder / "export", "zeroshot_retrieval", root, folder / "retrieval.json")
        ours, count = evaluators(*arguments)["retrieval"], len(evaluators.data.test.place_N)
        for name, way in RETRIEVAL.items():
            rows += [(f"{way} R@{k}", ours[way][f"r{k}"], found[f"{name}{k}"], count) for k in (1, 5, 10)]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--program", default="clip_benchmark", help="the command of clip_benchmark")
    args = parser.parse_args()
    rows = [row for row in compared(args.run, args.program) if row[1] is not None]
    print(f"{'':20s}{'ours':>9s}{'clip_benchmark':>16s}{'of':>8s}")
    for name, ours, other, count in rows:
        print(f"{name:20s}{ours:9.2%}{other:16.2%}{count:8,}")
    sys.exit(any(abs(ours - other) * count > 1 + 1e-3 for _, ours, other, count in rows))


if __name__ == "__main__":
    main()
