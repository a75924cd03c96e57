"""The machine is named by its kind, from files that stand for those of the system."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.machine import describe, huge_pages, kind, page_costs
from tests.bench.measure import in_process

HYPERVISOR = "flags\t\t: fpu sse avx512f hypervisor ssbd\n"


def system(root: Path, **files: str) -> Path:
    """Write files under their paths, with __ for each slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_machine_without_a_hypervisor_is_bare_metal(tmp_path: Path) -> None:
    root = system(tmp_path, proc__cpuinfo="flags\t\t: fpu sse avx512f\n", sys__class__dmi__id__sys_vendor="Dell Inc.\n")
    assert kind(root) == "Bare metal"


def test_a_virtual_machine_is_named_by_its_firmware(tmp_path: Path) -> None:
    names = {"sys__class__dmi__id__sys_vendor": "QEMU\n", "sys__class__dmi__id__product_name": "Standard PC\n"}
    assert kind(system(tmp_path, proc__cpuinfo=HYPERVISOR, **names)) == "Virtual machine (QEMU Standard PC)"


def test_one_whose_firmware_has_no_names_by_who_made_its_tables(tmp_path: Path) -> None:
    root = system(tmp_path, proc__cpuinfo=HYPERVISOR)
    assert kind(root) == "Virtual machine (maker unknown)"
    system(root, sys__firmware__acpi__tables__DSDT="DSDTS...\x02wFIRECKFCVMDSDT")
    assert kind(root) == "Virtual machine (Firecracker)"


@pytest.mark.parametrize(("features", "returned"), [("0110010100", True), ("0110000100", False), ("", False)])
def test_it_says_whether_free_memory_goes_back_to_the_host(tmp_path: Path, features: str, returned: bool) -> None:
    root = system(tmp_path, proc__cpuinfo=HYPERVISOR, sys__bus__virtio__devices__virtio0__device="0x0001\n")
    system(root, sys__bus__virtio__devices__virtio1__device="0x0005\n")
    system(root, sys__bus__virtio__devices__virtio1__features=features)
    assert ("free memory goes back to its host" in kind(root)) is returned


def test_the_setting_of_huge_pages_is_named(tmp_path: Path) -> None:
    assert huge_pages(tmp_path) == "not offered"
    system(tmp_path, sys__kernel__mm__transparent_hugepage__enabled="always [madvise] never\n")
    assert huge_pages(tmp_path) == "madvise"


def test_what_2_mib_cost_is_measured_in_each_state() -> None:
    costs = in_process("-m", "tests.bench.page_costs", "--idle-s", "0.1", "--pieces", "4")
    assert set(costs) == {"untouched huge", "untouched small", "touched huge", "touched small"}
    assert all(0.0 < value < 1000.0 for value in costs.values())


def test_the_description_holds_them_where_they_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"untouched huge": 4.0, "untouched small": 0.9, "touched huge": 0.25, "touched small": 0.8}
    monkeypatch.setattr("tests.bench.machine.in_process", lambda *args, **kwargs: costs)
    page_costs.cache_clear()
    expected = "untouched, 4.00 ms as a huge page and 0.90 ms as small ones; touched, 0.25 ms as a huge page"
    assert expected in describe(pages=True)
    assert "huge page" not in describe()
    page_costs.cache_clear()
