"""What programs cost, against counts by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.batch import Batch
from jaxcl.models.generation import Generator
from jaxcl.planning.cost import Collective, Cost, count_cost
from jaxcl.planning.hlo import parse, times, trips
from tests.tiny.networks import row_losses, tiny_llama


def cost_of(function, *shapes):
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    return count_cost(parse(compiled.as_text()), causal=False)


def test_products_in_a_loop_count_as_often_as_it_turns() -> None:
    def function(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert cost_of(function, (7, 32, 32), (16, 32)).flops == 7 * 2 * 16 * 32 * 32


def test_loops_within_loops_multiply() -> None:
    def inner(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)

    def function(w, x):
        return jax.lax.scan(lambda x, w: (inner(x, w), None), x, w)[0]

    assert cost_of(function, (3, 8, 8), (4, 8)).flops == 3 * 5 * 2 * 4 * 8 * 8


def test_a_loop_reads_a_slice_of_stacked_weights_each_turn_and_not_all_of_them() -> None:
    """Were the whole stack counted each turn, it would be 64 times the stack's size."""

    def function(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x * w), None), x, w)[0]

    stack = 64 * 1000 * 4
    assert stack <= cost_of(function, (64, 1000), (1000,)).bytes <= 6 * stack


def test_a_plain_product_moves_its_operands_and_its_result() -> None:
    cost = cost_of(lambda a, b: a @ b, (64, 128), (128, 256))
    assert cost.bytes == 4 * (64 * 128 + 128 * 256 + 64 * 256)
    assert cost.collectives == {}


# In the manner of the TPU compiler: a product as a convolution, one inside a loop; a gather that runs beside it, which
# stands in the text where it starts and where it is waited for; a reduction of which each chip keeps a part.
TPU = """HloModule step, is_scheduled=true

%start (p: bf16[8,16]) -> (bf16[8,16], bf16[32,16]) {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[32,16]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (q: bf16[8,16]) -> bf16[32,16] {
  %q = bf16[8,16]{1,0} parameter(0)
  %gather.2 = bf16[32,16]{1,0} all-gather(%q), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %d = bf16[32,16]{1,0} custom-call(%q, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter (r: f32[64]) -> f32[16] {
  %r = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%r), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[16]{0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={16}
}

%body (t: (s32[], bf16[8,16], f32[64], f32[4,8,32], f32[4,32,2])) -> (s32[], bf16[8,16], f32[64], f32[4,8,32], f32[4,32,2]) {
  %t = (s32[], bf16[8,16]{1,0}, f32[64]{0}, f32[4,8,32]{2,1,0}, f32[4,32,2]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = bf16[8,16]{1,0} get-tuple-element(%t), index=1
  %g = f32[64]{0} get-tuple-element(%t), index=2
  %lhs = f32[4,8,32]{2,1,0} get-tuple-element(%t), index=3
  %rhs = f32[4,32,2]{2,1,0} get-tuple-element(%t), index=4
  %begin = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %dots = f32[4,8,2]{2,1,0} convolution(%lhs, %rhs), window={size=4 stride=3 pad=0_3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
  %end = bf16[32,16]{1,0} fusion(%w), kind=kCustom, calls=%done
  %scattered = f32[16]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[8,16]{1,0}, f32[64]{0}, f32[4,8,32]{2,1,0}, f32[4,32,2]{2,1,0}) tuple(%next, %w, %g, %lhs, %rhs)
}

%condition (u: (s32[], bf16[8,16], f32[64], f32[4,8,32], f32[4,32,2])) -> pred[] {
  %u = (s32[], bf16[8,16]{1,0}, f32[64]{0}, f32[4,8,32]{2,1,0}, f32[4,32,2]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %limit = s32[]{:T(128)} constant(10)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (x: (s32[], bf16[8,16], f32[64], f32[4,8,32], f32[4,32,2])) -> (s32[], bf16[8,16], f32[64], f32[4,8,32], f32[4,32,2]) {
  %x = (s32[], bf16[8,16]{1,0}, f32[64]{0}, f32[4,8,32]{2,1,0}, f32[4,32,2]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[8,16]{1,0}, f32[64]{0}, f32[4,8,32]{2,1,0}, f32[4,32,2]{2,1,0}) while(%x), condition=%condition, body=%body
}
"""  # noqa: E501


