"""The config of an attack on rendered shapes."""


def attack_config(data, out, attacks, more={}):
    paths = {"index": "index", "labels": "labels", "test": "test_index", "classnames": "classnames.txt"}
    return {**{key: str(data / name) for key, name in paths.items()}, "out": str(out), "attacks": attacks} | more
