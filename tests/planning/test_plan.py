"""Plans from configurations alone: sizes against packed weights, memory against numbers computed by hand, every mistake told."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quikjax.errors import QuikError
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.models.stacked import stack
from quikjax.models.tokens import checked_model
from quikjax.pallas_kernels import devices
from quikjax.planning.attention import AttentionPlan
from quikjax.planning.plan import DEVICES, Plan, describe, find_device, make_plan
from quikjax.quantizing import memory
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe, Rule, codebook_recipe
from quikjax.testing import tiny_config, tiny_model, write_tiny_checkpoint
from quikjax.weights.quik import QuikWeight

GB = 10**9

LLAMA_2_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
FALCON_180B = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "vocab_size": 65024,
    "hidden_size": 14848,
    "num_hidden_layers": 80,
    "num_attention_heads": 232,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
    "parallel_attn": True,
    "multi_query": True,
    "alibi": False,
    "bias": False,
}


def _by_pattern(plan: Plan) -> dict[str, Any]:
    return {layer.pattern.removesuffix(".weight").rpartition(".")[2]: layer for layer in plan.layers}


def test_llama_2_70b() -> None:
    plan = make_plan(LLAMA_2_70B, dtype=jnp.float16, length=4096, device=devices.H100, memory_bytes=80 * GB)
    rows = _by_pattern(plan)
    assert {name: (row.count, row.outputs, row.inputs) for name, row in rows.items()} == {
        "q_proj": (80, 8192, 8192),
        "k_proj": (80, 1024, 8192),
        "v_proj": (80, 1024, 8192),
        "o_proj": (80, 8192, 8192),
        "gate_proj": (80, 28672, 8192),
        "up_proj": (80, 28672, 8192),
        "down_proj": (80, 8192, 28672),
    }
    # The paper's: 256 outliers, and as many more as the input is wider; the wide layer in 8 bits.
    assert {name: row.outliers for name, row in rows.items() if name != "down_proj"} == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 256
    )
    assert (rows["down_proj"].outliers, rows["down_proj"].weight_bits, rows["down_proj"].activation_bits) == (896, 8, 8)
    # 8192 x 7936 half bytes, 8192 x 256 outliers in 2 bytes, scale and reduced, columns.
    assert rows["q_proj"].bytes == 8192 * 7936 // 2 + 8192 * 256 * 2 + 8192 * 8 + 8192 * 4
    weights = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    assert plan.quantized_weights == weights
    assert plan.rest_bytes == 2 * (2 * 32000 * 8192 + 8192)
    assert plan.dense_block_bytes == 2 * 80 * 2 * 8192
    assert plan.fp16_bytes == 2 * weights + plan.rest_bytes + plan.dense_block_bytes
    assert plan.total_bytes == plan.quantized_bytes + plan.rest_bytes + plan.dense_block_bytes
    assert 4 < plan.bits_per_weight < 6
    # 80 blocks of 8 key heads of 128 numbers, keys and values, 2 bytes each.
    assert plan.running.cache == 80 * 4096 * 8 * 128 * 2 * 2
    assert plan.fits
    assert not plan.problems
    assert rows["q_proj"].prefill.backend == "mosaic"
    assert str(plan.attention) == "by a kernel"


def test_falcon_180b_is_planned_in_seconds_and_needs_several_devices(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FALCON_180B))
    began = time.perf_counter()
    found = describe(tmp_path)
    plan = make_plan(found.config, dtype=jnp.float16, device=devices.H100, memory_bytes=80 * GB)
    assert time.perf_counter() - began < 5
    assert found.source is None
    rows = _by_pattern(plan)
    assert (rows["query_key_value"].outputs, rows["query_key_value"].inputs) == ((232 + 2 * 8) * 64, 14848)
    assert rows["dense_4h_to_h"].outliers == 4 * 256
    assert not plan.fits
    assert plan.devices_needed == 2
    held = -(-plan.running.blocks // 2) + -(-plan.running.cache // 2) + plan.running.rest + plan.running.temporaries
    assert held <= 80 * GB < plan.running.total


def test_a_size_is_that_of_the_packed_weight() -> None:
    model = tiny_model(num_hidden_layers=1)
    packed = dotted(quantize_params(pure_params(model), _weights_only(4)))
    plan = make_plan(tiny_config(num_hidden_layers=1), _weights_only(4), memory_bytes=GB)
    for layer in plan.layers:
        weight = packed[layer.pattern.replace("*", "0")]
        assert isinstance(weight, QuikWeight)
        assert layer.bytes == weight.bits() // 8
        assert (layer.outputs, layer.inputs, layer.outliers) == (weight.outputs, weight.inputs, weight.inputs - weight.base)
    dense = [leaf for leaf in packed.values() if not isinstance(leaf, QuikWeight)]
    assert plan.dense_block_bytes + plan.rest_bytes == sum(leaf.nbytes for leaf in dense)
    assert sum(layer.count for layer in plan.layers) + len(dense) == len(packed)
    # A 4-bit code takes a byte in the form that runs on a CPU, whatever JAX gives one that is only stored.
    _, running = stack(nnx.merge(nnx.split(model)[0], nested(packed)), widen=True)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(running["runs"]))
    assert plan.running.blocks == held


def _weights_only(bits: Any) -> Recipe:
    rule = Rule(match=r"_proj\.weight$", weight_bits=bits, activation_bits=16, method="rtn", outliers=0)
    return Recipe(name="weights", rules=(rule,))


SMALL = memory.Footprint(
    config=abstract_model(tiny_config()).config,  # hidden 64, 3 blocks, 4 heads of 16, 2 key heads, vocabulary 257
    itemsize=2,
    groups=(memory.Group(64, (64, 32, 32)), memory.Group(64, (64,)), memory.Group(64, (112, 112)), memory.Group(112, (64,))),
    quantized=(memory.Group(64, (112, 112)), memory.Group(112, (64,))),
    block_parameters=34_000,
    block_quantized=21_504,
    block_packed=15_000,
    block_bytes=90_000,
    rest_bytes=33_024,
)


def test_memory_of_running_by_hand() -> None:
    run = memory.running(SMALL, 2, 10)
    assert run.cache == 2 * 3 * 2 * 10 * 2 * 16 * 2
    # gate and up: 20 rows of 64 inputs (2 bytes and a code) and of 224 outputs (4 + 4 + 2 bytes).
    layer = 20 * (64 * 3 + 224 * 10)
    attention = 12 * 2 * 4 * 10 * 10 + 2 * 20 * 64 * 2
    assert attention < layer
    assert run.temporaries == 2 * 20 * 64 * 2 + layer
    assert run.total == 90_000 + 33_024 + run.cache + run.temporaries
    # 100 times as long, attention is the largest: its queries come 512 at a time.
    assert memory.running(SMALL, 2, 1000).temporaries == (2 * 2000 * 64 * 2 + 12 * 2 * 4 * 512 * 1000 + 2 * 2000 * 64 * 2)
    # And for one token of many texts the logits.
    assert memory.running(SMALL, 2, 1).temporaries == 2 * 2 * 64 * 2 + 2 * (64 * 3 + 224 * 10)


def test_memory_of_quantizing_by_hand() -> None:
    need = memory.quantizing(SMALL, 3, 20, gptq=True)
    assert need.block == 2 * 34_000 + 2 * 21_504 + 15_000
    # down_proj: 3 squares of 112 and 5 of 64 x 112 against 5 squares.
    assert 5 * 112 * 112 < 3 * 112 * 112 + 5 * 64 * 112
    assert need.work == 4 * (3 * 112 * 112 + 5 * 64 * 112)
    assert need.device == need.block + need.work
    tokens = 3 * 20
    assert need.host == 2 * tokens * 64 * 2 + tokens * (64 + 112) * 2
    # Data-free: no Hessian, no activations, three float32 copies of the widest weight.
    free = memory.quantizing(SMALL, 0, 20, gptq=False)
    assert free.work == 4 * 3 * 112 * 64
    assert free.host == 0
    # Descent holds the curvature and its copy beside the Hessian and the factor; only recipes that sweep pay for it.
    assert memory.quantizing(SMALL, 3, 20, gptq=True, descent=True).work == 4 * (4 * 112 * 112 + 8 * 64 * 112)
    sweeping, plain = (Recipe(name="x", rules=(Rule(match="_proj", sweeps=n),)) for n in (1, 0))
    works = [make_plan(tiny_config(), recipe, memory_bytes=GB, seqlen=4).quantizing.work for recipe in (sweeping, plain)]
    assert works[0] > works[1]
    # Distillation holds a block eight times in float32, and one sequence on its way back through all its layers.
    taught = memory.quantizing(SMALL, 3, 20, gptq=False, distills=True)
    assert taught.work == 4 * (8 * 34_000 + 20 * (3 * (128 + 64 + 224 + 64) + 4 * (64 + 64 + 64 + 112)))
    # What is kept stops at a gigabyte: of 5 million tokens gate and up read 0.64 GB, and down_proj 1.12 more.
    many = memory.quantizing(SMALL, 1000, 5000, gptq=True)
    assert many.host == 2 * 5_000_000 * 64 * 2 + 5_000_000 * 64 * 2
    assert many.spilled == 0


def test_activations_beyond_their_budget_are_planned_on_disk() -> None:
    whole = memory.quantizing(SMALL, 3, 20, gptq=True).host
    assert memory.quantizing(SMALL, 3, 20, gptq=True, activation_budget=whole).host == whole
    less = memory.quantizing(SMALL, 3, 20, gptq=True, activation_budget=whole - 1)
    assert (less.host, less.spilled) == (whole // 3, whole)
    assert make_plan(tiny_config(), memory_bytes=GB, activation_bytes=10**6).quantizing.spilled > 10**6
    (problem,) = make_plan(tiny_config(), memory_bytes=GB, activation_bytes=1000).problems
    assert problem.endswith("give --activation-memory 0.001 (GB) or more, or a smaller --seqlen")
    assert not make_plan(tiny_config(), "rtn-w4a4", memory_bytes=GB, activation_bytes=1000).problems


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_formula_counts_what_xla_counts(in_turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries of a real prefill, as XLA plans them, are within a factor of two of the formula; a CPU, with heads in turn,
    takes less."""
    if not in_turn:
        monkeypatch.setattr("quikjax.models.attention._ROWS_IN_TURN", 10**9)
    jax.clear_caches()
    fields = tiny_config(
        hidden_size=256, intermediate_size=688, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024
    )
    plan = make_plan(fields, "fp", length=1024, memory_bytes=GB)
    graphdef, params = nnx.split(checked_model(abstract_model(fields)))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(params))
    prefill = jax.jit(lambda params, ids: nnx.merge(graphdef, params).prefill(ids, 1024))
    compiled = prefill.lower(shapes, np.zeros((1, 1024), np.int32)).compile()
    counted = compiled.memory_analysis()
    assert counted is not None
    assert counted.argument_size_in_bytes == pytest.approx(plan.running.blocks + plan.running.rest, rel=0.01)
    assert counted.output_size_in_bytes == pytest.approx(plan.running.cache, rel=0.01)
    if in_turn:
        assert counted.temp_size_in_bytes < plan.running.temporaries
    else:
        assert plan.running.temporaries / 2 < counted.temp_size_in_bytes < plan.running.temporaries * 2