def test_turns_are_read_from_the_condition() -> None:
    program = parse(TPU)
    assert trips(program, program.computations["main"]["loop"]) == 10
    assert {name: count for name, count, _ in times(program)}["start"] == 10


@pytest.mark.parametrize(("limit", "step", "turns"), [(8, 2, 4), (7, 2, 4), (8, 1, 8)])
def test_a_counter_may_advance_by_more_than_one(limit: int, step: int, turns: int) -> None:
    """As in the TPU compiler's products that gather one operand part by part."""
    text = f"""HloModule windowed

%body (t: (f32[4], u32[])) -> (f32[4], u32[]) {{
  %t = (f32[4]{{0}}, u32[]) parameter(0)
  %x = f32[4]{{0}} get-tuple-element(%t), index=0
  %i = u32[] get-tuple-element(%t), index=1
  %step = u32[]{{:T(128)}} constant({step})
  %next = u32[]{{:T(128)}} add(%i, %step)
  ROOT %out = (f32[4]{{0}}, u32[]) tuple(%x, %next)
}}

%condition (u: (f32[4], u32[])) -> pred[] {{
  %u = (f32[4]{{0}}, u32[]) parameter(0)
  %j = u32[] get-tuple-element(%u), index=1
  %limit = u32[]{{:T(128)}} constant({limit})
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}}

ENTRY %main (x: (f32[4], u32[])) -> (f32[4], u32[]) {{
  %x = (f32[4]{{0}}, u32[]) parameter(0)
  ROOT %loop = (f32[4]{{0}}, u32[]) while(%x), condition=%condition, body=%body
}}
"""
    program = parse(text)
    assert trips(program, program.computations["main"]["loop"]) == turns


def test_a_loop_whose_length_the_program_computes_counts_as_told() -> None:
    def function(n, x):
        return jax.lax.while_loop(lambda c: c[0] < n[0], lambda c: (c[0] + 1, c[1] @ c[1]), (jnp.int32(0), x))[1]

    shapes = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    program = parse(jax.jit(function).lower(*shapes).compile().as_text())
    assert count_cost(program, causal=False, loop_trips=3).flops == 3 * 2 * 8 * 8 * 8


def test_a_collective_beside_other_work_counts_once() -> None:
    """Rings of 4: a gather of parts of 8 x 16 bfloat16 sends 3 parts, a scattered sum of 64 float32 three quarters."""
    cost = count_cost(parse(TPU), causal=False)
    assert cost.collectives == {
        "all-gather": Collective(10, 10 * 3 * 8 * 16 * 2),
        "reduce-scatter": Collective(10, 10 * 64 * 4 * 3 / 4),
    }
    assert cost.sent == 10 * (768 + 192)


def test_a_product_with_a_batch_axis_as_a_convolution_counts_no_padding() -> None:
    """Of the 4 x 4 pairs of places, only the 4 that meet an input cost anything: 4 products of [8, 32] and [32, 2]."""
    assert count_cost(parse(TPU), causal=False).flops == 10 * 4 * 2 * 8 * 32 * 2


