"""Every layout on one rank against the dense float64 reference, forward and backward, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_attention import Tensors, dense, gradients, inputs, visible, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cod_async.models.attention import attend, attending, attention_backend, choice, kernels
from cod_async.models.attention.blocks import attend_blocks
from cod_async.models.attention.kernels import Gradients, Kernel, Plain
from cod_async.models.attention.places import Block, buckets, make_blocks
from cod_async.models.attention.rows import longest_row, packed_passes, tree_passes
from cod_async.models.layout import RECTANGLE, Layout

CPU = torch.device("cpu")
SCALE = 0.3
EXACT = 1e-12


def leaves(parts: Tensors) -> Tensors:
    a, b, c = (part.detach().requires_grad_() for part in parts)
    return a, b, c


def compare(parts: Tensors, layout: Layout, tolerance: float) -> None:
    """Check output and gradients of a packed or tree layout."""
    check(parts, layout, lambda q, k, v: attend(q, k, v, layout, scale=SCALE), tolerance)


def check(parts: Tensors, layout: Layout, compute: Callable[..., Tensor], tolerance: float) -> None:
    mine, reference = leaves(parts), leaves(parts)
    out, expected = compute(*mine), dense(*reference, visible(layout), SCALE)
    assert out.shape == expected.shape
    assert out.dtype == parts[0].dtype
    assert worst(out, expected) < tolerance
    assert worst(gradients(out, mine), gradients(expected, reference)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 8), (6, 2, 10), (3, 3, 16), (1, 1, 1)])
def test_rectangle(heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    parts = inputs(13, heads, kv_heads, width, batch=3, dtype=dtype)
    mine, reference = leaves(parts), leaves(parts)
    out = attend(*mine, RECTANGLE, scale=SCALE)
    expected = dense(*reference, torch.ones(13, 13, dtype=torch.bool).tril(), SCALE)
    tolerance = {torch.float32: 2e-6, torch.float64: EXACT, torch.bfloat16: 0.03}[dtype]
    assert out.shape == (3, 13, heads, width)
    assert worst(out, expected) < tolerance
    assert worst(gradients(out, mine), gradients(expected, reference)) < tolerance


def test_a_rectangle_on_a_cpu_keeps_the_bits_of_repeated_heads() -> None:
    parts = inputs(37, 4, 2, 16, batch=2, dtype=torch.float32)
    mine, reference = leaves(parts), leaves(parts)
    query, key, value = reference
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1), is_causal=True
    ).transpose(1, 2)
    out = attend(*mine, RECTANGLE, scale=16**-0.5)
    assert torch.equal(out, expected)
    for found, wanted in zip(gradients(out, mine), gradients(expected, reference), strict=True):
        assert torch.equal(found, wanted)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7), groups=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_packed_rows(lengths: list[int], groups: int) -> None:
    compare(inputs(sum(lengths), 2 * groups, 2, 6), Layout("packed", tuple(lengths)), EXACT)


TREES = st.integers(1, 9).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 9), min_size=count, max_size=count),
        st.tuples(*(st.integers(-1, node - 1) for node in range(count))),
    )
)


@given(tree=TREES, groups=st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_trees(tree: tuple[list[int], tuple[int, ...]], groups: int) -> None:
    lengths, parents = tree
    compare(inputs(sum(lengths), 2 * groups, 2, 6), Layout("tree", tuple(lengths), None, parents), EXACT)


@pytest.mark.parametrize(
    ("lengths", "parents"),
    [
        ((1,), (-1,)),
        ((5, 1, 1), (-1, -1, -1)),  # no tree at all
        ((3, 2, 4, 1), (-1, 0, 1, 2)),  # one chain
        ((200, 150, 60, 70), (-1, 0, 0, 0)),  # longer than a tile of any kernel
        (
            (4,) * 15,
            (-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6),
        ),  # breadth first: descendants are scattered
        ((2,) * 40, (-1, *(node for node in range(39)))),  # deep, without branches
        ((2, 1) * 12, (-1, *(max(0, 2 * ((node - 1) // 2)) for node in range(1, 24)))),  # deep, with them
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_of_trees(lengths: tuple[int, ...], parents: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = Layout("tree", lengths, None, parents)
    compare(inputs(sum(lengths), 4, 2, 8, dtype=dtype), layout, 3e-6 if dtype == torch.float32 else EXACT)


def test_a_tree_in_bfloat16_is_as_exact_as_one_row() -> None:
    # Partial sums are kept in float32, so that merging costs no more than the type itself.
    compare(inputs(60, 4, 2, 16, dtype=torch.bfloat16), Layout("packed", (30, 30)), 0.03)
    tree = Layout("tree", (20, 10, 10, 5, 15), None, (-1, 0, 0, 2, 2))
    compare(inputs(60, 4, 2, 16, dtype=torch.bfloat16), tree, 0.03)


class RaggedPlain(Plain):
    """Takes ragged blocks, as flash attention on CUDA does, and computes each segment by itself."""

    name = "ragged-plain"
    is_ragged = True

    def forward(
        self, block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        parts = [
            super(RaggedPlain, self).forward(one, query[q], key[k], value[k], scale)
            for one, q, k in self.segments(block)
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def backward(
        self,
        block: Block,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> Gradients:
        parts = [
            super(RaggedPlain, self).backward(one, grad[q], query[q], key[k], value[k], out[q], lse[q], scale)
            for one, q, k in self.segments(block)
        ]
        dq, dk, dv = (torch.cat(each) for each in zip(*parts, strict=True))
        return dq, dk, dv

    def segments(self, block: Block) -> list[tuple[Block, slice, slice]]:
        assert block.query_starts is not None
        assert block.key_starts is not None
        queries, keys = block.query_starts.tolist(), block.key_starts.tolist()
        assert len(queries) == len(keys) == block.num_segments + 1
        return [
            (
                Block(block.queries, block.keys, block.is_causal, 1, q1 - q0, k1 - k0),
                slice(q0, q1),
                slice(k0, k1),
            )
            for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False)
        ]


@pytest.mark.parametrize("kernel", [Plain(), RaggedPlain()], ids=lambda kernel: str(kernel.name))
@pytest.mark.parametrize(
    ("lengths", "parents"),
    [
        ((7, 1, 300, 12), ()),
        ((6, 3, 2, 5, 1, 4, 2), (-1, 0, 0, 2, 2, -1, 5)),
        ((140, 3, 150, 5), (-1, 0, 0, -1)),
    ],
)
def test_kernels_for_other_devices_agree(
    kernel: Kernel, lengths: tuple[int, ...], parents: tuple[int, ...]
) -> None:
    layout = Layout("tree" if parents else "packed", lengths, None, parents)
    passes = tree_passes(lengths, parents) if parents else packed_passes(lengths)
    blocks = make_blocks(passes, is_ragged=kernel.is_ragged, device=CPU)

    def compute(*parts: Tensor) -> Tensor:
        q, k, v = (part[0].transpose(0, 1) for part in parts)
        return attend_blocks(q, k, v, blocks, kernel, SCALE)[None]

    check(inputs(sum(lengths), 4, 2, 6), layout, compute, EXACT)


def test_calls_of_flash_attention_on_cuda_fit_its_signature() -> None:
    # Torch computes shapes of CUDA's kernels on the meta device, from the same signatures.
    varlen = next(each for each in kernels.KERNELS if each.name == "varlen-flash")
    meta = torch.device("meta")
    blocks = make_blocks(tree_passes((10, 5, 6, 10), (-1, 0, 0, -1)), is_ragged=True, device=meta)
    assert [(block.is_causal, block.num_segments) for block in blocks] == [(True, 4), (False, 1)]
    shapes = [(31, 4, 64), (31, 2, 64), (31, 2, 64)]
    parts = [torch.empty(shape, dtype=torch.bfloat16, device=meta).requires_grad_() for shape in shapes]
    out = attend_blocks(parts[0], parts[1], parts[2], blocks, varlen, SCALE)
    grads = torch.autograd.grad(out.sum(), parts)
    assert (out.shape, out.dtype) == ((31, 4, 64), torch.bfloat16)
    assert [grad.shape for grad in grads] == shapes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float32, 1e-4), (torch.float64, EXACT)]
)
@pytest.mark.parametrize(
    ("lengths", "parents"), [((7, 1, 300, 12), ()), ((140, 3, 150, 5, 9), (-1, 0, 0, 2, 2))]
)
def test_on_cuda(
    lengths: tuple[int, ...], parents: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    layout = Layout("tree" if parents else "packed", lengths, None, parents)

    def compute(*parts: Tensor) -> Tensor:
        q, k, v = (part.cuda() for part in parts)
        return attend(q, k, v, layout, scale=SCALE).cpu()

    check(inputs(sum(lengths), 4, 2, 64, dtype=dtype), layout, compute, tolerance)


@pytest.mark.parametrize("layout", [Layout("packed", (4, 1, 6)), Layout("tree", (4, 1, 6), None, (-1, 0, 0))])
def test_strides_do_not_matter(layout: Layout) -> None:
    # The gradient of a sum has strides of 0; heads whose numbers lie apart come from transposed weights.
    mine, reference = leaves(inputs(11, 4, 2, 6)), leaves(inputs(11, 4, 2, 6))
    apart = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in mine]
    assert apart[0].stride(-1) != 1
    out = attend(apart[0], apart[1], apart[2], layout, scale=SCALE)
    expected = dense(*reference, visible(layout), SCALE)
    assert worst(out, expected) < EXACT
    found = torch.autograd.grad(out.sum(), mine)
    assert worst(found, torch.autograd.grad(expected.sum(), reference)) < EXACT


class LargestResult(TorchDispatchMode):
    """Records the most elements that any operation's result has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.parametrize("kernel", ["cpu-flash", "plain"])
