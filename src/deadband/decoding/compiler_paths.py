"""torch's C++ compiler in folders whose names have spaces.

torch's inductor builds the compiler's command line as one text and quotes only some of the folders in it. So it fails
where torch, the cache of compiled code or Python's headers lie in a folder such as "My Projects".
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Sequence
from unittest import mock

_patching = threading.RLock()


@contextlib.contextmanager
def any_folder() -> Iterator[None]:
    """Inside the block, inductor compiles in whatever folder torch, its cache and Python lie; one thread at a time.

    Changes nothing where no folder has a name that a shell would split.

    Example:
        >>> with any_folder():
        ...     doubled = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2))
        >>> doubled
        tensor([2., 2.])
    """
    folders = [folder for folder in _folders() if shlex.quote(folder) != folder]
    if not folders:
        yield
        return
    from torch._inductor import cpp_builder

    compile_file = cpp_builder.run_compile_cmd

    def run(command: str, cwd: str) -> None:
        compile_file(shlex.join(split(command, folders)), cwd)

    with _patching, mock.patch.object(cpp_builder, "run_compile_cmd", run):
        yield


def split(command: str, folders: Sequence[str]) -> list[str]:
    """The words of a command line in which each of `folders` is one piece, quoted or not.

    Example:
        >>> split("g++ -I'/my home/include' -L/my home/lib -o /my home/a.so", ["/my home"])
        ['g++', '-I/my home/include', '-L/my home/lib', '-o', '/my home/a.so']
    """
    names = {f"@folder{index}@": folder for index, folder in enumerate(sorted(folders, key=len, reverse=True))}
    for name, folder in names.items():
        within_quotes = folder.replace("'", "'\"'\"'")  # as shlex.quote writes it
        command = command.replace(within_quotes, name).replace(folder, name)
    words = shlex.split(command)
    for name, folder in names.items():
        words = [word.replace(name, folder) for word in words]
    return words


def _folders() -> list[str]:
    """All folders that inductor names to the compiler."""
    import torch
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    found = [torch.__path__[0], cache_dir(), tempfile.gettempdir(), sys.prefix, sys.base_prefix]
    found += [sysconfig.get_path("include"), sysconfig.get_config_var("LIBDIR") or ""]
    found += [os.environ.get(name, "") for name in ("OMP_PREFIX", "CONDA_PREFIX")]
    return [folder for folder in dict.fromkeys(found) if folder]
