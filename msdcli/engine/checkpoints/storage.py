"""How training state lies on the disk: whole in one file, or in parts, every process' own; either is read by any number
of processes, sharded or not.

Parts are written and read by torch.distributed.checkpoint as safetensors: nothing in them is ever run.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from msdcli.engine.checkpoints import files as checkpoint_files
from msdcli.engine.checkpoints.files import DamagedError
from msdcli.engine.checkpoints.host_copies import HostCopies, HostCopy
from msdcli.engine.checkpoints.tensors import WRONG, check_fit, check_hash, write_tensors
from msdcli.engine.distributed.group import SINGLE_PROCESS, ProcessGroup
from msdcli.engine.distributed.sharded_tensors import is_sharded
from msdcli.errors import UserError
from msdcli.rundir import building, file_hash, key, write_json, writing

Value = TypeVar("Value")
FORMAT = 1


class Writer(Protocol):
    """Takes a copy of the state while training waits, and writes it while training goes on."""

    def copy(self, state: Iterator[tuple[str, Tensor]]) -> HostCopy:
        """Return what this process is to write; the copy before is not needed any more."""

    def write(self, copied: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Write it, in a thread, as the folder's newest checkpoint."""


class FileWriter:
    """The leader writes all in one file."""

    def __init__(self, folder: Path, keep: int, group: ProcessGroup) -> None:
        self.folder, self.keep, self.leads = folder, keep, group.is_leader
        self.copies = HostCopies()

    def copy(self, state: Iterator[tuple[str, Tensor]]) -> HostCopy:
        return self.copies.copy(state) if self.leads else HostCopy()

    def write(self, copied: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        if not self.leads:
            return
        metadata = {name: repr(value) for name, value in numbers.items()}
        with writing(self.folder / checkpoint_files.FILE) as temporary:
            write_tensors(temporary, copied, metadata, hashed=True)
            checkpoint_files.make_room(self.folder, for_file=True)
        checkpoint_files.drop(self.folder, self.keep)


class PartsWriter:
    """Every process writes its own part into one folder, which the leader makes, completes and names."""

    def __init__(self, folder: Path, keep: int, group: ProcessGroup) -> None:
        self.folder, self.keep, self.group = folder, keep, group.duplicate()
        self.copies = HostCopies()
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None  # threads begin with GPU 0

    def copy(self, state: Iterator[tuple[str, Tensor]]) -> HostCopy:
        return self.copies.copy(state)

    def write(self, copied: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        group, leads = self.group, self.group.is_leader
        with ExitStack() as stack:
            place = self.folder / _all(group, lambda: self._begin(stack) if leads else "")[0]
            with _beside_training(self.device), _first_failure():
                _save_parts(place, copied, group)
            hashes = _all(group, lambda: _own_hashes(place, group.rank))

            def finish() -> None:
                files = {name: sha256 for own in hashes for name, sha256 in own.items()}
                assert files.keys() >= {path.name for path in place.iterdir()}, "a file that nobody knows of"
                said = {"format": FORMAT, **numbers, "processes": group.size, "files": files}
                write_json(place / checkpoint_files.RECORD, said | {"check": key(said)})
                checkpoint_files.make_room(self.folder, for_file=False)
                stack.close()
                checkpoint_files.drop(self.folder, self.keep)

            _all(group, lambda: finish() if leads else None)

    def _begin(self, stack: ExitStack) -> str:
        """Make the folder, and return where it is in the stage's: hosts may see that at different places."""
        place = stack.enter_context(building(self.folder / checkpoint_files.PARTS))
        return str(place.relative_to(self.folder.absolute()))


def writer(folder: Path, keep: int, group: ProcessGroup, *, parts: bool) -> Writer:
    """Return what writes a stage's checkpoints; all processes must ask."""
    return (PartsWriter if parts else FileWriter)(folder, keep, group)


def _all(group: ProcessGroup, make: Callable[[], Value]) -> list[Value]:
    """Return what every process makes; where one fails, all raise what it met."""
    made: Any
    try:
        made = make()
    except Exception as error:
        made = error
    found = group.gather(made)
    for value in found:
        if isinstance(value, Exception):
            raise value
    return found


def _own_hashes(place: Path, rank: int) -> dict[str, str]:
    """Return the hashes of the files that this process wrote: by their names, for other hosts may not see them yet."""
    return {path.name: file_hash(path) for path in place.glob(f"shard-{rank + 1:05d}-*.safetensors")}


def _save_parts(place: Path, copied: Mapping[str, Tensor], group: ProcessGroup) -> None:
    from torch.distributed import checkpoint as dcp  # slow to import, and seldom needed
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    destination = HuggingFaceStorageWriter(str(place), save_distributed=True)
    with group.host_process_group() as processes:
        dcp.state_dict_saver.save(dict(copied), storage_writer=destination, process_group=processes)


@contextmanager
def _beside_training(device: int | None) -> Iterator[None]:
    """Let what torch does in this thread wait for a stream of its own, not for the one that trains."""
    if device is None:
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raise what the first process met that failed, not torch's list of it."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


# Reading.


class StoredCheckpoint:
    """A checkpoint on the disk, to be read by one process or by all of a group together."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def numbers(self) -> dict[str, float]:
        """Return its step and cost. DamagedError where it does not say."""
        return checkpoint_files.numbers(self.path)

    def verify(self, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Compare its content with its hashes, every process some of it. DamagedError, everywhere, if it differs."""
        for problem in filter(None, group.gather(self._problem(group))):
            raise problem

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its tensors by name."""
        with self._readable():
            if self.path.is_file():
                with safe_open(self.path, framework="pt") as file:
                    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            found = _reader(self._files()).read_metadata().state_dict_metadata
            return {name: tuple(entry.size) for name, entry in found.items()}

    @torch.no_grad()
    def read(self, into: Mapping[str, Tensor]) -> None:
        """Fill tensors with those of their names; of a sharded one only this process' part is read."""
        with self._readable():
            if self.path.is_dir() or any(map(is_sharded, into.values())):
                _load_parts(self._files(), into)
                return
            with safe_open(self.path, framework="pt") as file:
                for name, tensor in into.items():
                    tensor.copy_(file.get_tensor(name))

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        return [self.path / name for name in sorted(checkpoint_files.record(self.path)["files"])]

    def _problem(self, group: ProcessGroup) -> DamagedError | None:
        try:
            self.numbers()
            if not self.path.is_dir():
                if group.is_leader:
                    check_hash(self.path)
                return None
            wanted = checkpoint_files.record(self.path)["files"]
            for path in self._files()[group.rank :: group.size]:
                if file_hash(path) != wanted[path.name]:
                    raise checkpoint_files.damaged(path, WRONG)
        except DamagedError as error:
            return error
        except OSError as error:
            return checkpoint_files.damaged(self.path, error)
        return None

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError) as error:
            raise checkpoint_files.damaged(self.path, error) from None


def _load_parts(files: Sequence[Path], into: Mapping[str, Tensor]) -> None:
    from torch.distributed import checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # every process reads on its own
        with _first_failure():
            dcp.state_dict_loader.load(dict(into), storage_reader=_reader(files), no_dist=True)


def _reader(files: Sequence[Path]) -> Any:
    """Return torch's reader of these files, and of no others that lie beside them."""
    from torch.distributed.checkpoint.filesystem import FileSystem
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    class Named(FileSystem):
        def ls(self, path: Any) -> list[str]:
            return [str(file) for file in files]

    reader = HuggingFaceStorageReader(str(files[0].parent))
    reader.fs = Named()
    return reader


# What is taken from a checkpoint beside all of it.


def inherit(nets: Mapping[str, nn.Module], folder: Path, group: ProcessGroup) -> list[str]:
    """Give `nets` the weights of the networks of the same name that the stage in `folder` ended with; return the
    names. All processes must ask.
    """
    newest = group.broadcast(checkpoint_files.newest(folder))
    if newest is None:
        raise UserError(f"{folder / checkpoint_files.FILE} is missing")
    stored = StoredCheckpoint(folder / newest.name)
    stored.verify(group)
    names = sorted({key.split(".", 1)[0] for key in stored.shapes()} & nets.keys())
    read_networks(stored, {name: nets[name] for name in names})
    return names


def read_networks(stored: StoredCheckpoint, nets: Mapping[str, nn.Module]) -> None:
    """Fill networks with those of their names (`ema`: the average). UserError where one does not fit."""
    shapes, into = stored.shapes(), dict[str, Tensor]()
    for name, net in nets.items():
        own = {k.removeprefix(f"{name}."): shape for k, shape in shapes.items() if k.startswith(f"{name}.")}
        check_fit(net, own, stored.path)
        into |= {f"{name}.{k}": tensor for k, tensor in net.state_dict().items()}
    stored.read(into)


def read_average(folder: Path, net: nn.Module) -> int:
    """Fill `net` with the product's average in the newest checkpoint, while training goes on; return the step."""
    for _ in range(3):
        with suppress(DamagedError):
            return _read_average(folder, net)
        time.sleep(0.1)  # a folder of parts changes its name when the next one is there
    return _read_average(folder, net)


def _read_average(folder: Path, net: nn.Module) -> int:
    stored = StoredCheckpoint(checkpoint_files.newest(folder) or folder / checkpoint_files.FILE)
    stored.verify()
    read_networks(stored, {"ema": net})
    return int(stored.numbers()["step"])
