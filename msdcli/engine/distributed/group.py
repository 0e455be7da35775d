"""Several processes on one piece of work, as torchrun starts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from msdcli.data.images import Share
from msdcli.engine.distributed.device import own_gpu
from msdcli.engine.distributed.launcher import share
from msdcli.engine.distributed.rendezvous import failed_before, meet, on_hosts, somebody_may_die
from msdcli.engine.distributed.sharded_tensors import is_sharded
from msdcli.errors import ElsewhereError, UserError, explain
from msdcli.metrics.evaluate import FeatureSet

Value = TypeVar("Value")
BUCKET = 25 * 2**20  # bytes of gradients that travel in one message, as in torch's DDP


class ProcessGroup:
    """The processes that do one piece of work together; a group of one talks to nobody.

    Process 0 leads: it decides, writes and reports. Gradients travel over the devices' own links (nccl, or gloo on
    CPUs), everything else over gloo on the hosts, where waiting for an hour is no error and no device is held up. Only
    the votes of a training step, which everybody reaches soon, end after a while, and say who is missing.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        hosts: distributed.ProcessGroup | None = None,
        votes: distributed.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size, self._hosts, self._votes = rank, size, hosts, votes
        self._apart: ProcessGroup | None = None
        self._vote: tuple[Tensor, Any] | None = None

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @contextmanager
    def host_process_group(self) -> Iterator[distributed.ProcessGroup | None]:
        """Lend what torch's own collectives on the hosts take as their group."""
        with somebody_may_die():
            yield self._hosts

    def duplicate(self) -> ProcessGroup:
        """Return the same processes for a thread, whose words never mix with those of this one; all must ask."""
        if self._apart is None:
            self._apart = ProcessGroup(self.rank, self.size, on_hosts() if self.size > 1 else None)
        return self._apart

    def broadcast(self, value: Value) -> Value:
        """Return the leader's `value` to everyone."""
        if self.size == 1:
            return value
        said = [value if self.is_leader else None]
        with somebody_may_die():
            distributed.broadcast_object_list(said, src=0, group=self._hosts, device=torch.device("cpu"))
        return said[0]  # type: ignore[return-value]

    def gather(self, value: Value) -> list[Value]:
        """Return everyone's `value` to everyone, in order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with somebody_may_die():
            distributed.all_gather_object(found, value, group=self._hosts)
        return found

    def leader_first(self, make: Callable[[], Value]) -> Value:
        """Let the leader `make` something, or find it made, before the others do: they find it on the disk."""
        if self.is_leader:
            made = make()
            self.broadcast(None)
            return made
        self.broadcast(None)
        return make()

    @contextmanager
    def while_leader_holds(self, hold: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Let the leader hold something, a lock say, while all do the work; nobody begins before it is held."""
        with hold() if self.is_leader else nullcontext():
            self.broadcast(None)
            yield

    def all_reduce_mean(self, numbers: Tensor) -> Tensor:
        """Return the average of all processes' numbers, on the CPU."""
        numbers = numbers.detach().double().cpu() if self.size > 1 else numbers.cpu()
        if self.size > 1:
            with somebody_may_die():
                distributed.all_reduce(numbers, group=self._hosts)
        return numbers / self.size if self.size > 1 else numbers

    def vote(self, wish: int, *, last: bool = False) -> int:
        """Return the largest wish of all processes in the call before: an answer that nobody waits for.

        The `last` call waits, and counts as well. A group of one gets its own wish.
        """
        if self.size == 1:
            return wish
        before, vote = self._vote, torch.tensor([wish])
        with somebody_may_die():
            self._vote = (
                vote,
                distributed.all_reduce(vote, op=distributed.ReduceOp.MAX, group=self._votes, async_op=True),
            )
            votes = [v for v in (before, self._vote if last else None) if v is not None]
            for _, handle in votes:
                handle.wait()
        if last:
            self._vote = None
        return max((int(result) for result, _ in votes), default=0)

    @contextmanager
    def averaging_gradients(self, params: Sequence[Tensor], figures: list[Tensor]) -> Iterator[None]:
        """Average the gradients of `params`, and some `figures` such as the loss, over all processes, in place.

        The backward pass belongs inside: a bucket of gradients travels as soon as it is complete, while the pass
        computes the others. Not torch's DDP, which counts on one forward pass per backward pass through one module:
        objectives call a network several times, in parts (its features), and in turns in which it does not learn.
        Sharded gradients are averages already.
        """
        if self.size == 1:
            yield
            return
        messages = _Messages([p for p in params if not is_sharded(p)], self.size)
        messages.send(figures)
        with messages.sent_when_complete():
            yield
        messages.receive()


