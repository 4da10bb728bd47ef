"""What one rank will hold, term by term, and what its peak is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ds_optim.memory.passes import NOTHING, Backward, Passes


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weights: what the model computes with, its buffers, and at stage 3 the parameters that stay gathered.
        gradients: held before the optimizer's step. accumulating: more of them between a step's micro-batches.
        master: fp32 (or bf16) weights, where they are not the model's own.
        state: the optimizer's, by name. scalars: step counts and numbers kept for each parameter.
        padding: the part of master and state that stands for no parameter.
        buckets: DeepSpeed's. gathered: parameters that are whole for a while at stage 3.
        step_gradients: gradients made for the step. exchange: messages, stacks and scratch of matrices in
        work. chunks: scratch of elementwise steps.
        host: the part of gradients, master and state that lies in the host's memory. host_buckets: there too,
        staging and buffers of files.
        files: the part of them that lies in files, of NVMe.
        persistent_buckets: the buckets are held all the time. backward: what of this there is in it, and when.
    """

    weights: int
    gradients: int
    accumulating: int
    master: int
    state: Mapping[str, int]
    scalars: int
    padding: int
    buckets: int
    gathered: int
    step_gradients: int
    exchange: int
    chunks: int
    host: int = 0
    host_buckets: int = 0
    files: int = 0
    persistent_buckets: bool = False
    backward: Backward = field(default_factory=Backward)

    @property
    def optimizer_state(self) -> int:
        return sum(self.state.values())

    @property
    def on_host(self) -> int:
        """All that the rank keeps in the host's memory, pinned or not."""
        return self.host + self.host_buckets

    @property
    def model_states(self) -> int:
        """Weights, gradients, master weights and optimizer state before the step, padding included."""
        return self.weights + self.gradients + self.master + self.optimizer_state

    @property
    def most_model_states(self) -> int:
        """The same with the gradients of several micro-batches."""
        return self.model_states + self.accumulating

    @property
    def steady(self) -> int:
        """What the accelerator holds at any moment: all but gradients and what comes and goes."""
        return self.model_states + self.scalars - self.host - self.files - self._gradients_here

    @property
    def step(self) -> int:
        """What it holds at most in the optimizer's step."""
        buckets = self.backward.early_buckets if self.persistent_buckets else 0
        scratch = self.step_gradients + self.exchange + self.chunks
        return self.steady + self._gradients_here + scratch + buckets

    @property
    def _gradients_here(self) -> int:
        return 0 if self.host or self.files else self.gradients

    def peak(self, passes: Passes = NOTHING) -> int:
        """The most that the accelerator holds: in the passes of a micro-batch, or in the step."""
        return max(self.steady + self.backward.fullest(passes).total, self.step)

    def at_peak(self, passes: Passes = NOTHING) -> dict[str, int]:
        """What the peak is of, by owner, bytes that add up to it; ``states``: masters, optimizer state and scalars."""
        owners = {"weights": self.weights, "states": self.steady - self.weights}
        at = self.backward.fullest(passes)
        if self.step > self.steady + at.total:
            buckets = self.backward.early_buckets if self.persistent_buckets else 0
            scratch = self.step_gradients + self.exchange + self.chunks
            return {**owners, "gradients": self._gradients_here, "buckets": buckets, "step": scratch}
        return {**owners, **asdict(at)}
