import copy
import gc
import io
import itertools
import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from deadband.layers import memory
from deadband.layers.memory import MappedFiles, empty_on_huge_pages, on_huge_pages


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


def many(generator):
    """Tensors of many sizes, more than one block of them, some without entries, and others as they lie in memory."""
    sizes = [0, 1, 63, 65, 4097, 1_000_001, 9_000_000, *[3_000_000] * 6]
    plain = [torch.randn(size, generator=generator).to(torch.bfloat16 if size % 2 else torch.float32) for size in sizes]
    return [*plain, torch.randn(700, 1000, generator=generator).t(), torch.randint(0, 99, (3, 5, 7)).permute(2, 0, 1)]


def test_copies_in_blocks_are_tensors_like_all_others():
    originals = many(torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(on_huge_pages, originals))
    for original, made in zip(originals, copies, strict=True):
        assert torch.equal(made, original)
        assert (made.dtype, made.stride()) == (original.dtype, original.stride())
        assert made.untyped_storage().nbytes() == original.nbytes
        assert made.storage_offset() == 0
        assert not made._is_view()
        assert made.data_ptr() % 64 == 0
    spans = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in copies if each.nbytes)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))


def test_a_copy_in_a_block_is_saved_copied_and_shared_alone():
    made = [on_huge_pages(torch.arange(1000.0) + each) for each in range(3)]
    file = io.BytesIO()
    torch.save(made[1], file)
    assert len(file.getvalue()) < 8000
    assert torch.equal(torch.load(io.BytesIO(file.getvalue())), made[1])
    assert torch.equal(load(save({"a": made[0], "b": made[1]}))["b"], made[1])
    copy.deepcopy(made[1]).zero_()
    made[0].share_memory_()
    made[0].add_(5)
    assert [each[0].item() for each in made] == [5, 1, 2]


@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="there are no blocks")
def test_a_block_goes_with_its_last_tensor():
    made = [empty_on_huge_pages((memory._BLOCK // 2,), (1,), torch.uint8) for _ in range(2)]
    block = weakref.ref(memory._blocks.block())
    other = empty_on_huge_pages((memory._BLOCK // 2 + 1,), (1,), torch.uint8)  # takes a block of its own
    assert memory._blocks.block() is not block()
    del made[0]
    gc.collect()
    made[0][-1] = 7
    assert block() is not None
    made.clear()
    gc.collect()
    assert block() is None
    other.zero_()