@pytest.mark.parametrize(("causal", "share"), [(False, 1.0), (True, 0.5)])
@pytest.mark.parametrize(("kernel", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_splash_attention_counts_by_its_products(kernel: str, products: int, causal: bool, share: float) -> None:
    text = f"""HloModule attention

ENTRY %main (q: bf16[2,4,256,64]) -> bf16[2,4,256,64] {{
  %q = bf16[2,4,256,64]{{3,2,1,0}} parameter(0)
  %mask = s8[1,2,2]{{2,1,0}} constant({{...}})
  ROOT %splash_mha_{kernel}_no_residuals.1 = bf16[2,4,256,64]{{3,2,1,0}} custom-call(%mask, %q, %q, %q), custom_call_target="tpu_custom_call"
}}
"""  # noqa: E501
    one_product = 2 * 2 * 4 * 256 * 256 * 64
    assert count_cost(parse(text), causal=causal).flops == products * one_product * share


RAGGED = """HloModule grouped

ENTRY %main (x: bf16[64,8], k: bf16[4,8,6], n: s32[4], dy: bf16[64,6]) -> bf16[64,6] {
  %x = bf16[64,8]{1,0} parameter(0)
  %k = bf16[4,8,6]{2,1,0} parameter(1)
  %n = s32[4]{0} parameter(2)
  %dy = bf16[64,6]{1,0} parameter(3)
  %ragged-dot-metadata = (s32[5]{0}, s32[9]{0}) custom-call(%n), custom_call_target="tpu_custom_call", metadata={op_name="grouped_product"}
  %where = s32[5]{0} get-tuple-element(%ragged-dot-metadata), index=0
  %ragged-dot-none.1 = bf16[4,8,6]{2,1,0} custom-call(%where, /*index=1*/%x, %dy), custom_call_target="tpu_custom_call", metadata={op_name="grouped_product"}
  %ragged-dot-none.2 = bf16[64,8]{1,0} custom-call(%where, %dy, %k), custom_call_target="tpu_custom_call", metadata={op_name="grouped_product"}
  ROOT %ragged-dot-none = bf16[64,6]{1,0} custom-call(%where, %x, %k), custom_call_target="tpu_custom_call", metadata={op_name="grouped_product"}
}
"""  # noqa: E501


@pytest.mark.parametrize(("experts", "share"), [(4, 1.0), (8, 0.5)])
def test_a_grouped_product_that_is_a_kernel_counts_each_row_with_its_own_group(experts: int, share: float) -> None:
    # Forward, and the gradients of rows and of kernels: 2 * 64 * 8 * 6 each, where all groups are on this chip.
    found = count_cost(parse(RAGGED), causal=True, experts=experts)
    assert found.flops == 3 * 2 * 64 * 8 * 6 * share


def test_values_in_fast_memory_cost_no_traffic() -> None:
    text = """HloModule add

ENTRY %main (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %b = f32[100]{0:T(128)S(1)} negate(%a)
  ROOT %c = f32[100]{0} add(%b, %b)
}
"""
    assert count_cost(parse(text), causal=False).bytes == 2 * 400


def test_a_copy_into_fast_memory_reads_once() -> None:
    text = """HloModule copy

ENTRY %main (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %begin = (f32[100]{0:T(128)S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%a)
  %there = f32[100]{0:T(128)S(1)} copy-done(%begin)
  ROOT %c = f32[100]{0} add(%there, %there)
}
"""
    assert count_cost(parse(text), causal=False).bytes == 400 + 400


@pytest.mark.parametrize(("root", "written"), [("bitcast", 0), ("copy", 400)])
def test_an_operand_that_is_handed_through_is_not_written_and_its_copy_is(root: str, written: int) -> None:
    text = f"""HloModule hand

%inner (p: f32[100]) -> (f32[100], f32[100]) {{
  %p = f32[100]{{0}} parameter(0)
  %same = f32[100]{{0}} {root}(%p)
  %double = f32[100]{{0}} add(%p, %p)
  ROOT %both = (f32[100]{{0}}, f32[100]{{0}}) tuple(%same, %double)
}}

ENTRY %main (a: f32[100]) -> (f32[100], f32[100]) {{
  %a = f32[100]{{0}} parameter(0)
  ROOT %made = (f32[100]{{0}}, f32[100]{{0}}) fusion(%a), kind=kLoop, calls=%inner
}}
"""
    assert count_cost(parse(text), causal=False).bytes == 400 + 400 + written


# In the manner of the TPU compiler: a product beside which a gather goes on that another fusion began. The fusion reads
# a row of a stack by a fusion of its own, hands the gather's operand through, and holds the gather's result.
GOING_ON = """HloModule step

%begun (p: bf16[8,16]) -> (bf16[8,16], bf16[32,16]) {
  %p = bf16[8,16]{1,0} parameter(0)
  %gather.1 = bf16[32,16]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%row (stack: f32[50,100], place: s32[]) -> f32[1,100] {
  %stack = f32[50,100]{1,0} parameter(0)
  %place = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%stack, %place, %zero), dynamic_slice_sizes={1,100}
}

%beside (all: f32[50,100], at: s32[], shard: bf16[8,16]) -> (f32[1,100], bf16[8,16], bf16[32,16]) {
  %all = f32[50,100]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %shard = bf16[8,16]{1,0} parameter(2)
  %taken = f32[1,100]{1,0} fusion(%all, %at), kind=kLoop, calls=%row
  %double = f32[1,100]{1,0} add(%taken, %taken)
  %gather.2 = bf16[32,16]{1,0} all-gather(%shard), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %results = (f32[1,100]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) tuple(%double, %shard, %gather.2)
}

ENTRY %main (w: bf16[8,16], s: f32[50,100], i: s32[]) -> (f32[1,100], bf16[8,16], bf16[32,16]) {
  %w = bf16[8,16]{1,0} parameter(0)
  %s = f32[50,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %begin = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%w), kind=kCustom, calls=%begun
  ROOT %on = (f32[1,100]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%s, %i, %w), kind=kOutput, calls=%beside
}
"""


def test_a_collective_that_goes_on_elsewhere_moves_nothing_there() -> None:
    """The start reads 8 x 16 and writes 8 x 16 and 32 x 16 bfloat16; the other fusion reads and writes a row."""
    cost = count_cost(parse(GOING_ON), causal=False)
    assert cost.bytes == 2 * (8 * 16 + 8 * 16 + 32 * 16) + 4 * (100 + 100) + 4  # and an index
    assert cost.collectives == {"all-gather": Collective(1, 3 * 8 * 16 * 2)}


@pytest.mark.parametrize(
    ("causal", "seen"), [(True, 64 * 256 - 64 * 63 / 2), (False, 2 * (64 * 256 - 64 * 63 / 2) - 256)]
)
def test_splash_attention_to_a_window_counts_the_pairs_in_it(causal: bool, seen: float) -> None:
    index = np.arange(256)
    apart = index[:, None] - index
    assert seen == np.sum((np.abs(apart) < 64) & ((apart >= 0) | (not causal)))
    text = """HloModule attention

ENTRY %main (q: bf16[2,4,256,32]) -> bf16[2,4,256,32] {
  %q = bf16[2,4,256,32]{3,2,1,0} parameter(0)
  ROOT %splash_mha_fwd_no_residuals.1 = bf16[2,4,256,32]{3,2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/while/body/window_64/splash"}
}
"""  # noqa: E501
    assert count_cost(parse(text), causal=causal).flops == 2 * 2.0 * 2 * 4 * seen * 32


def test_layers_with_and_without_a_window_count_with_their_own_attention() -> None:
    """Half of them have one: forward and backward pass are means of those of models all of whose layers are alike."""

    def cost(*types: str) -> Cost:
        network = tiny_llama(layer_types=types, window=16, max_length=256)
        batch = Batch.from_labels(np.ones((2, 256), np.int32), causal=True)
        shapes = network.shapes()
        losses = jax.grad(lambda params: jnp.sum(row_losses(network, params, batch)))
        text = jax.jit(losses).lower(shapes).compile().as_text()
        return count_cost(parse(text), causal=True, window_share=types.count("window") / len(types))

    window, full, mixed = cost("window"), cost("full"), cost("window", "full")
    assert window.flops < 0.8 * full.flops
    assert mixed.flops == pytest.approx((window.flops + full.flops) / 2, rel=1e-3)
    assert mixed.bytes == pytest.approx((window.bytes + full.bytes) / 2, rel=0.1)


def test_generated_tokens_cost_the_cache_of_their_own_layer() -> None:
    """64 tokens after 64 others: a layer with a window of 16 reads 16 places, another 128."""

    def flops(*types: str) -> float:
        network = tiny_llama(layer_types=types, window=16, max_length=256)
        generator = Generator(network, batch_size=2, prompt_length=64, max_new_tokens=64, eos_id=None, pad_id=0)
        tokens, lengths = jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
        text = generator.jitted.lower(network.shapes(), tokens, lengths, None).compile().as_text()
        return count_cost(parse(text), causal=True, window_share=types.count("window") / len(types)).flops

    assert flops("window", "full") == pytest.approx((flops("window") + flops("full")) / 2, rel=1e-3)


def test_branches_that_are_not_attention_all_count() -> None:
    def function(which, x):
        return jax.lax.cond(which, lambda: x @ x, lambda: jnp.tanh(x) @ x)

    shapes = jax.ShapeDtypeStruct((), jnp.bool), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    program = parse(jax.jit(function).lower(*shapes).compile().as_text())
    assert count_cost(program, causal=False, window_share=0.5).flops == 2 * 2 * 8 * 8 * 8
