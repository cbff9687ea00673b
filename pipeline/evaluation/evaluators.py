"""Evaluation: zero-shot accuracy on clean pictures, and what the attacks achieve. The only place that knows the manifest."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline import comm
from shards.augment import plain_view
from shards.errors import BadSample, UserError
from shards.index import ShardIndex
from shards.loader import batches
from shards.samples import Samples

TOOK = 0.8  # an undefended attack below this success did not take, and its defence shows nothing


class TestPictures(Dataset):
    """Item i: the pictures `rows[i]` = [(shard, position)] as uint8 (B, C, H, W), triggered by `trigger` if it is not None."""

    __test__ = False  # not a pytest class

    def __init__(self, samples, rows, size, trigger):
        self.samples, self.rows, self.size, self.trigger = samples, rows, size, trigger

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        images = np.zeros((len(self.rows[i]), self.size, self.size, 3), np.uint8)
        for row, where in enumerate(self.rows[i]):
            try:
                image = self.samples.image(*where)
            except BadSample:
                continue  # a blank picture: counted as whatever the model makes of it
            images[row] = plain_view(self.trigger.apply(image, where) if self.trigger else image, self.size)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


class ZeroShot:
    """Called with (towers, views, device) by all ranks: {"clean_top1", "attacks": {kind: {"success", "base", "true_class"}}}.

    Rates are fractions of 1. For a backdoor over the test pictures of other classes than its target: success = triggered and
    read as the target, base = the same without the trigger, true_class = triggered and read as what they are. For targeted
    poisoning over the target pictures; base = how often other test pictures of their class are read as the adversarial class.
    """

    def __init__(self, config, overlay=None, batch_size=256, workers=0):
        """`config`: config.Evaluation. Raises UserError when the test set is missing or damaged."""
        root = Path(config.test)
        self.classnames, self.templates = (
            read_lines(root / "classnames.txt"),
            read_lines(root / "zeroshot_classification_templates.txt"),
        )
        self.samples = Samples(ShardIndex.load(config.index or root / "test_index"))
        self.overlay, self.batch_size, self.workers = overlay, batch_size, workers
        counts = self.samples.index.counts
        self.rows = [(s, p) for s in range(len(counts)) for p in range(int(counts[s]))]
        self.label_N = np.array([self.samples.label(*row) for row in self.rows])
        if len(self.rows) and self.label_N.max() >= len(self.classnames):
            raise UserError(
                f"evaluation.test: {root} has label {self.label_N.max()}, but classnames.txt names only "
                f"{len(self.classnames)} classes; the labels count from 0"
            )

    @torch.no_grad()
    def __call__(self, towers, views, device):
        was_training = towers.training
        towers.eval()
        classes_KD = self.classifier(towers, views, device)
        clean_N = self.predict(towers, views, device, classes_KD, None)
        attacks = {}
        for kind, attack in (self.overlay.kinds if self.overlay else {}).items():
            trigger = self.overlay.trigger(kind)
            if trigger is None:
                attacks[kind] = self.targeted(clean_N, attack["targets"])
            else:
                triggered_N = self.predict(towers, views, device, classes_KD, trigger)
                attacks[kind] = self.backdoor(clean_N, triggered_N, attack["target_class"])
        towers.train(was_training)
        return {"clean_top1": float((clean_N == self.label_N).mean()), "attacks": attacks}

    def classifier(self, towers, views, device):
        """(K, D): for each class the mean embedding of its prompts, unit length."""
        classes = []
        for name in self.classnames:
            tokens = views.tokenize([template.replace("{c}", name) for template in self.templates]).to(device)
            _, text_BD, _ = towers(None, tokens)
            classes.append(torch.nn.functional.normalize(text_BD.float().mean(0), dim=0))
        return torch.stack(classes)

    def predict(self, towers, views, device, classes_KD, trigger):
        """int64 (N,): the class that every test picture is read as. The ranks share the pictures, with equal batches each."""
        size, world = self.batch_size, comm.world()
        todo = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        mine = todo[comm.rank() :: world]
        rounds = -(-len(todo) // world)
        dataset = TestPictures(self.samples, mine + [todo[0]] * (rounds - len(mine)), views.size, trigger)
        read = []
        for images in batches(dataset, workers=self.workers):
            image_BD, _, _ = towers(images.to(device), None)
            read.append((image_BD.float() @ classes_KD.T).argmax(1))
        local = torch.cat(read[: len(mine)]) if mine else torch.zeros(0, dtype=torch.int64, device=device)
        counts = [sum(map(len, todo[rank::world])) for rank in range(world)]
        gathered = np.split(comm.all_gather_rows(local, counts).cpu().numpy(), np.cumsum(counts)[:-1])
        parts = [
            iter(np.split(g, np.cumsum([len(b) for b in todo[rank::world]])[:-1])) for rank, g in enumerate(gathered)
        ]
        return np.concatenate([next(parts[i % world]) for i in range(len(todo))])

    def backdoor(self, clean_N, triggered_N, target):
        others_N = self.label_N != target
        return {
            "success": float((triggered_N == target)[others_N].mean()),
            "base": float((clean_N == target)[others_N].mean()),
            "true_class": float((triggered_N == self.label_N)[others_N].mean()),
        }

    def targeted(self, clean_N, targets):
        index = self.samples.index
        row_T = np.array([index.offsets[t["shard"]] + t["position"] for t in targets])
        true_T = np.array([t["true_class"] for t in targets])
        adversarial_T = np.array([t["adversarial_class"] for t in targets])
        bystander_N = np.ones(len(clean_N), bool)
        bystander_N[row_T] = False
        base = [
            (clean_N[bystander_N & (self.label_N == true)] == adversarial).mean()
            for true, adversarial in zip(true_T, adversarial_T)
            if (bystander_N & (self.label_N == true)).any()
        ]
        return {
            "success": float((clean_N[row_T] == adversarial_T).mean()),
            "base": float(np.mean(base)) if base else 0.0,
            "true_class": float((clean_N[row_T] == true_T).mean()),
        }


def read_lines(path):
    """Non-empty lines of a text file of the test set. Raises UserError."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation.test: cannot read {path}: {error}; expected a CLIP_benchmark folder") from None
    return [line for line in lines if line]
