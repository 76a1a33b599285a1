"""A training pass without memory: what the parts of a task keep for the backward pass, and what they need for a moment.

A model is cut into the units that are also compiled and spread over devices one by one (``SwinTransformer.units``). One unit
of each kind runs forward and backward on fake tensors (``ledger.py``), and so does everything around the units, with a
stand-in for each. ``memory.py`` puts the findings together over the depth of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from swinscale.errors import UsageError
from swinscale.ledger import GRANULE, Ledger, Unit, backward_pass, emulate, fake_copy, measure_unit, watch_attention
from swinscale.models import SwinConfig
from swinscale.models.config import Size
from swinscale.ops import fused
from swinscale.ops import sequential as _sequential
from swinscale.ops.attention import BACKENDS, Backend, choose_backend
from swinscale.ops.sequential import LOGITS
from swinscale.tasks.base import Batch, Task

PARTS = 64
"""Sequential attention in more parts than this is measured on fewer windows, twice, and extended along a line."""

TRACED = "traced"
"""Name under which the attention of a measurement stands among the back ends while it runs."""


class Call(NamedTuple):
    """How a unit is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    learns: bool
    """Whether the input needs gradients."""
    rest: tuple[Any, ...]
    """Further arguments: the layout."""


@dataclass(frozen=True)
class Moment:
    """A point in the pass around the units, in bytes."""

    unit: int | None
    """The unit that begins; None at the end of the pass."""
    peak: int
    """Since the moment before, without finished gradients of parameters."""
    peak_with_grads: int
    """The same with them."""
    live: int
    grads: int


@dataclass(frozen=True)
class Frame:
    """What happens around the units."""

    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    batch: int
    """Bytes of the images and labels of one forward pass."""
    saved: int
    """What stays for the backward pass, with the batch."""
    calls: dict[int, Call]
    constants: int
    """Bytes of layouts and other tensors that depend on sizes alone."""


