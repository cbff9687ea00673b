"""FLOPs of a step against published counts, and peaks by the names that CUDA gives devices."""

import pytest
import torch

from pipeline.training.flops import flops_a_view, peak_flops, peak_of_name
from tests.helpers.models import RESNET


@pytest.mark.parametrize("name, forward", [("RN50", 18.18e9), ("ViT-B-32", 14.78e9), ("ViT-B-16", 41.09e9)])
def test_flops_are_three_times_those_that_open_clip_publishes(name, forward):
    """docs/model_profile.csv of open_clip counts a forward pass; the backward pass takes twice as many."""
    assert flops_a_view({"name": name}) == pytest.approx(3 * forward, rel=0.01)


def test_flops_of_a_model_with_batch_norm_and_other_sizes():
    wider = {**RESNET, "text_cfg": {**RESNET["text_cfg"], "context_length": 16}}
    assert 0 < flops_a_view({"config": RESNET}) < flops_a_view({"config": wider})


@pytest.mark.parametrize(
    "name, bf16, tf32",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 495e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989e12, 495e12),
        ("NVIDIA GH200 480GB", 989e12, 495e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA GeForce GTX 1080", None, None),
        ("NVIDIA A1000", None, None),
    ],
)
def test_peak_of_a_device(name, bf16, tf32):
    assert (peak_of_name(name, "bf16"), peak_of_name(name, "fp32")) == (bf16, tf32)


def test_fp32_counts_as_the_tf32_of_a_step_wherever_it_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert not torch.backends.cuda.matmul.allow_tf32 and peak_flops(torch.device("cuda"), "fp32") == 495e12


def test_the_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu"), "bf16") is None
