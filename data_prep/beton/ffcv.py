"""FFCV (1.0.2, which nobody maintains), changed so that trouble is an error, not a hang, a crash or wrong pixels.

The only module that imports it. Import this one where it is needed: FFCV pulls in numba, OpenCV and torch. Three of its
habits that reach beyond it are undone here:

- A numba typed dict of two constants makes the import compile for seconds: a plain dict during the import does the
  same.
- The import, every Loader and every iteration set torch's thread count to its own worker count: its setter is made to
  do nothing. Decoding stays on one thread, which numba needs no thread pool for.
- Where CUDA exists, its iterators record events and wait on streams, for transfers that it is never asked for here.
"""

from __future__ import annotations

import atexit
import copy
import ctypes
import functools
import itertools
import queue
import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_prep.beton.format import BetonInfo
from data_prep.errors import UserError

try:
    import numba.typed
    import torch
except ImportError as error:
    raise UserError(
        f"FFCV's requirements cannot be imported ({error})", hint="install the project again: make setup"
    ) from error
_typed: Any = numba.typed
_threads, _typed_dict = torch.get_num_threads(), _typed.Dict
try:
    _typed.Dict = dict
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ffcv.libffcv as _library
        import ffcv.loader.epoch_iterator as _epoch_iterator
        import ffcv.loader.loader as _loader_module
        from ffcv.fields.decoders import SimpleRGBImageDecoder
        from ffcv.memory_managers import OSCacheManager
        from ffcv.memory_managers.os_cache import OSCacheContext
        from ffcv.pipeline.compiler import Compiler
        from ffcv.reader import Reader
except (ImportError, OSError) as error:
    raise UserError(f"FFCV cannot be imported ({error})", hint="install the project again: make setup") from error
finally:
    _typed.Dict = _typed_dict
    torch.set_num_threads(_threads)
Compiler.set_num_threads = classmethod(lambda cls, n: None)  # pyright: ignore[reportAttributeAccessIssue]
_epoch_iterator.IS_CUDA = False  # pyright: ignore[reportAttributeAccessIssue]

_lock = threading.RLock()
_alive: weakref.WeakSet[Any] = weakref.WeakSet()
_engines: dict[bool, Any] = {}
"""Loaders to copy, for raw files and for JPEG."""


@atexit.register
def _close_all() -> None:
    """A decoding thread that outlives the interpreter aborts the process."""
    for epoch in list(_alive):
        epoch.close()


