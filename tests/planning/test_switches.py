"""Counted times of an encoder's products: by hand, where there are none, and how one is left in 16 bits."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from quikjax.errors import QuikError
from quikjax.planning.plan import DEVICES, Plan, make_plan
from quikjax.planning.switches import TOKENS
from quikjax.quantizing.recipe import Recipe, find_recipe
from quikjax.testing import tiny_config

Run = Callable[..., "subprocess.CompletedProcess[str]"]

BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 512,
}


def _plan(config: dict[str, Any], recipe: Recipe | str, device: str = "h100", **fields: Any) -> Plan:
    fields = {"batch": 8, "length": 128} | fields
    return make_plan(config, recipe, dtype=jnp.bfloat16, device=DEVICES[device][0], memory_bytes=10**12, **fields)


def test_times_are_kernels_bytes_and_operations() -> None:
    products = {product.group: product for product in _plan(BERT, "rtn-w4a4").products}
    assert list(products) == ["attention_input", "attention_output", "mlp_input", "mlp_output"]
    first, wide = products["attention_input"], products["mlp_input"]
    assert first.tokens == (32, 512, 1024, 4096), "8 x 128 beside the usual ones"
    # 32 tokens: a split reads 768 numbers of 2 bytes and 768 columns, writes as many codes, scale and zero; the product reads
    # 2304 rows of 768 half bytes, scale, reduced and bias, and what the split wrote, and writes 2304 numbers of 2 bytes.
    split = 32 * 768 * 2 + 4 * 768 + 32 * (768 + 8)
    product = 2304 * (768 // 2 + 8 + 4) + 32 * (768 + 8) + 32 * 2304 * 2
    assert first.integer[0] == pytest.approx(2 * 2.5 + (split + product) / 3e6)
    assert first.wide[0] == pytest.approx(3 * (2.5 + 2 * (32 * 768 + 768 * 768 + 32 * 768) / 3e6))
    # 4096 tokens: operations decide, at twice the rate as integers.
    assert wide.wide[-1] == pytest.approx(2.5 + 2 * 4096 * 3072 * 768 / 798e6)
    split = 4096 * 768 * 2 + 4 * 768 + 4096 * (768 + 8)
    product = 3072 * (768 // 2 + 8 + 4) + 4096 * (768 + 8) + 4096 * 3072 * 2
    assert wide.integer[-1] == pytest.approx(5 + split / 3e6 + max(product / 3e6, 4096 * 3072 * 768 / 798e6))
    assert wide.gains == (False, False, False, True)


def test_only_encoders_on_a_hopper_gpu_are_counted() -> None:
    assert not _plan(BERT, "rtn-w4a4", "a100").products
    assert not _plan(tiny_config(), "rtn-w4a4", length=16).products
    assert not _plan(BERT, "gptq-w4a16").products, "nothing is multiplied as integers"
    h100, h200 = (_plan(BERT, "rtn-w4a4", device, length=4).products[0] for device in ("h100", "h200"))
    assert h100.tokens == TOKENS
    assert all(faster < slower for faster, slower in zip(h200.integer, h100.integer, strict=True))


def test_a_product_is_left_in_16_bits_by_its_path() -> None:
    recipe = find_recipe("quik-4b")
    kept = recipe.keeping(r"attention\.output|layer\.0\.output")
    for number, layer, stays in (
        (0, "attention.output.dense", True),
        (0, "output.dense", True),
        (1, "output.dense", False),
        (1, "attention.self.query", False),
    ):
        path = f"encoder.layer.{number}.{layer}.weight"
        before, after = recipe.rule_for(path), kept.rule_for(path)
        assert before is not None
        assert (after is None) == stays
        assert after is None or before.model_copy(update={"match": after.match}) == after, "by the same rule otherwise"
    groups = [product.group for product in _plan(BERT, recipe.keeping(r"attention\.output")).products]
    assert groups == ["attention_input", "mlp_input", "mlp_output"]
    with pytest.raises(QuikError, match="is no regular expression"):
        recipe.keeping("attention.(output")


def test_plan_prints_the_products_and_keeps_what_it_is_told(quikjax_command: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    command = ("plan", tmp_path, "--device", "h100", "--dtype", "bfloat16", "--recipe", "rtn-w4a4", "--keep")
    done = quikjax_command(*command, "attention.output")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if " us: " in line]
    assert [row.split("|")[1].strip() for row in rows] == [
        "attention.self.query, attention.self.key, attention.self.value",
        "intermediate.dense",
        "output.dense",
    ]
    assert "4.2 us: 16 bits" in rows[1].split("|")[3]
    assert "integers" in rows[1].split("|")[-2]
    wrong = quikjax_command(*command, "attention.ouput")
    assert wrong.returncode != 0
    assert '--keep "attention.ouput" is in no layer\'s path' in wrong.stderr