def test_devices_keep_heads_whole() -> None:
    config = SMALL.config  # 4 heads, 2 key heads
    need = memory.Running(blocks=800, rest=10, cache=100, temporaries=5)
    assert memory.devices_needed(need, 915, config) == 1
    assert memory.devices_needed(need, 914, config) == 2
    assert memory.devices_needed(need, 400 + 50 + 15, config) == 2
    # Three devices would do, but do not divide four heads; keys and values are then held twice.
    assert memory.devices_needed(need, 400, config) == 4
    assert memory.devices_needed(need, 200 + 50 + 15, config) == 4
    assert memory.devices_needed(need, 200 + 50 + 14, config) is None


def test_every_problem_at_once() -> None:
    wide = tiny_config(hidden_size=256, intermediate_size=140_000, num_hidden_layers=2)
    rules = (
        Rule(match="down_proj", outliers=0),
        Rule(match="q_proj", outliers=256),
        Rule(match="k_proj", in_axes=(0,)),
        Rule(match="v_proj", in_axes=(2,)),
    )
    plan = make_plan(wide, Recipe(name="odd", rules=rules), length=300, batch=0, memory_bytes=GB)
    told = "\n".join(plan.problems)
    for words in (
        "--batch must be at least 1, not 0",
        "--length 300 exceeds the model's context of 256 tokens",
        "down_proj.weight has 140000 base columns; int32 accumulators are exact up to 131071, so at least 8929 must be outliers",
        "q_proj.weight has 256 input columns, all of which would be outliers",
        "in_axes (0,) of model.layers.*.self_attn.k_proj.weight",
        "in_axes (2,) do not fit model.layers.*.self_attn.v_proj.weight",
    ):
        assert words in told
    assert len(plan.problems) == 6
    nothing = make_plan(tiny_config(), Recipe(name="stranger", rules=(Rule(match="conv"),)), memory_bytes=GB)
    assert nothing.problems == ('recipe "stranger" matches no layer of this model; its rules name other paths',)
    assert not make_plan(tiny_config(), "fp", memory_bytes=GB).problems


