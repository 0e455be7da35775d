"""All that a stage must remember to go on as if nobody had disturbed it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from msdcli.diffusion.ema import EMA
from msdcli.engine.checkpoints.storage import StoredCheckpoint
from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.distributed.sharded_tensors import is_sharded, own_part
from msdcli.errors import UserError


class TrainState:
    """All that a stage must remember: networks, optimizers, the average, statistics, the step, and the cost so far.

    Nothing else is saved, because nothing else is needed: draws derive from the step. Where memory was too small for a
    pass, the size that all later ones were cut to is remembered, so that a resumed run rounds as it would have.
    """

    def __init__(
        self,
        nets: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        ema: EMA,
        statistics: nn.Module | None = None,
    ) -> None:
        self.nets, self.statistics = nets, statistics
        self.optimizers = optimizers
        self.ema = ema
        self.step = 0
        self.cost = {"seconds": 0.0, "images": 0.0, "flops": 0.0}
        self.cut_to: int | None = None  # images of a pass, where memory was too small for more

    @property
    def is_sharded(self) -> bool:
        """Whether every process has its part only."""
        return any(is_sharded(p) for net in self.nets.values() for p in net.parameters())

    def check_finite(self, group: ProcessGroup) -> None:
        """Raise UserError, everywhere, if a weight is not finite: then the checkpoint before is kept."""
        for name in filter(None, group.gather(self._not_finite())):
            raise UserError(
                f"the weights of {name} are not finite any more at step {self.step}; the checkpoint before is kept",
                hint="a lower learning rate is the usual cure (in a run of another name)",
            )

    def _not_finite(self) -> str | None:
        for name, net in self.nets.items():
            own = [part for p in net.parameters() if (part := own_part(p.detach())).numel()]
            largest = torch._foreach_norm(own, torch.inf) or [torch.zeros(())]
            if not torch.stack(largest).isfinite().all():
                return name
        return None

    def numbers(self) -> dict[str, float]:
        """Return the step, the cost and the size that passes were cut to, as a checkpoint holds them."""
        return {"step": self.step} | self.cost | ({} if self.cut_to is None else {"cut_to": self.cut_to})

    def load(self, stored: StoredCheckpoint) -> None:
        """Take up a checkpoint. DamagedError, or UserError if it is another network's; then nothing changes."""
        shapes, numbers = stored.shapes(), stored.numbers()
        for name, net in self._all_nets():
            for key, tensor in net.state_dict().items():
                if shapes.get(f"{name}.{key}") != tuple(tensor.shape):
                    raise UserError(f"{stored.path} is of another network: {name}.{key} does not fit")
        self._make_moments(shapes)
        stored.read(dict(self.tensors()))
        self.step = int(numbers["step"])
        self.cost = {name: numbers[name] for name in self.cost}
        self.cut_to = int(numbers["cut_to"]) if "cut_to" in numbers else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors by name; of an optimizer's, the number is that of the parameter in its network."""
        for name, net in self._all_nets():
            for key, tensor in net.state_dict().items():
                yield f"{name}.{key}", tensor
        for name, optimizer in self.optimizers.items():
            for i, param in enumerate(self.nets[name].parameters()):
                for key, value in optimizer.state.get(param, {}).items():
                    yield f"optimizer.{name}.{i}.{key}", value

    def _all_nets(self) -> list[tuple[str, nn.Module]]:
        found = [*self.nets.items(), ("ema", self.ema.net)]
        return found if self.statistics is None else [*found, ("statistics", self.statistics)]

    def _make_moments(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give the optimizers the tensors that a checkpoint has, sharded as their parameters are, to be filled."""
        params = {name: [*net.parameters()] for name, net in self.nets.items()}
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        for key, shape in shapes.items():
            kind, _, rest = key.partition(".")
            name, i, moment = rest.rsplit(".", 2) if kind == "optimizer" else ("", "", "")
            if name in params:
                param = params[name][int(i)]
                alike = shape == tuple(param.shape)
                made = torch.zeros_like(param) if alike else torch.zeros(shape, device=own_part(param.detach()).device)
                self.optimizers[name].state[param][moment] = made
