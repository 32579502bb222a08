import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deadband.layers.memory import MappedFiles, on_huge_pages


def resident(path):
    """Bytes of a file that are in this process's memory."""
    with open("/proc/self/smaps", encoding="utf-8") as file:
        lines = iter(file)
        return sum(1024 * int(next(each for each in lines if each.startswith("Rss:")).split()[1])
                   for line in lines if line.rstrip().endswith(os.fspath(path)))  # fmt: skip


@pytest.fixture
def mapped(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(4_000_001, dtype=torch.int32), "b": torch.ones(5)}, path)
    return path, safe_open(path, framework="pt", backend="mmap").get_tensor("a")


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="there is no /proc")
def test_a_copy_takes_the_files_place_in_memory(mapped):
    path, tensor = mapped
    tensor.sum()
    assert resident(path) >= tensor.nbytes - 10_000
    copy = on_huge_pages(tensor, MappedFiles())
    assert resident(path) < 300_000
    assert torch.equal(copy, tensor)  # which is read again
    assert copy.data_ptr() != tensor.data_ptr()


def test_what_was_written_to_is_never_given_back(mapped):
    path, tensor = mapped
    tensor[1000] = -7
    MappedFiles().give_back(tensor)
    assert tensor[1000] == -7
    own = torch.ones(3_000_000)
    MappedFiles().give_back(own)
    assert own.sum() == 3_000_000
    assert torch.equal(on_huge_pages(own.view(1000, 3000).t(), MappedFiles()), own.view(1000, 3000).t())