class Rehearsal:
    """Runs the parts of ``task`` for one size and precision, each kind once.

    Args:
        size: pixels per axis; None: the model's ``img_size``.
        dtype: of autocast; None: none.
        device: "cuda" or "cpu", whichever this machine has.
    """

    def __init__(self, task: Task, size: Size | None, micro_batch: int, dtype: torch.dtype | None, device: str):
        self.task, self.micro_batch, self.dtype, self.device = task, micro_batch, dtype, device
        self.config = cast(SwinConfig, getattr(task.backbone, "config", None))
        if not isinstance(self.config, SwinConfig):
            name = type(task.backbone).__name__
            raise UsageError(f"The memory of {name} cannot be predicted: only that of a SwinTransformer can.")
        self.size = self.config.img_size if size is None else size
        self.maps = self.config.stage_maps(self.size)
        self.units = _units(task)
        names = {module: name for name, module in task.backbone.named_modules()}
        self.names = [names[unit] for unit in self.units]
        self.stages = [int(name.split(".")[1]) for name in self.names]  # layers.2.blocks.5
        self._frames: dict[bool, Frame] = {}
        self._found: dict[Any, Unit] = {}
        self._kinds: dict[Any, Any] = {}

    def backend(self, name: str, stage: int) -> str:
        """The attention back end that ``name`` means in a stage on the device in question.

        Raises:
            UsageError: if ``name`` is unknown or cannot run there.
        """
        tokens = math.prod(map(min, self.config.stage_windows[stage], self.maps[stage]))
        head = self.config.stage_dims[stage] // self.config.num_heads[stage]
        case = (self.dtype or torch.float32, tokens, head, self.config.attn_drop_rate)
        if self.device == "cpu" or name not in ("auto", "triton"):
            return choose_backend(name, self.device, *case)
        # As fused.why_not says of a GPU that can run the kernels; this machine may have none.
        able = not case[3] and tokens <= fused.LARGEST_WINDOW and head <= fused.LARGEST_HEAD
        if name == "triton" and not able:
            raise UsageError(f"Attention back end 'triton' cannot run here: {fused.why_not('cuda', *case)}.")
        return "triton" if able else "sdpa"

    def frame(self, sharded: bool) -> Frame:
        """A pass of the whole task with a stand-in for each unit, which makes an output and keeps nothing."""
        if sharded not in self._frames:
            with emulate(self.device, self.dtype) as context:
                self._frames[sharded] = self._run_frame(sharded, context)
        return self._frames[sharded]

    def _run_frame(self, sharded: bool, context: Callable[[], Any]) -> Frame:
        mix = getattr(self.task, "mix", None)
        instead = {} if mix is None else {id(mix): _Mix()}
        task = cast(Task, fake_copy(self.task, self.dtype if sharded else None, instead))
        ledger = self._ledger()
        ledger.know(task)
        forward: list[Moment] = []
        backward: list[Moment] = []
        calls: dict[int, Call] = {}
        outputs: dict[Any, tuple[Any, torch.dtype]] = {}
        anchor = torch.zeros((), requires_grad=True)

        def moment(into: list[Moment], unit: int | None) -> None:
            into.append(Moment(unit, ledger.peak, ledger.peak_with_grads, ledger.live, ledger.grads))
            ledger.restart()

        def stand_in(index: int, real: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
            moment(forward, index)
            calls[index] = Call(tuple(x.shape), x.dtype, x.requires_grad, rest)
            kind = self._kind(index, calls[index])
            if kind not in outputs:
                with ledger.paused(), torch.no_grad(), _among_backends(lambda qkv, *_: qkv[:, :, :, 0].flatten(-2)):
                    _use(units[index], "none", TRACED)
                    out = real(x, *rest)
                outputs[kind] = tuple(out.shape), out.dtype
            learns = x.requires_grad or any(p.requires_grad for p in self.units[index].parameters())
            back = partial(moment, backward, index)
            return cast(Tensor, _StandIn.apply(x, anchor if learns else anchor.detach(), *outputs[kind], back))

        units = _units(task)
        for index, unit in enumerate(units):
            unit.forward = partial(stand_in, index, unit.forward)
        with ledger:
            batch = self._batch()
            held = ledger.live
            ledger.restart()
            with context():
                loss = task.rehearse(batch)
            moment(forward, None)
            saved = ledger.live
            if loss.requires_grad:
                backward_pass(loss)
            moment(backward, None)
        return Frame(tuple(forward), tuple(backward), held, saved, calls, sum(ledger.constants.values()))

    def _batch(self) -> Batch:
        """A fake batch with all that the library's tasks read."""
        count = self.micro_batch
        images = torch.empty(count, self.config.in_chans, *self.size)
        return {
            "image": images,
            "index": torch.empty(count, dtype=torch.int64),
            "label": torch.empty(count, dtype=torch.int64),
            "mask": torch.empty(count, *self.maps[0], dtype=torch.bool),
            **self.task.usual_targets(images),
        }

    def _ledger(self) -> Ledger:
        return Ledger(GRANULE if self.device == "cuda" else 1)

    def _kind(self, index: int, call: Call) -> Any:
        """Units of one kind take the same memory."""
        if index not in self._kinds:
            unit = self.units[index]
            weights = tuple((name, tuple(p.shape), p.requires_grad) for name, p in unit.named_parameters())
            self._kinds[index] = type(unit), weights, getattr(unit, "drop_path_rate", 0) > 0
        layouts = ((r.window, r.regions is None, r.zero is None) for r in call.rest)
        return self._kinds[index], call.shape, call.dtype, call.learns, tuple(layouts)

    def unit(self, index: int, mode: str, backend: str, sharded: bool) -> Unit:
        """What unit ``index`` takes with a mode of checkpointing and a back end of attention.

        Args:
            sharded: parameters come in the precision of autocast.
        """
        call = self.frame(sharded).calls[index]
        if not hasattr(self.units[index], "attn"):
            mode, backend = "none", ""
        key = self._kind(index, call), mode, backend, sharded
        if key not in self._found:
            self._found[key] = self._measure(index, mode, backend, sharded, call)
        return self._found[key]

    def _measure(self, index: int, mode: str, backend: str, sharded: bool, call: Call) -> Unit:
        name, _, given = backend.partition(":")
        run = partial(self._run_unit, index, mode, sharded)
        if name == "sequential":
            B, W, N, _ = call.shape
            heads = self.config.num_heads[self.stages[index]]
            parts = int(given or math.ceil(B * W * heads * N * N / LOGITS))
            few = max(1, W * PARTS // parts)
            if 3 * few < W:  # each part takes the same, so that all else grows by the window

                def of(windows: int) -> Unit:
                    shape = (B, windows, N, call.shape[3])
                    rest = tuple(_last_windows(layout, windows) for layout in call.rest)
                    fewer = f"{name}:{max(1, parts * windows // W)}" if given else name
                    return run(fewer, call._replace(shape=shape, rest=rest))

                return _extend(of(few), of(2 * few), few, W)
        return run(backend, call)

    def _run_unit(self, index: int, mode: str, sharded: bool, backend: str, call: Call) -> Unit:
        ledger = self._ledger()
        name, _, parts = backend.partition(":")
        attention: Any = BACKENDS["eager" if name == "flex" else name].run if name else None
        attention = partial(attention, parts=int(parts)) if parts else attention
        with (
            emulate(self.device, self.dtype) as context,
            _among_backends(partial(watch_attention, ledger, attention)),
            _each_part_once(ledger),
        ):
            unit = fake_copy(self.units[index], self.dtype if sharded else None)
            _use(unit, mode, TRACED)
            return measure_unit(unit, ledger, call.shape, call.dtype, call.rest, context, call.learns)


def _units(task: Task) -> list[nn.Module]:
    return cast(Any, task.backbone).units()


@contextmanager
def _among_backends(run: Any) -> Iterator[None]:
    """Puts ``run`` among the back ends, so that a model calls it whatever this machine can run."""
    BACKENDS[TRACED] = Backend(run)
    try:
        yield
    finally:
        del BACKENDS[TRACED]


def _use(unit: Any, mode: str, backend: str) -> None:
    if hasattr(unit, "attn"):
        unit.checkpointing, unit.attn.backend = mode, backend


@contextmanager
def _each_part_once(ledger: Ledger) -> Iterator[None]:
    """Sequential attention runs one part of each shape; for the others the ledger is told what it took."""
    real = cast(Any, _sequential).checkpoint
    known: dict[Any, tuple[Any, torch.dtype, int, int]] = {}

    def instead(part: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
        tensors = tuple(t for t in inputs if isinstance(t, Tensor))
        key = tuple((t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors)
        if key not in known:
            # Hooks that save tensors for the measurement alone, not for a checkpoint around it.
            with ledger.paused(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                known[key] = _run_part(Ledger(ledger.granule), partial(real, part, **options), inputs)
        return cast(Tensor, _PartStandIn.apply(ledger, *known[key], *tensors))

    cast(Any, _sequential).checkpoint = instead
    try:
        yield
    finally:
        cast(Any, _sequential).checkpoint = real


def _run_part(ledger: Ledger, run: Callable[..., Tensor], inputs: tuple[Any, ...]) -> tuple[Any, torch.dtype, int, int]:
    """Shape and dtype of the output of a part, and its peaks in the forward and the backward pass."""
    inputs = tuple(t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in inputs)
    learned = tuple(t for t in inputs if isinstance(t, Tensor) and t.requires_grad)
    with ledger:
        out = run(*inputs)
        forward, shape, dtype = ledger.peak, out.shape, out.dtype
        if not learned:
            return shape, dtype, forward, 0
        before = ledger.live
        ledger.restart()
        with torch.autocast("cpu", enabled=False):  # as in a backward pass
            kept = backward_pass(out, learned)
        del kept
    # The gradient that it began with lives outside, and the output does not any more.
    return shape, dtype, forward, ledger.peak - before - ledger.size(out)


class _PartStandIn(torch.autograd.Function):
    """Keeps the inputs, as a checkpoint does, and makes tensors like the output and the gradients."""

    @staticmethod
    def forward(
        ctx: Any, ledger: Ledger, shape: Any, dtype: torch.dtype, forward: int, back: int, *x: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*x)
        ctx.ledger, ctx.back = ledger, back
        ledger.bump(forward)
        return x[0].new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.ledger.bump(ctx.back)
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[5:], strict=True)
        return *[None] * 5, *[torch.empty_like(x) if needs else None for x, needs in needed]


class _StandIn(torch.autograd.Function):
    """Makes a tensor like a unit's output, and on the way back one like its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, shape: Any, dtype: torch.dtype, back: Callable[[], None]
    ) -> Tensor:
        ctx.like, ctx.back = (x.shape, x.dtype), back
        return x.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.back()
        return grad.new_empty(ctx.like[0], dtype=ctx.like[1]), None, None, None, None


class _Mix(nn.Module):
    """Stands for mixup, whose random numbers fake tensors do not have: mixed images are a copy."""

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.clone(), labels


def _last_windows(layout: Any, windows: int) -> Any:
    """The last windows are those with several regions."""
    cut = {name: None if (t := getattr(layout, name)) is None else t[-windows:] for name in ("regions", "zero")}
    return replace(layout, source=layout.source[: windows * math.prod(layout.window)], **cut)


def _extend(one: Unit, two: Unit, windows: int, to: int) -> Unit:
    """The line through two measurements, at ``windows`` and twice as many, followed ``to`` more."""
    numbers = {f.name: getattr(one, f.name) for f in fields(Unit) if isinstance(getattr(one, f.name), int)}
    return replace(one, **{n: a + (getattr(two, n) - a) * (to - windows) // windows for n, a in numbers.items()})
