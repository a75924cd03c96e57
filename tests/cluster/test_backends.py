"""The backends that a user asks for."""

from __future__ import annotations

import pytest
import torch

from nucleate.cluster.backends import beside_host, check_backend, serves
from nucleate.errors import ConfigurationError

CPU, XPU = torch.device("cpu"), torch.device("xpu", 0)


@pytest.mark.parametrize(
    ("backend", "device_type", "expected"),
    [
        ("gloo", "cpu", True),
        ("gloo", "xpu", False),
        ("cpu:gloo,xpu:xccl", "xpu", True),
        ("cpu:gloo, xpu:xccl", "xpu", True),
        ("cpu:gloo,xpu:xccl", "mps", False),
        ("XCCL", "xpu", True),
        ("another", "xpu", False),
    ],
)
def test_a_backend_serves_the_devices_in_its_name_or_those_that_torch_lists(
    backend: str, device_type: str, expected: bool
) -> None:
    assert serves(backend, device_type) is expected


def test_gloo_stands_beside_a_backend_that_does_not_serve_host_memory() -> None:
    assert beside_host("xccl", XPU) == "cpu:gloo,xpu:xccl"
    assert beside_host("cpu:gloo,xpu:xccl", XPU) == "cpu:gloo,xpu:xccl"
    assert beside_host("gloo", CPU) == "gloo"


def test_a_backend_for_other_devices_is_refused() -> None:
    check_backend("gloo", CPU)
    check_backend("cpu:gloo,xpu:xccl", XPU)
    for backend, device, kind in (("xccl", CPU, "cpu"), ("gloo", XPU, "xpu"), ("xpu:xccl", XPU, "cpu")):
        with pytest.raises(ConfigurationError, match=f"'{backend}' does not exchange tensors on {kind}"):
            check_backend(backend, device)
