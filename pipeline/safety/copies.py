"""Pictures that stand in many pairs: targeted poisoning puts one picture under several captions of one kind.

Found once a run, by the pixels of the plain view. So a picture that was changed in any of them is another picture.
"""

import numpy as np

from pipeline import comm
from pipeline.safety.scoring import assign_shards, shard_batches
from pipeline.safety.split import broadcast_mask
from shards.ahead import fetched_ahead
from shards.errors import UserError
from shards.loader import PlainBatches, batches
from shards.masks import SafeMask


def hash_pictures(images_BCHW):
    """int64 (B,): equal for equal pictures, and else hardly ever; the pixels' sum by fixed random odd weights, modulo 2**64."""
    flat_BP = images_BCHW.flatten(1).numpy()
    weights_P = np.random.default_rng(0).integers(-(2**63), 2**63, flat_BP.shape[1]) | 1
    return np.array([(pixels_P * weights_P).sum() for pixels_P in flat_BP], np.int64)


class Singles:
    """The pairs whose picture stands in at most `most` pairs. mask: SafeMask of them."""

    def __init__(self, mask, most):
        self.mask, self.most = mask, most

    def copies(self, shard, index):
        """[(shard, position, key, reason)] of the other pairs in a shard."""
        keys, reason = index.table(shard).keys, f"its picture stands in more than {self.most} pairs"
        return [(shard, p, keys[p], reason) for p in self.mask.positions(shard, "risky").tolist()]


def numbers_of_pictures(samples, views, batch_size, workers, number, dtype):
    """dtype (N,), whole on every host: number(batch) -> (B,) of all pairs, each picture decoded once. All ranks call."""
    index = samples.index
    owned = assign_shards(index.counts, comm.world())
    number_N = comm.host_array(index.samples, dtype)
    pairs = [(rows, rows) for _, rows in shard_batches(index.offsets, owned[comm.rank()], batch_size)]
    dataset = PlainBatches(samples, pairs, views)
    for batch in fetched_ahead(batches(dataset, workers=workers), dataset):
        number_N[batch.rows.numpy()] = number(batch)
    comm.share_between_hosts(number_N, [(index.offsets[s.start], index.offsets[s.stop]) for s in owned])
    return number_N


def find_singles(samples, views, batch_size, workers, most):
    """SafeMask of the pairs whose picture stands in at most `most` pairs, the same on every rank. All ranks call.

    Decodes every picture once and takes 8 bytes a pair on each host meanwhile. A picture that cannot be read stands in one pair.
    """

    def number(batch):
        return np.where(batch.valid.numpy(), hash_pictures(batch.images), batch.rows.numpy())

    hash_N = numbers_of_pictures(samples, views, batch_size, workers, number, np.int64)
    return broadcast_mask(singles(hash_N, most, samples.index.offsets) if comm.is_main() else (), samples.index.counts)


def singles(hash_N, most, offsets_S):
    """Yield for each shard bool (n,): whether at most `most` pairs have its number."""
    hashes, counts = np.unique(hash_N, return_counts=True)
    often = hashes[counts > most]
    for start, stop in zip(offsets_S, offsets_S[1:]):
        yield ~np.isin(hash_N[start:stop], often)


def singles_of_run(folder, samples, views, batch_size, workers, most):
    """Singles, found once a run and kept in `folder` as a mask. All ranks call."""
    made = {"fingerprint": samples.index.fingerprint, "most": most}
    return Singles(kept_mask(folder, made, lambda: find_singles(samples, views, batch_size, workers, most)), most)


def kept_mask(folder, made, find):
    """The SafeMask in `folder` if its mask.json says `made`, else find(), which is kept there. All ranks call."""

    def there():
        try:
            return made.items() <= SafeMask.load(folder)[1].items()
        except UserError:
            return False

    if not comm.on_main(there):
        found = find()
        comm.on_main(found.save, folder, made)
    return SafeMask.load(folder)[0]