class FFCVSamples:
    """The images of a file, decoded ahead of the consumer.

    Args:
        batches_ahead: batches that are read ahead.
        threads: that share the decoding of each batch.
    """

    def __init__(self, info: BetonInfo, *, batches_ahead: int, threads: int):
        self._loader = _loader(info, batches_ahead, threads)
        self._epochs: weakref.WeakSet[Any] = weakref.WeakSet()

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (b, H, W, 3) for every `batch_size` indices of `order`, in a ring of buffers.

        Raises:
            ValueError: an image that cannot be decoded.
        """
        with _lock:  # FFCV's iterator takes the batch size from the loader it is made of
            self._loader.batch_size = batch_size
            epoch: Any = Epoch(self._loader, order)  # pyright: ignore[reportArgumentType]
        self._epochs.add(epoch)
        _alive.add(epoch)
        try:
            for _ in range(0, len(order), batch_size):
                (images,) = next(epoch)
                yield images
        finally:
            epoch.close()

    def close(self) -> None:
        """Stop what is still reading."""
        for epoch in list(self._epochs):
            epoch.close()


class Regions(OSCacheManager):
    """FFCV's memory-mapped access, with sizes by sample.

    FFCV looks each sample's size up in a sorted table of addresses, which takes longer to compile than all the
    rest, and keeps dicts of pages that only its other cache reads. `check_beton` has made sure that all
    sizes of raw samples are equal; the decoder of JPEG takes a sample's by its number.
    """

    def __init__(self, reader: Any, sizes: np.ndarray):
        self.reader = reader
        self.ptrs = np.zeros(1, dtype=np.uint64)
        self.sizes = sizes
        self.context = OSCacheContext(self)

    def compile_reader(self) -> Any:
        def read(address, state):
            return state[0][address : address + state[2][0]]

        return Compiler.compile(read)


_loader_module.OSCacheManager = functools.partial(Regions, sizes=np.zeros(1, dtype=np.uint64))


class JpegDecoder(SimpleRGBImageDecoder):
    """Decodes to the pixels that Pillow gives: FFCV's own decoder asks for the fast DCT, whose pixels differ, and
    leaves what was in the buffer where an image cannot be decoded."""

    def generate_code(self) -> Any:
        init, header, decompress, destroy = _turbojpeg(_library.lib)
        flags = _ACCURATE_DCT | _STOP_ON_WARNING

        def decode(batch_indices, destination, metadata, storage_state):
            decoder = init()
            found = np.zeros(4, dtype=np.int32)
            good = decoder != 0
            for i in range(len(batch_indices)):
                if not good:
                    break
                sample = batch_indices[i]
                start, height, width = metadata[sample]["data_ptr"], destination.shape[1], destination.shape[2]
                data = storage_state[0][start : start + storage_state[2][sample]]
                at, to = data.ctypes.data, destination[i].ctypes.data
                where = found.ctypes.data
                failed = header(decoder, at, data.size, where, where + 4, where + 8, where + 12)
                # of another size it would be scaled
                good = failed == 0 and found[0] == width and found[1] == height
                good = good and decompress(decoder, at, data.size, to, width, 0, height, 0, flags) == 0
            if decoder != 0:
                destroy(decoder)
            if not good:
                raise ValueError("TurboJPEG cannot decode an image")
            return destination[: len(batch_indices)]

        return decode


class Epoch(_epoch_iterator.EpochIterator):
    """One pass; what goes wrong on its thread is raised in the consumer, and it can be stopped."""

    failure: BaseException | None = None

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
        """FFCV's, with each batch decoded in parts on the loader's threads.

        Not on numba's own: its thread layer may abort the process where two loaders run at once.
        """
        loader: Any = self.loader
        if loader.decoding is None:
            return super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        pool, threads = loader.decoding
        self.memory_context.start_batch(b_ix)
        ((stage, _),), _ = loader.code
        count = len(batch_indices)

        def part(rows: slice) -> None:
            memory = {f"memory_{k}": v[batch_slot][rows] for k, v in self.memory_allocations["operation"].items()}
            shared = {f"shared_memory_{k}": None for k in self.memory_allocations["shared"]}
            stage(
                batch_indices=batch_indices[rows], metadata=self.metadata, storage_state=self.storage_state,
                **memory, **shared,
            )  # fmt: skip

        edges = [count * i // threads for i in range(threads + 1)]
        for _ in pool.map(part, [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]):
            pass
        (buffer,) = self.memory_allocations["operation"].values()
        return (buffer[batch_slot][:count],)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.failure = error
            while not self.terminate_event.is_set():
                try:
                    return self.output_queue.put(None, timeout=0.1)
                except queue.Full:
                    continue

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except StopIteration:
            if isinstance(self.failure, ValueError) and "TurboJPEG" in str(self.failure):
                raise self.failure from None
            if self.failure is not None:
                raise RuntimeError(f"decoding {self.loader.fname} failed") from self.failure
            raise

    def close(self) -> None:
        if not hasattr(self, "terminate_event"):  # its constructor failed
            return
        self.terminate_event.set()
        self.iter_ixes = iter(())  # no further batch is begun
        while self.is_alive() and threading.current_thread() is not self:
            try:
                self.output_queue.get_nowait()
            except queue.Empty:
                self.join(0.005)


_ACCURATE_DCT, _STOP_ON_WARNING = 4096, 8192  # TJFLAG_ACCURATEDCT, TJFLAG_STOPONWARNING


def _turbojpeg(library: ctypes.CDLL) -> tuple[Any, Any, Any, Any]:
    """TurboJPEG's functions, out of the library that FFCV's own is linked with; numba calls them without Python.

    Addresses and handles are whole numbers here: numba compares and adds them.
    """
    address, number = ctypes.c_size_t, ctypes.c_int
    init, header = library.tjInitDecompress, library.tjDecompressHeader3
    decompress, destroy = library.tjDecompress2, library.tjDestroy
    init.restype, init.argtypes = address, []
    header.restype, header.argtypes = number, [address] * 7
    decompress.restype, decompress.argtypes = number, [address] * 4 + [number] * 5
    destroy.restype, destroy.argtypes = number, [address]
    return init, header, decompress, destroy


def _loader(info: BetonInfo, batches_ahead: int, threads: int) -> Any:
    """FFCV's Loader for the images of a file; labels and indices come from its table.

    Making one compiles for a second or two. The compiled code reads any file of these fields, so it is made
    once a process for raw files and once for JPEG, and later loaders are copies with another file behind them.
    """
    path = str(info.path)
    with _lock:
        if info.jpeg not in _engines:
            decoder = JpegDecoder() if info.jpeg else SimpleRGBImageDecoder()
            pipelines = {"image": [decoder], "label": None, "index": None}
            engine: Any = _loader_module.Loader(
                path,
                batch_size=1,
                num_workers=1,
                os_cache=True,
                order=_loader_module.OrderOption.SEQUENTIAL,
                seed=0,  # without one FFCV draws from numpy's global generator
                drop_last=False,
                pipelines=pipelines,
            )
            # what belongs to this file goes: its mapping would live as long as the process
            engine.reader = engine.memory_manager = engine.traversal_order = engine.graph.metadata = None
            engine.indices = engine.first_traversal_order = None
            _engines[info.jpeg] = engine
        engine = _engines[info.jpeg]
        loader = copy.copy(engine)
        loader.fname, loader.batches_ahead = path, batches_ahead
        loader.reader = Reader(path)
        loader.memory_manager = Regions(loader.reader, info.data_bytes if info.jpeg else info.data_bytes[:1])
        loader.graph = copy.copy(engine.graph)
        loader.graph.metadata = loader.reader.metadata
        loader.decoding = (ThreadPoolExecutor(threads, "decode"), threads) if threads > 1 else None
        return loader
