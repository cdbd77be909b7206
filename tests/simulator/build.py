"""Compile what of the simulator is written in C: NVML, Ollama's processes, a Vulkan layer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from .layout import c_header

LIBRARY = "libnvidia-ml.so.1"
"""The name that pynvml loads on Linux."""

VARIANTS = {
    "full": (),
    "old": ("-DNVML_WITHOUT_V2",),
    "ancient": ("-DNVML_WITHOUT_V2", "-DNVML_WITHOUT_MIG"),
}
"""Compiler flags by variant; see the head of ``native/nvml.c``."""

_SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-fvisibility=hidden")


class CompilerMissingError(RuntimeError):
    """There is no C compiler, so there is no simulated NVML."""


def build(directory: Path, variant: str = "full") -> Path:
    """Compile the library into *directory*, unless it is there already; return its path.

    The result is put in place by a rename, so several processes may build at once. Put
    each variant into a directory of its own: they share the file name.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / LIBRARY
    stamp = f"gpushare-simulator-{variant}-{_digest(variant)}"
    if library.exists() and stamp.encode() in library.read_bytes():
        return library
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as scratch:
        Path(scratch, "layout.h").write_text(c_header(), encoding="utf-8")
        made = Path(scratch, LIBRARY)
        defines = [*VARIANTS[variant], f'-DNVML_STAMP="{stamp}"', f"-I{scratch}"]
        link = ["-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", "-o", str(made)]
        _run([*_FLAGS, *defines, *link, str(_SOURCES / "nvml.c")])
        os.replace(made, library)
    return library


def build_ollama(directory: Path) -> Path:
    """Compile the process that stands for Ollama's and for its runners'; return its path."""
    source = (_SOURCES / "ollama.c").read_bytes()
    digest = hashlib.sha256(repr(_compiler()).encode() + source).hexdigest()[:16]
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / f"ollama-{digest}"
    if not program.exists():
        with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as scratch:
            made = Path(scratch, "ollama")
            flags = ("-std=gnu11", "-O1", "-Wall", "-Wextra")
            _run([*flags, "-o", str(made), str(_SOURCES / "ollama.c")])
            os.replace(made, program)
    return program


LAYER_NAME = "VK_LAYER_GPUSHARE_simulated_gpu"
"""The name of the Vulkan layer, for VK_INSTANCE_LAYERS."""


def build_vulkan_layer(directory: Path) -> Path:
    """Compile the Vulkan layer and write its manifest into *directory*, for VK_LAYER_PATH.

    Needs Vulkan's headers (Debian: libvulkan-dev). See the head of ``native/vulkan.c``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / "libgpushare-vulkan.so"
    (directory / "layout.h").write_text(c_header(), encoding="utf-8")
    flags = (*_FLAGS, "-Wno-unused-function", f"-I{directory}", "-shared", "-fPIC")
    _run([*flags, "-o", str(library), str(_SOURCES / "vulkan.c")])
    layer = {
        "name": LAYER_NAME,
        "type": "GLOBAL",
        "library_path": str(library.absolute()),
        "api_version": "1.3.0",
        "implementation_version": "1",
        "description": "A Vulkan device in software as a simulated GPU",
    }
    manifest = {"file_format_version": "1.2.0", "layer": layer}
    (directory / "gpushare_vulkan.json").write_text(json.dumps(manifest), encoding="utf-8")
    return directory


def exported_functions() -> frozenset[str]:
    """Return the names of all NVML functions that the full variant has."""
    text = "".join(Path(_SOURCES, name).read_text() for name in ("nvml.c", "device.h"))
    return frozenset(re.findall(r"^(?:API[^(]*?|PROCESS_LIST\()(nvml\w+)", text, re.MULTILINE))


def _digest(variant: str) -> str:
    digest = hashlib.sha256(repr((_compiler(), _FLAGS, VARIANTS[variant])).encode())
    digest.update(c_header().encode())
    for name in ("codes.h", "device.h", "nvml.c", "shared.h"):
        digest.update(Path(_SOURCES, name).read_bytes())
    return digest.hexdigest()[:32]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def _run(arguments: list[str]) -> None:
    compiler = _compiler()
    if shutil.which(compiler[0]) is None:
        raise CompilerMissingError(
            f"no C compiler: {compiler[0]!r} is not on PATH; the simulated NVML is written in C;"
            " install gcc or clang, or set CC"
        )
    command = [*compiler, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
