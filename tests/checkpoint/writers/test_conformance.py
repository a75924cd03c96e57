"""The built-in writers pass the suite that plugins inherit."""

from __future__ import annotations

from nucleate.checkpoint.writers import Writer
from nucleate.checkpoint.writers.dcp import DcpWriter
from nucleate.checkpoint.writers.safetensors import SafetensorsWriter
from nucleate.checkpoint.writers.torch_file import TorchFileWriter
from nucleate.testing import WriterSuite


class TestDcp(WriterSuite):
    def make_writer(self) -> Writer:
        return DcpWriter()


class TestSafetensorsFolder(WriterSuite):
    def make_writer(self) -> Writer:
        return SafetensorsWriter()


class TestSafetensorsShards(WriterSuite):
    def make_writer(self) -> Writer:
        writer = SafetensorsWriter()
        writer.limit_files(100)
        return writer


class TestSafetensorsFile(WriterSuite):
    suffix = ".safetensors"

    def make_writer(self) -> Writer:
        return SafetensorsWriter()


class TestTorchFile(WriterSuite):
    suffix = ".pt"

    def make_writer(self) -> Writer:
        return TorchFileWriter()