def test_a_rule_for_one_block_gets_its_own_row() -> None:
    rules = (Rule(match=r"layers\.1\..*down_proj\.weight", weight_bits=8, activation_bits=8), Rule(match=r"down_proj\.weight"))
    plan = make_plan(tiny_config(), Recipe(name="first", rules=rules), memory_bytes=GB)
    assert [(layer.count, layer.weight_bits) for layer in plan.layers] == [(2, 4), (1, 8)]
    assert len({layer.pattern for layer in plan.layers}) == 1


def test_headers_are_compared_where_there_are_weights(tmp_path: Path) -> None:
    found = describe(write_tiny_checkpoint(tmp_path / "good", tokenizer=False))
    assert found.source is not None
    assert not make_plan(found.config, source=found.source, memory_bytes=GB).problems
    (tmp_path / "good" / "config.json").write_text(json.dumps(tiny_config(intermediate_size=128)))
    found = describe(tmp_path / "good")
    (problem,) = make_plan(found.config, source=found.source, memory_bytes=GB).problems
    assert "down_proj.weight is [64, 112] where the configuration asks for [64, 128] (and 8 more)" in problem


def test_a_hub_name_is_planned_without_fetching_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []
    snapshot = tmp_path / "0123456789abcdef"
    snapshot.mkdir()
    (snapshot / "config.json").write_text(json.dumps(LLAMA_2_70B))
    # The index is fetched with the other small files; that the shards are not there is no mistake.
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')

    def download(_repository: str, *, allow_patterns: list[str], **_options: Any) -> str:
        asked.extend(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = describe("org/llama-2-70b")
    assert found.source is None
    assert found.config == LLAMA_2_70B
    assert asked
    assert not any("safetensors" in pattern or "msgpack" in pattern for pattern in asked)


def test_devices_by_name() -> None:
    assert find_device("H100") == (devices.H100, 80 * GB)
    assert find_device("a100", 7)[1] == 7
    here, held = find_device("here")
    assert here.platform == "cpu"
    assert held > GB
    with pytest.raises(QuikError, match='did you mean "h100"'):
        find_device("h101")
    assert set(DEVICES) == {"cpu", "h100", "h200", "a100", "l40s"}


def test_a_block_that_divides_nothing_is_said_and_the_kernel_for_codebooks_is_named() -> None:
    config = tiny_config(hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    made = make_plan(config, codebook_recipe("nf", 4, block=100), device=devices.H100, memory_bytes=80 * GB)
    assert "blocks of 100 do not divide model.layers.*.mlp.down_proj.weight: its last block has 44 weights" in made.notes
    layers = make_plan(config, "nf4", device=devices.H100, memory_bytes=80 * GB, dtype="bfloat16").layers
    for row in layers:
        assert row.decode is not None
        assert row.prefill is not None
        assert row.prefill.backend == "xla"
        assert row.decode.backend == ("mosaic" if row.inputs == 64 else "xla")
        assert row.inputs == 64 or "blocks of 64 do not cut rows of 96" in row.decode.reason
    assert {row.inputs for row in layers} == {64, 96}


def test_attention_by_a_kernel_or_the_reason_why_not() -> None:
    def planned(device: devices.Device, dtype: str = "bfloat16", **fields: int) -> AttentionPlan:
        config = tiny_config(num_hidden_layers=1, **fields)
        return make_plan(config, device=device, memory_bytes=80 * GB, dtype=dtype).attention

    assert (planned(devices.A100).prefill, planned(devices.A100).decode) == (None, None)
    exact = planned(devices.A100, "float32")
    assert exact.decode is None
    assert "float32 prompts are multiplied faster by XLA" in str(exact)
    assert str(planned(devices.CPU)).startswith("by XLA (attention kernels need an NVIDIA GPU")
    assert "heads of 320 numbers" in str(planned(devices.H100, head_dim=320))
