"""AdamW whose two moments are 8-bit numbers in blocks: 2.03 bytes per parameter instead of 8.

Block-wise quantization as in "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), with codes
of our own: 256 neighbors share a float32 scale, the largest magnitude among them, and a code says where a
value lies on a logarithmic scale below it. Neighboring codes differ by a constant factor, so that the
relative error is the same for large and small values:

- first moment: sign and 127 magnitudes over 6 decades (factor 1.116); smaller ones are 0;
- second moment: 255 magnitudes over 7 decades (factor 1.066); smaller ones, unless 0, are the smallest one,
  which makes their steps smaller than they would be, never larger.

Rounding is stochastic and unbiased. Rounding to the nearest would freeze the second moment, which moves by a
thousandth per step where codes are seven hundredths apart. The random numbers follow from the step and the
parameter, so a step that is repeated gives the same bits. A step itself is computed in float32, from the
moments before they are rounded. Parameters with few elements keep float32 moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cod_async.learner.parallel.local import local

BLOCK = 256
"""Elements that share a scale."""
MIN_QUANTIZED = 4096
"""Parameters with fewer elements on a rank keep float32 moments."""
MEAN_DECADES, SQUARE_DECADES = 6.0, 7.0
_MEAN_CODES, _SQUARE_CODES = 127, 255
_CHUNK = 1 << 24
"""Elements of a parameter that are computed on at once; a multiple of the block."""


class Codebook:
    """The values that codes stand for, as shares of a block's scale.

    Args:
        num_codes: magnitudes beside 0.
        decades: the smallest magnitude is ``10 ** -decades``.
        is_signed: codes below 0 are negative values.
    """

    def __init__(self, num_codes: int, decades: float, *, is_signed: bool) -> None:
        self.num_codes = num_codes
        self.is_signed = is_signed
        self._slope = (num_codes - 1) / decades
        exponents = torch.linspace(-decades, 0.0, num_codes, dtype=torch.float64)
        self._values = torch.cat([torch.zeros(1, dtype=torch.float64), 10.0**exponents]).float()

    def values(self, device: torch.device) -> Tensor:
        """Return the magnitudes of codes 0 .. num_codes, float32, on ``device``."""
        if self._values.device != device:
            self._values = self._values.to(device)
        return self._values

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the values of whole blocks, float32 [blocks * BLOCK]."""
        wide = codes.int() - self.num_codes if self.is_signed else codes.int()
        shares = self.values(codes.device)[wide.abs()]
        shares = shares * wide.sign() if self.is_signed else shares
        return (shares.view(-1, BLOCK) * scales[:, None]).flatten()

    def encode(self, values: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (codes uint8, scales float32) of whole blocks.

        Args:
            values: float32 [blocks * BLOCK], not below 0 unless signed.
            random: uniform in [0, 1), one per value: rounds without bias. To the nearest when None, which
                gives back the codes of what :meth:`decode` returned.
        """
        table = self.values(values.device)
        sizes = values.abs().view(-1, BLOCK)
        scales = sizes.amax(1)
        shares = (sizes / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).flatten()
        # Code 1 is the smallest magnitude, so what lies below it is between codes 0 and 1.
        place = self.num_codes + shares.clamp(min=1e-30).log10() * self._slope
        low = (place + 1e-4).floor().clamp(0, self.num_codes - 1).int()
        below, above = table[low], table[low + 1]
        part = ((shares - below) / (above - below)).clamp(0.0, 1.0)
        found = low + ((part > random) if random is not None else (part > 0.5)).int()
        if not self.is_signed:  # what is not 0 must not become 0: steps are divided by it
            found = torch.where((shares > 0) & (found == 0), torch.ones_like(found), found)
        else:
            found = found * values.sign().int() + self.num_codes
        return found.to(torch.uint8), scales


MEAN = Codebook(_MEAN_CODES, MEAN_DECADES, is_signed=True)
SQUARE = Codebook(_SQUARE_CODES, SQUARE_DECADES, is_signed=False)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with 8-bit moments, of whole parameters or of this rank's shards.

    Args:
        parameters: parameters or groups of them.
        lr: learning rate.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        min_quantized: parameters with fewer elements keep float32 moments.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        min_quantized: int = MIN_QUANTIZED,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._min_quantized = min_quantized

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` must be None."""
        if closure is not None:
            raise ValueError("AdamW8bit computes no gradients; call step() without a closure")
        for number, (group, parameter) in enumerate((g, p) for g in self.param_groups for p in g["params"]):
            if parameter.grad is not None:
                self._update(group, parameter, number)

    def _update(self, group: dict[str, Any], parameter: Tensor, number: int) -> None:
        weights, gradient = local(parameter).flatten(), local(parameter.grad).flatten()  # type: ignore[arg-type]
        state = self.ensure(parameter)
        state["step"] += 1
        count = int(state["step"])
        first, second = group["betas"]
        rate, decay = group["lr"], group["weight_decay"]
        generator = torch.Generator(weights.device)
        for start in range(0, weights.numel(), _CHUNK):
            stop = min(start + _CHUNK, weights.numel())
            grad = gradient[start:stop].float()
            mean, square = self._read(state, start, stop)
            mean.lerp_(grad, 1 - first)
            square.mul_(second).addcmul_(grad, grad, value=1 - second)
            part = weights[start:stop]
            part.mul_(1 - rate * decay)
            divisor = (square / (1 - second**count)).sqrt_().add_(group["eps"])
            part.addcdiv_(mean, divisor, value=-rate / (1 - first**count))
            generator.manual_seed((count * 1_000_003 + number) * 1_000_003 + start // _CHUNK)
            self._write(state, start, stop, mean, square, generator)

    def ensure(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, made of zeros if it has none yet."""
        state: dict[str, Any] = self.state[parameter]
        if state:
            return state
        own = local(parameter)
        state["step"] = torch.zeros(())
        if own.numel() < self._min_quantized:
            state["mean"] = torch.zeros(own.numel(), device=own.device)
            state["square"] = torch.zeros(own.numel(), device=own.device)
            return state
        blocks = -(-own.numel() // BLOCK)
        for name, zero in (("mean", _MEAN_CODES), ("square", 0)):
            state[f"{name}_codes"] = torch.full((blocks * BLOCK,), zero, dtype=torch.uint8, device=own.device)
            state[f"{name}_scales"] = torch.zeros(blocks, device=own.device)
        return state

    @torch.no_grad()
    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return ``step`` and, float32 in the shape of this rank's part and on the host, both moments."""
        state, own = self.ensure(parameter), local(parameter)
        found = {"step": state["step"].clone()}
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(0, own.numel(), _CHUNK):
            for part, value in zip(
                parts, self._read(state, start, min(start + _CHUNK, own.numel())), strict=True
            ):
                part.append(value.cpu())
        for name, part in zip(("exp_avg", "exp_avg_sq"), parts, strict=True):
            found[name] = (torch.cat(part) if part else torch.zeros(0)).view(own.shape)
        return found

    @torch.no_grad()
    def set_moments(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        """Put back what :meth:`moments` returned, to the bit; other values go to the nearest code."""
        state, own = self.ensure(parameter), local(parameter)
        state["step"].copy_(moments["step"])
        for start in range(0, own.numel(), _CHUNK):
            stop = min(start + _CHUNK, own.numel())
            mean, square = (
                moments[name].flatten()[start:stop].to(own.device, torch.float32)
                for name in ("exp_avg", "exp_avg_sq")
            )
            self._write(state, start, stop, mean, square, None)

    def _read(self, state: dict[str, Any], start: int, stop: int) -> tuple[Tensor, Tensor]:
        if "mean" in state:
            return state["mean"][start:stop].clone(), state["square"][start:stop].clone()
        codes, blocks = _places(start, stop)
        return (
            MEAN.decode(state["mean_codes"][codes], state["mean_scales"][blocks])[: stop - start],
            SQUARE.decode(state["square_codes"][codes], state["square_scales"][blocks])[: stop - start],
        )

    def _write(
        self,
        state: dict[str, Any],
        start: int,
        stop: int,
        mean: Tensor,
        square: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        if "mean" in state:
            state["mean"][start:stop], state["square"][start:stop] = mean, square
            return
        codes, blocks = _places(start, stop)
        for name, book, values in (("mean", MEAN, mean), ("square", SQUARE, square)):
            padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK))
            random = (
                None
                if generator is None
                else torch.rand(padded.shape, generator=generator, device=padded.device)
            )
            state[f"{name}_codes"][codes], state[f"{name}_scales"][blocks] = book.encode(padded, random)


def _places(start: int, stop: int) -> tuple[slice, slice]:
    """Return where the codes and the scales of elements ``start`` to ``stop`` are."""
    first, last = start // BLOCK, math.ceil(stop / BLOCK)
    return slice(first * BLOCK, last * BLOCK), slice(first, last)
