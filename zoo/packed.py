"""Packed forms: weights as kernels lay them out, kept beside the objects they are made of, so that
only the first start has to decode and pack them.

A file `packed/LAYOUT/DI/DIGEST` (`.t` where the object was turned first) is the form's bytes and a
seal with its name. It is a cache, written without the zoo's lock and never synced: one that a power
loss cut short has no seal, and whoever lacks a form makes it anew. `zoo.keeping.sweep` removes
the forms of objects that are gone. Called by `workers.packer`.
"""

import logging
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zoo.manifest import ObjectDigest
from zoo.sources.mapping import map_file
from zoo.wholefile import LEFTOVERS, write_whole

_log = logging.getLogger(__name__)
_FOLDER = "packed"
_NAME = re.compile(r"([0-9a-f]{64})(\.t)?")
# What a disk keeps free at least, for those whose files are no cache.
_SPARE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Form:
    """Which form: of an object, turned or not."""

    digest: ObjectDigest
    turned: bool

    @property
    def name(self) -> str:
        """The name of its file."""
        return self.digest + (".t" if self.turned else "")


class PackedForms:
    """The forms of one layout; `layout` is a word. Any thread may call."""

    def __init__(self, root: Path, layout: str) -> None:
        self._layout = layout
        self._folder = root / _FOLDER / layout
        self._lock = threading.Lock()
        self._is_refused = False

    def map(self, form: Form) -> memoryview | None:
        """A form's bytes, read-only; None if there is none that is whole."""
        seal = self._seal(form)
        try:
            content = map_file(self._place(form))
        except OSError:
            return None
        end = len(content) - len(seal)
        return content[:end] if end > 0 and bytes(content[end:]) == seal else None

    def write(self, form: Form, memory: memoryview) -> None:
        """Keep a form, if that is possible; the first time that it is not, a warning says why."""
        if self._is_refused:
            return
        path, seal = self._place(form), self._seal(form)
        try:
            free = shutil.disk_usage(self._folder.parent.parent).free
            if free < len(memory) + _SPARE_BYTES:
                self._refuse(f"{free} bytes are free on its disk")
                return
            write_whole(path, (memory, seal), lasting=False)
        except OSError as error:
            self._refuse(error.strerror or str(error))

    def _refuse(self, reason: str) -> None:
        with self._lock:
            if not self._is_refused:
                _log.warning(
                    "the next start packs again: %s takes no more: %s", self._folder, reason
                )
            self._is_refused = True

    def _place(self, form: Form) -> Path:
        return self._folder / form.digest[:2] / form.name

    def _seal(self, form: Form) -> bytes:
        return f"packed {self._layout} {form.name}\n".encode()


def packed_files(root: Path) -> Iterator[tuple[Path, ObjectDigest | None]]:
    """Every file of every layout and the object it was made of; None: a writer that was killed left
    it."""
    for path in sorted((root / _FOLDER).glob("*/??/*")):
        if found := _NAME.fullmatch(path.name):
            yield path, ObjectDigest(found[1])
        elif path.match(LEFTOVERS):
            yield path, None