@pytest.mark.parametrize("kind", ["packed", "tree"])
def test_memory_grows_with_tokens_not_with_their_square(
    kind: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = next(each for each in kernels.KERNELS if each.name == kernel)
    monkeypatch.setattr(choice, "pick", lambda *_: chosen)
    num_tokens, width = 2048, 4
    parents = (-1, 0, 0) if kind == "tree" else ()
    layout = Layout("tree" if parents else "packed", (1000, 500, num_tokens - 1500), None, parents)
    parts = leaves(inputs(num_tokens, 2, 1, width, dtype=torch.float32))
    with LargestResult() as largest:
        attend(*parts, layout, scale=SCALE).sum().backward()
    # The plain kernel holds 128 rows of scores of two heads; all else is a few numbers per token.
    most = 2 * 128 * 1000 if kernel == "plain" else 2 * num_tokens * width
    assert 0 < largest.numel <= most < num_tokens**2


def test_rows_share_a_rectangle_only_where_padding_is_cheap() -> None:
    assert buckets([5, 900, 5, 7]) == [[1], [0, 2, 3]]
    assert buckets([60, 100, 96]) == [[1, 2], [0]]
    groups = buckets([3, 50, 2, 40, 600, 601])
    assert sorted(row for group in groups for row in group) == [0, 1, 2, 3, 4, 5]


def test_one_full_block_per_branching_node() -> None:
    # 0 - 1 - 2, with 3 and 4 below 2, and 5 and 6 below 3: joined 0..2 and 3 have several children.
    passes = tree_passes((2, 1, 3, 1, 2, 1, 1), (-1, 0, 1, 2, 2, 3, 3))
    causal, *full = passes
    assert [len(segment.queries) for segment in causal.segments] == [6, 1, 2, 1, 1]
    assert [[list(s.keys) for s in each.segments] for each in full] == [[[0, 1, 2, 3, 4, 5]], [[6]]]
    assert [list(s.queries) for each in full for s in each.segments] == [[6, 7, 8, 9, 10], [9, 10]]


def test_positions_needed() -> None:
    assert longest_row((3, 9, 2), ()) == 9
    assert longest_row((3, 4, 2, 6), (-1, 0, 1, 0)) == 9


class Wrong(Plain):
    """Gives a gradient that is a little too large."""

    def backward(self, *args: Any) -> Gradients:
        dq, dk, dv = super().backward(*args)
        return dq, dk, dv * 1.05


def test_a_kernel_that_raises_or_is_wrong_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    varlen = next(each for each in kernels.KERNELS if each.name == "varlen-flash")
    monkeypatch.setattr(choice, "_CANDIDATES", {"cpu": (varlen, Wrong(), RaggedPlain())})
    choice._pick.cache_clear()
    try:
        with caplog.at_level("INFO", logger=choice.__name__):
            assert attention_backend(CPU, torch.float64, "packed") == "ragged-plain"
    finally:
        choice._pick.cache_clear()
    first, second, third = caplog.messages
    assert "not varlen-flash" in first
    assert "not plain, its numbers differ by" in second
    assert third.endswith("heads of 128: ragged-plain")


class NotANumber(Plain):
    """Its output is right, its gradients are not."""

    def backward(self, *args: Any) -> Gradients:
        dq, dk, dv = super().backward(*args)
        return dq, dk * torch.nan, dv


def test_a_kernel_that_gives_nan_after_right_numbers_is_passed_over() -> None:
    problem = choice.problem_of(NotANumber(), CPU, torch.float32, 8)
    assert problem is not None
    assert "nan" in problem


def test_the_test_of_kernels_is_not_seen_by_what_it_is_called_in() -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        assert choice.problem_of(kernels.CpuFlash(), CPU, torch.float32, 8) is None
    assert not seen


def test_heads_are_grouped_only_where_no_matrix_of_scores_comes_of_it() -> None:
    grouped = attending.takes_grouped_heads
    assert grouped("cuda", torch.bfloat16, 128)
    assert not grouped("cuda", torch.float32, 128)
    assert not grouped("cuda", torch.bfloat16, 512)
    assert not grouped("cpu", torch.bfloat16, 128)


def test_backends_have_names() -> None:
    assert attention_backend("cpu", torch.float32, "rectangle") == "sdpa"
    assert attention_backend("cpu", torch.float32, "packed") == "cpu-flash"
    assert attention_backend(CPU, torch.float64, "tree") == "cpu-flash"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout("packed", (3, 3)), "rows of 6 tokens in all, the tensors 5"),
        (Layout("tree", (3, 2), None, (-1,)), "give one per node"),
        (Layout("tree", (3, 2), None, (1, -1)), "parents come before children"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(*inputs(5, 2, 2, 4), layout, scale=SCALE)


def test_a_packed_layout_has_one_line() -> None:
    with pytest.raises(ValueError, match="one line of tokens, not 2"):
        attend(*inputs(5, 2, 2, 4, batch=2), Layout("packed", (5,)), scale=SCALE)


def test_heads_that_do_not_divide_are_refused() -> None:
    query, _, _ = inputs(5, 3, 2, 4)
    _, key, value = inputs(5, 3, 2, 4)
    with pytest.raises(ValueError, match="key heads divide query heads"):
        attend(query, key, value, RECTANGLE, scale=SCALE)
