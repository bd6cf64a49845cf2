"""Compiles every kernel in every shipped configuration for Hopper and Blackwell, and prints what came out.

Needs neither a GPU nor a CUDA toolkit: the Triton wheel carries the assembler. Runs as its own process
without TRITON_INTERPRET, because Triton decides at import whether kernels are compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import exponential_cases
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cod_kernels.linear_logprob import kernel as logprob
from cod_kernels.segment_loss import kernel as loss
from cod_kernels.segment_loss.reference import CLIPS
from cod_kernels.segment_reduce import kernel as reduce

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    """Numbers that are multiples of 16 where it counts, as Triton finds out from a call by itself."""


def loss_cases() -> list[Case]:
    types = dict.fromkeys(("cur_ptr", "beh_ptr", "adv_ptr", "neg_ptr", "weight_ptr", "prox_ptr"), "*fp32")
    types |= dict.fromkeys(("ref_ptr", "ent_ptr", "bound_ptr", "segment_ptr", "grad_ptr"), "*fp32")
    types |= {"ids_ptr": "*i64", "partial_ptr": "*fp64", "num_tokens": "i32", "num_segments": "i32"}
    types |= dict.fromkeys(("low", "high", "dual_cap", "floor", "cap", "tv", "kl_coef"), "fp32")
    types |= {"log_ratio_coef": "fp32"}
    plain = {
        "HAS_DUAL": False,
        "HAS_PARTS": False,
        "PROXIMAL": 0,
        "HAS_SEGMENT_RATIO": False,
        "HAS_SQUARE": False,
        "HAS_ENTROPY": True,
        "WEIGHT": 0,
        "KL": 0,
    }
    full = {
        "HAS_DUAL": True,
        "HAS_PARTS": True,
        "PROXIMAL": 1,
        "HAS_SEGMENT_RATIO": False,
        "HAS_SQUARE": True,
        "HAS_ENTROPY": True,
        "WEIGHT": 2,
        "KL": 3,
    }
    cases = []
    for (index, clip), (label, switches) in itertools.product(
        enumerate(CLIPS), (("plain", plain), ("full", full))
    ):
        constants = {
            "CLIP": index,
            "RATIO_INSIDE": clip in loss.RATIO_CLIPS,
            "WIDTH": loss.COLUMNS,
            "BLOCK": loss.BLOCK,
        }
        name = f"segment_loss.{clip}.{label}"
        cases.append(Case(name, loss.segment_loss_kernel, types, switches | constants, loss.NUM_WARPS))
        if clip == "one_side" and label == "full":  # the switches that do not depend on the clip
            narrow = types | {"ids_ptr": "*i32"}
            more = (
                {"WEIGHT": 1, "KL": 1},
                {"WEIGHT": 0, "KL": 2},
                {"PROXIMAL": 0, "HAS_DUAL": False},
                {"PROXIMAL": 2, "HAS_SQUARE": False},
                {"WEIGHT": 0, "HAS_SEGMENT_RATIO": True},
            )
            for part in more:
                label = ".".join(f"{k}{int(v)}" for k, v in part.items())
                constants = switches | constants | part
                cases.append(
                    Case(f"{name}.{label}", loss.segment_loss_kernel, narrow, constants, loss.NUM_WARPS)
                )
    finish = {"partial_ptr": "*fp64", "metric_ptr": "*fp64", "loss_ptr": "*fp32", "num_blocks": "i32"}
    constants = {"WIDTH": loss.COLUMNS, "ADDITIVE": loss.NUM_ADDITIVE, "METRICS": loss.NUM_METRICS}
    cases.append(
        Case(
            "segment_loss.finish",
            loss.finish_kernel,
            finish,
            constants | {"ROWS": loss.FINISH_ROWS},
            loss.FINISH_WARPS,
        )
    )
    return cases


def reduce_cases() -> list[Case]:
    types = {"order_ptr": "*i64", "partial_ptr": "*fp64", "count_ptr": "*fp64", "num_tokens": "i32"}
    return [
        Case(
            f"segment_reduce.{'order' if has_order else 'sorted'}.{values}.{ids}",
            reduce.segment_reduce_kernel,
            types | {"values_ptr": f"*{values}", "ids_ptr": f"*{ids}"},
            {"HAS_ORDER": has_order, "BLOCK": reduce.BLOCK},
            4,
        )
        for values, ids in (("fp32", "i64"), ("fp64", "i32"))
        for has_order in (False, True)
    ]


def logprob_cases() -> list[Case]:
    cases = []
    flags = itertools.product(("fp32", "bf16", "fp16"), ((0, 0, 0, 0), (0, 0, 1, 0), (1, 1, 1, 1)))
    for dtype, (has_bias, has_softcap, has_entropy, by_row) in flags:
        label = f"{dtype}.{has_bias}{has_softcap}{has_entropy}{by_row}"
        common = {
            "HAS_BIAS": bool(has_bias),
            "HAS_SOFTCAP": bool(has_softcap),
            "ROW_TEMPERATURE": bool(by_row),
        }
        common |= {"BLOCK": logprob.BLOCK}
        types = {"logits_ptr": "*fp32", "stride": "i32", "target_ptr": "*i64", "bias_ptr": f"*{dtype}"}
        types |= {"inverse_ptr": "*fp32", "lse_ptr": "*fp32", "entropy_ptr": "*fp32", "vocab_size": "i32"}
        types |= {"vocab_start": "i32", "softcap": "fp32", "inverse": "fp32"}
        stats = Case(
            f"linear_logprob.stats.{label}",
            logprob.stats_kernel,
            types | {"logprob_ptr": "*fp32"},
            common | {"HAS_ENTROPY": bool(has_entropy)},
            logprob.NUM_WARPS,
        )
        more = {"out_ptr": f"*{dtype}", "out_stride": "i32", "g_ptr": "*fp32", "h_ptr": "*fp32"}
        gradient = Case(
            f"linear_logprob.gradient.{label}",
            logprob.gradient_kernel,
            types | more,
            common | {"HAS_H": bool(has_entropy)},
            logprob.NUM_WARPS,
        )
        cases += [stats, gradient]
    return cases


def compile_case(case: Case, arch: int, folder: Path) -> dict[str, Any]:
    names = case.kernel.arg_names
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = [
        i
        for i, name in enumerate(names)
        if case.types.get(name, "").startswith("*") or name.endswith("stride") or name in case.divisible
    ]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = folder / f"{case.name}.{arch}.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    sass = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))  # type: ignore[union-attr]
    return {
        "name": case.name,
        "arch": arch,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": built.metadata.shared,
        "num_warps": built.metadata.num_warps,
        "wide_loads": len(re.findall(r"LDG\.E\S*\.128", sass)),
        "local_memory": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "tensor_core_products": len(re.findall(r"\b(?:HGMMA|UTCHMMA)\b", sass)),
        "tile_loads": len(re.findall(r"\bUTMALDG\b", sass)),
        "tile_stores": len(re.findall(r"\bUTMASTG\b", sass)),
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED)\b", sass)),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cases = [*loss_cases(), *reduce_cases(), *logprob_cases()]
        arches = [int(value) for value in sys.argv[1:]] or [90, 100]
        results = []
        for arch in arches:
            tiles = [Case(**fields) for fields in exponential_cases.compiled(arch // 10)]
            results += [compile_case(case, arch, Path(folder)) for case in cases + tiles]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