class _Messages:
    """Gradients on their way to their averages, in buckets that every process sends in the same order.

    The last parameters' gradients come first in a backward pass, so the buckets begin with them, as DDP's do.
    """

    def __init__(self, params: Sequence[Tensor], size: int) -> None:
        self.size = size
        self._buckets = list(_buckets(params[::-1]))
        self._missing = [len(bucket) for bucket in self._buckets]
        self._next = 0
        self._travelling: list[tuple[list[Tensor], Tensor, Any]] = []

    @contextmanager
    def sent_when_complete(self) -> Iterator[None]:
        """Send each bucket as soon as the backward pass has finished its gradients, and the others at the end."""
        hooks = [
            param.register_post_accumulate_grad_hook(lambda _, number=number: self._note(number))
            for number, bucket in enumerate(self._buckets)
            for param in bucket
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._send_until(len(self._buckets))

    def send(self, tensors: list[Tensor]) -> None:
        """Let `tensors` travel in one message."""
        flat = torch.cat([x.flatten() for x in tensors]) if len(tensors) > 1 else tensors[0].flatten()
        with somebody_may_die():
            self._travelling.append((tensors, flat, distributed.all_reduce(flat, async_op=True)))

    def receive(self) -> None:
        """Wait for all that was sent and put the averages in its place."""
        for tensors, flat, handle in self._travelling:
            with somebody_may_die():
                handle.wait()
            flat /= self.size
            parts = flat.split([x.numel() for x in tensors])
            torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors, strict=True)])

    def _note(self, number: int) -> None:
        self._missing[number] -= 1
        complete = self._next
        while complete < len(self._buckets) and self._missing[complete] == 0:
            complete += 1
        self._send_until(complete)

    def _send_until(self, end: int) -> None:
        for bucket in self._buckets[self._next : end]:
            if grads := [p.grad for p in bucket if p.grad is not None]:
                self.send(grads)
        self._next = end


SINGLE_PROCESS = ProcessGroup()


def _buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split into lists of one type and of at most about `BUCKET` bytes."""
    bucket: list[Tensor] = []
    size = 0
    for param in params:
        if bucket and (size > BUCKET or param.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(param)
        size += param.numel() * param.element_size()
    if bucket:
        yield bucket


@contextmanager
def join_torchrun() -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started, for as long as the block lasts.

    Where it fails in one of them, that one raises what it met, and the others, who then cannot go on, ElsewhereError.
    """
    rank, size = share()
    if torch.cuda.is_available():
        torch.cuda.set_device(own_gpu())
    meet("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ProcessGroup(rank, size, on_hosts(), on_hosts(patient=False))
    except BaseException as error:
        code = failed_before(rank, explain(error)[0])
        if code is not None:
            raise ElsewhereError(code) from error
        raise
    distributed.destroy_process_group()


def gather_features(part: FeatureSet, share: Share) -> FeatureSet | None:
    """Merge the parts of all processes in the first one; the others get None."""
    rank, num_ranks = share
    if num_ranks == 1:
        return part
    meet("gloo")  # arrays on the host, whatever the device
    try:
        gathered: list[Any] | None = [None] * num_ranks if rank == 0 else None
        distributed.gather_object(part.to_arrays(), gathered)
    finally:
        distributed.destroy_process_group()
    if gathered is None:
        return None
    first, *others = (FeatureSet.from_arrays(arrays) for arrays in gathered if arrays is not None)
    for other in others:
        first.merge(other)
    return first


def slices(batch: int, pair_batch: int | None, group: ProcessGroup, largest: int | None) -> list[tuple[int, int]]:
    """Return the slices of a global batch that this process takes on, one pass through the networks each.

    Every pass has at most `largest` images. UserError where the processes cannot share the batch equally.
    """
    for what, size in (("batch", batch), ("pair_batch", pair_batch or batch)):
        if size % group.size:
            fits = -(-size // group.size) * group.size
            raise UserError(
                f"{what} {size} cannot be shared equally by {group.size} processes",
                hint=f"{what}={fits} (a recipe's batch is that of all processes together)",
            )
    own, own_pairs = batch // group.size, (pair_batch or batch) // group.size
    limit = largest or max(own, own_pairs)
    for passes in range(1, own + 1):
        if own % passes == 0 and own_pairs % passes == 0 and max(own, own_pairs) <= passes * limit:
            return [(group.rank * passes + i, group.size * passes) for i in range(passes)]
    raise UserError(
        f"micro_batch {largest}: a batch of {own} and {own_pairs} pairs cannot be cut into equal parts of at most that",
        hint="a pair_batch that divides the batch, or a multiple of it",
    )
