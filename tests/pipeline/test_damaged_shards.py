"""A shard of which only a part is intact goes all the way: index, mask, and a filtered copy that is sound."""

from pipeline.audit.apply import apply_mask
from shards.index import tar
from shards.index.shard_index import build_index
from tests.saved_masks import cosines, make_tar, samples, save_mask


def test_a_filtered_copy_of_a_damaged_shard_is_sound(tmp_path):
    path = tmp_path / "d" / "00000.tar"
    make_tar(path, 0, 12)
    everything = {key: members for _, key, members in samples([path])}
    data = bytearray(path.read_bytes())
    with open(path, "rb") as file:
        walk = list(tar.members(tar.Stream(file), None, print))
    corrupt = next(member for member in walk if member.name == "d/0_004.png")
    data[corrupt.start + 3] ^= 0xFF
    path.write_bytes(data[: walk[-4].offset + 10])  # and cut in the last sample
    index = build_index([str(path)], tmp_path / "index", report=tmp_path / "report.jsonl")
    cos = cosines(index.samples)
    selected = save_mask(tmp_path / "mask", index, cos, fraction=0.5)
    for keep in ("safe", "risky"):
        apply_mask(tmp_path / "mask", [str(path)], tmp_path / keep, keep)
        copied = build_index([str(tmp_path / keep / "00000.tar")], tmp_path / f"{keep}_index")  # no damage any more
        flags = selected.mask.flags() if keep == "safe" else ~selected.mask.flags()
        expected = [key for key, flag in zip(index.table(0).keys, flags) if flag]
        assert copied.table(0).keys == expected
        for _, key, members in samples([tmp_path / keep / "00000.tar"]):
            assert members.items() <= everything[key].items() and members
