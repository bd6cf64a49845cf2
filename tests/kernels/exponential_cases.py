"""The fused first product's kernels in Triton's interpreter and ahead of time: cases of the two scripts.

The interpreter decides at import, so the kernels are imported inside the functions.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from cod_kernels import KernelInputError, LossOptions, linear_logprob, linear_segment_loss
from cod_kernels.linear_logprob.reference import linear_logprob_reference

Result = dict[str, float]


def _apart(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).norm() / right.norm().clamp(min=1e-30))


def against_fp64(
    dtype: torch.dtype, *, rows: int, vocab: int, width: int, chunk_rows: int | None, is_full: bool
) -> Result:
    """Distances from fp64 of log-prob and entropy (absolute) and gradients (relative), and from itself.

    Neither rows, vocabulary nor width are multiples of a tile; hidden states and head are not contiguous.
    """
    generator = torch.Generator().manual_seed(rows + vocab)
    hidden = torch.randn(rows, 2 * width, generator=generator).to(dtype)[:, ::2]
    weight = (torch.randn(width, vocab, generator=generator) * 0.5).to(dtype).t()
    bias = torch.randn(vocab, generator=generator).to(dtype) if is_full else None
    temperature = torch.rand(rows, generator=generator) + 0.7
    softcap = 5.0 if is_full else None
    coefficients = torch.randn(rows, generator=generator)
    wide = [None if t is None else t.double().requires_grad_() for t in (hidden, weight, bias)]
    logits = wide[0] @ wide[1].t()  # type: ignore[operator, union-attr]
    targets = torch.multinomial(torch.softmax(logits.detach(), 1), 1, generator=generator).squeeze(1)
    truth = linear_logprob_reference(
        wide[0], wide[1], targets, temperature.double(), wide[2], softcap  # type: ignore[arg-type]
    )  # fmt: skip
    (truth[0] * coefficients).sum().backward()
    found: list[list[torch.Tensor]] = []
    for _ in range(2):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (hidden, weight, bias)]
        loss, metrics, logprob = linear_segment_loss(
            leaves[0], leaves[1], targets.int(), torch.zeros(rows), torch.arange(rows),  # type: ignore[arg-type]
            -coefficients, torch.ones(rows), temperature=temperature, bias=leaves[2], softcap=softcap,
            has_entropy=is_full, options=LossOptions(clip="none"), first_product="fused", backend="triton",
            chunk_rows=chunk_rows,
        )  # fmt: skip
        loss.backward()
        grads = [leaf.grad for leaf in leaves if leaf is not None]
        found.append([logprob, metrics, *grads])  # type: ignore[list-item]
    with torch.no_grad():
        again, entropy = linear_logprob(
            hidden, weight, targets, temperature=temperature, bias=bias, softcap=softcap, return_entropy=True,
            first_product="fused", backend="triton", chunk_rows=chunk_rows,
        )  # fmt: skip
    result = {
        "logprob": max(float((v - truth[0]).detach().abs().max()) for v in (found[0][0], again)),
        "entropy": float((entropy - truth[1]).detach().abs().max()),
        "repeats": float(not all(torch.equal(a, b) for a, b in zip(*found, strict=True))),
    }
    grads = [leaf.grad for leaf in wide if leaf is not None]
    names = ("hidden", "weight", "bias")
    pairs = zip(names, found[0][2:], grads, strict=False)
    return result | {f"d_{name}": _apart(a, b) for name, a, b in pairs}  # type: ignore[arg-type]


def many_tiles() -> Result:
    """More tiles than programs; blocks of rows in groups of which the last is smaller."""
    from cod_kernels.linear_logprob.chunks import Problem
    from cod_kernels.linear_logprob.exponentials import TorchExponentials
    from cod_kernels.linear_logprob.exponentials_triton import Tile, TritonExponentials

    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 32, generator=generator) for n in (75, 50))
    targets = torch.arange(75) % 50
    problem = Problem(
        hidden, weight, targets, None, 1.0, None, True, 75, torch.float32, first_product="fused"
    )
    tile = Tile(16, 16, 16, 4, 2, group=2)
    engines = (TritonExponentials(problem, tile), TorchExponentials(problem))
    rows = slice(0, 75)
    ours, twin = (engine.forward(rows) for engine in engines)
    parts = [engine._buffers["exponentials"][:, :50] for engine in engines]
    return {
        "logprob": float((ours.logprob - twin.logprob).abs().max()),
        "entropy": float((ours.entropy - twin.entropy).abs().max()),  # type: ignore[operator]
        "exponentials": _apart(parts[0], parts[1].double()),
    }


def add_rows() -> Result:
    """Columns that repeat or are on another rank, into a matrix stored either way round."""
    from cod_kernels.linear_logprob.chunks import Problem
    from cod_kernels.linear_logprob.exponentials import TorchExponentials
    from cod_kernels.linear_logprob.exponentials_triton import TritonExponentials

    generator = torch.Generator().manual_seed(4)
    columns = torch.tensor([5, -1, 5, 0, 6, 5, -1, 0])
    rows, factor = torch.randn(8, 1100, generator=generator), torch.randn(8, generator=generator)
    factor[columns < 0] = 0
    problem = Problem(
        rows, torch.ones(7, 1100), columns, None, 1.0, None, False, 8, torch.float32, first_product="fused"
    )
    start = torch.randn(7, 1100, generator=generator)
    outs = [start.clone(), start.clone(), start.t().contiguous().t()]
    TorchExponentials(problem).add_rows(outs[0], columns, rows, factor)
    for out in outs[1:]:
        TritonExponentials(problem).add_rows(out, columns, rows, factor)
    return {"rows": max(_apart(out, outs[0].double()) for out in outs[1:])}


def bad_rows() -> Result:
    """Targets outside the vocabulary and hidden states that are not finite give NaN, far rows an error."""
    from cod_kernels.linear_logprob.chunks import Problem, forward_walk
    from cod_kernels.linear_logprob.exponentials_triton import TritonExponentials

    hidden, weight = torch.ones(5, 8), torch.ones(11, 8)
    hidden[1, 3], hidden[2, 3] = float("nan"), float("inf")
    targets = torch.tensor([11, 0, 0, 3, -1])
    problem = Problem(hidden, weight, targets, None, 1.0, None, False, 5, torch.float32)
    logprob = forward_walk(TritonExponentials(problem), is_kept=False).logprob
    wrong = [bool(v) for v in torch.isnan(logprob)] != [True, True, True, False, True]
    weight = weight.clone()
    weight[4] = 20
    try:
        linear_logprob(
            torch.ones(2, 8), weight, torch.tensor([4, 5]), first_product="fused", backend="triton"
        )
        wrong = True
    except KernelInputError as error:
        wrong |= "row 1 is below -104" not in str(error)
    return {"wrong": float(wrong), "value": abs(float(logprob[3]) + float(torch.tensor(11.0).log()))}


def reads() -> Result:
    """The walk with the loss in the chunk: nothing is read back beyond what the CPU alone looks at."""
    from host_reads import host_reads_of

    from cod_kernels.linear_logprob.chunks import Problem
    from cod_kernels.linear_logprob.exponentials_triton import TritonExponentials
    from cod_kernels.linear_logprob.fused import loss_walk
    from cod_kernels.segment_loss.reference import LossInputs

    rows, segments = 48, 5
    hidden, weight = torch.randn(rows, 8), torch.randn(33, 8)
    targets = torch.arange(rows) % 33
    engine = TritonExponentials(
        Problem(hidden, weight, targets, None, 1.0, None, True, 32, torch.float32, first_product="fused")
    )
    engine.want((True, True, False))
    tokens = torch.zeros(rows)
    inputs = LossInputs(
        tokens, tokens, torch.arange(rows) % segments, torch.randn(segments), torch.ones(segments)
    )
    found = host_reads_of(lambda: loss_walk(engine, inputs, LossOptions(), rows, "triton"))
    # Per chunk: whether a row is out of reach, and whether there is any gradient; a device is asked neither.
    return {"reads_beyond_those_of_the_cpu": float(len(found) - 4)}


INTERPRETED: dict[str, Any] = {
    "exponentials_fp32": lambda: against_fp64(
        torch.float32, rows=50, vocab=1003, width=100, chunk_rows=32, is_full=False
    ),
    "exponentials_fp32_full": lambda: against_fp64(
        torch.float32, rows=50, vocab=303, width=37, chunk_rows=None, is_full=True
    ),
    "exponentials_bf16": lambda: against_fp64(
        torch.bfloat16, rows=50, vocab=1003, width=100, chunk_rows=None, is_full=False
    ),
    "exponentials_bf16_full": lambda: against_fp64(
        torch.bfloat16, rows=50, vocab=303, width=37, chunk_rows=32, is_full=True
    ),
    "exponentials_one_row": lambda: against_fp64(
        torch.float32, rows=1, vocab=37, width=7, chunk_rows=None, is_full=False
    ),
    "exponentials_many_tiles": many_tiles,
    "exponentials_add_rows": add_rows,
    "exponentials_bad_rows": bad_rows,
    "exponentials_host_reads": reads,
}

_VALUES = {"logprob": 1e-5, "entropy": 1e-5, "repeats": 0.0}
BOUNDS: dict[str, dict[str, float]] = {
    "exponentials_fp32": _VALUES | {"d_hidden": 1e-5, "d_weight": 1e-5},
    "exponentials_fp32_full": _VALUES | {"d_hidden": 1e-5, "d_weight": 1e-5, "d_bias": 1e-5},
    # The interpreter truncates where hardware rounds: twice the bound of 3e-3.
    "exponentials_bf16": _VALUES | {"d_hidden": 6e-3, "d_weight": 6e-3},
    "exponentials_bf16_full": _VALUES | {"d_hidden": 6e-3, "d_weight": 6e-3, "d_bias": 6e-3},
    "exponentials_one_row": _VALUES | {"d_hidden": 1e-5, "d_weight": 1e-5},
    "exponentials_many_tiles": {"logprob": 1e-5, "entropy": 1e-5, "exponentials": 1e-5},
    "exponentials_add_rows": {"rows": 1e-6},
    "exponentials_bad_rows": {"wrong": 0.0, "value": 1e-6},
    "exponentials_host_reads": {"reads_beyond_those_of_the_cpu": 0.0},
}


def compiled(generation: int) -> list[dict[str, Any]]:
    """Return the fields of cases of the ahead-of-time script: every shipped tile with all it is used for."""
    from cod_kernels.linear_logprob import exponentials_triton as fused

    common = {"bias_ptr": "*bf16", "inverse_ptr": "*fp32", "vocab_size": "i32", "width": "i32"}
    common |= {"softcap": "fp32", "inverse": "fp32"}
    product = common | {"target_logit_ptr": "*fp32", "sum_ptr": "*fp32", "spread_ptr": "*fp32"}
    product |= {"column_ptr": "*i32", "partial_stride": "i32", "num_rows": "i32"}
    single = common | {"hidden_ptr": "*bf16", "hidden_stride": "i32", "weight_ptr": "*bf16"}
    single |= {"weight_stride": "i32", "column_ptr": "*i32", "out_ptr": "*fp32", "out_stride": "i32"}
    cases = []
    for is_full in (False, True):
        switches: dict[str, Any] = dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", "ROW_TEMPERATURE"), is_full)
        cases.append(
            {
                "name": f"linear_logprob.target.{int(is_full)}",
                "kernel": fused.target_kernel,
                "types": single,
                "constants": switches | {"BLOCK": fused.TARGET_BLOCK},
                "num_warps": fused.TARGET_WARPS,
                "divisible": ("width",),
            }
        )
    adder = {"out_ptr": "*fp32", "out_row_stride": "i32", "order_ptr": "*i64", "column_ptr": "*i32"}
    adder |= {"end_ptr": "*i32", "rows_ptr": "*bf16", "rows_row_stride": "i32", "factor_ptr": "*fp32"}
    cases.append(
        {
            "name": "linear_logprob.add_rows",
            "kernel": fused.add_rows_kernel,
            "types": adder | {"width": "i32"},
            # Rows of adjacent elements: Triton makes a stride of one a constant by itself.
            "constants": {"BLOCK": fused.ADD_BLOCK, "out_stride": 1, "rows_stride": 1},
            "num_warps": fused.ADD_WARPS,
            "divisible": ("width",),
        }
    )
    # Entropy, soft-cap, bias with a temperature per row, stored exponentials.
    flags = [flag for flag in itertools.product((False, True), repeat=4) if flag[1:3] != (True, False)]
    for has_entropy, has_softcap, has_bias, has_out in flags:
        tiles = fused.tiles_for(
            has_entropy=has_entropy, has_softcap=has_softcap, has_bias=has_bias, generation=generation
        )
        for tile in tiles:
            types = product | {
                "hidden_desc": f"tensordesc<bf16[{tile.rows}, {tile.width}]>",
                "weight_desc": f"tensordesc<bf16[{tile.vocab}, {tile.width}]>",
            }
            if has_out:
                types["out_desc"] = f"tensordesc<bf16[{tile.rows}, {tile.vocab}]>"
            constants = {
                "HAS_BIAS": has_bias,
                "HAS_SOFTCAP": has_softcap,
                "HAS_ENTROPY": has_entropy,
                "HAS_OUT": has_out,
                "ROW_TEMPERATURE": has_bias,
                "UPCAST": False,
                "IS_FLAT": tile.is_flat,
                "GROUP": tile.group,
                "ROWS": tile.rows,
                "VOCAB": tile.vocab,
                "WIDTH": tile.width,
            }
            label = "".join(str(int(flag)) for flag in (has_entropy, has_softcap, has_bias, has_out))
            cases.append(
                {
                    "name": f"linear_logprob.exponentials.{tile.name}.{label}",
                    "kernel": fused.exponentials_kernel,
                    "types": types,
                    "constants": constants | ({} if has_out else {"out_desc": None}),
                    "num_warps": tile.num_warps,
                    "num_stages": tile.num_stages,
                }
            )
    return cases
