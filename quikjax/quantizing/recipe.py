"""Recipes: which layers are quantized, to how many bits, with how many outliers, by which method, and what is learned after it.

A recipe is an ordered list of rules; the first whose pattern is found in a parameter's path applies, and a parameter that no
rule matches stays as it is. Recipes are data: they serialize to JSON and travel with an artifact.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from quikjax.algorithms.codebooks import DataType
from quikjax.errors import QuikError, did_you_mean
from quikjax.files import described, read_text, user_path
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.quantizing.distillation import Distillation
from quikjax.quantizing.group_rule import GroupRule
from quikjax.quantizing.layer_rule import LayerRule
from quikjax.quantizing.level_clip import Fixed, fixed_level_clip, names_of_level_clips
from quikjax.quantizing.outliers import Order, Score, count_outliers

Count = Annotated[int, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(strict=True, ge=0.0, le=1.0)]


class Rule(LayerRule):
    """One kind of layer and the way to quantize it in QUIK format."""

    weight_bits: Literal[4, 8] = 4
    activation_bits: Literal[4, 8, 16] = 4
    """16: weights only, activations keep their dtype."""
    method: Literal["gptq", "rtn"] = "gptq"
    outliers: Count | Fraction | Literal["auto"] = "auto"
    """Columns kept in 16 bits, for a layer as wide as the hidden state: a count, a fraction of it, or the paper's choice."""
    outlier_score: Score = "maximum"
    """Which columns are outliers: those of the largest activation, as in the paper, which bounds the range that activations are
    quantized over; of the largest mean square, which is what a rounded weight's error in the column is multiplied by; or those
    that widen the range of the most tokens, weighted by what the range costs ("range", `outliers.range_outliers`)."""
    level_clip: Annotated[Literal["search"] | Fixed, names_of_level_clips("search", "symmetric")] = None
    """Into how many steps a token's range is divided, and the first that has a code. "symmetric": 2^b steps of [-m, m], with `m`
    the token's largest magnitude and a code for zero; `(15, -8)` and `(14, -8)` are other conventions for 4 bits. 4-bit
    activations also: `(17, 1)`, finer steps of [min, max]; "search", what costs the group of layers least on calibration samples.
    Left out: 2^b - 1 steps of [min, max], all with a code."""
    scale_outliers: bool = False
    """Grow the number of outliers in proportion to the layer's input width (LLaMA's down_proj, GPT-2's mlp.c_proj, BERT's
    output.dense, Falcon's dense_4h_to_h)."""
    zero_threshold: float = Field(0.0, ge=0)
    """No outliers where the largest activation is at most this (twice this for 8-bit layers); 0 turns it off."""
    outlier_dtype: Literal["float16", "bfloat16"] = "float16"
    clip: bool = True
    """Search each row's scale instead of taking its maximum."""
    order: Order = "hessian"
    """GPTQ: round base columns by falling diagonal of the Hessian, so that what matters most is rounded while all others can
    still make up for it (GPTQ's own "act order"), or by rising largest activation, as QUIK's code does."""
    sweeps: int = Field(0, ge=0)
    """GPTQ: passes of coordinate descent over its codes, each followed by the best scale for them. Every pass costs about what
    GPTQ does, and the first ones gain most."""
    sparsity: Literal["2:4"] | None = None
    """GPTQ: two of every four base columns side by side are zero in each row (SparseGPT), and only the others are stored. Outlier
    columns stay dense; there are up to three more of them, so that base columns are a multiple of four."""

    @model_validator(mode="after")
    def _sweeps_go_over_gptq(self) -> "Rule":
        if self.sweeps and self.method != "gptq":
            raise ValueError(f'sweeps go over the codes of method "gptq"; method "{self.method}" takes none')
        return self

    @model_validator(mode="after")
    def _sparsity_is_chosen_by_gptq(self) -> "Rule":
        if self.sparsity is not None and (self.method != "gptq" or self.sweeps):
            raise ValueError('sparsity is chosen by method "gptq" without sweeps')
        return self

    @model_validator(mode="after")
    def _activations_can_have_the_level_clip(self) -> "Rule":
        if self.level_clip != "search":
            fixed_level_clip(self.level_clip, self.activation_bits)
        elif self.activation_bits != 4:
            raise ValueError(f"level_clip is searched for 4-bit activations; these have {self.activation_bits} bits")
        return self

    def needs_data(self) -> bool:
        """Tell whether the rule wants statistics of activations: for GPTQ, to choose outliers, or a level clip."""
        return self.method == "gptq" or self.outliers != 0 or self.level_clip == "search"

    def wanted_outliers(self, inputs: int, hidden_size: int | None = None) -> int:
        """`outlier_count`, also where that is more than there are columns (`outliers.count_outliers`)."""
        return self.fitting(count_outliers(self.outliers, inputs, hidden_size, scaled=self.scale_outliers), inputs)

    def fitting(self, count: int, inputs: int) -> int:
        """`count` outliers of `inputs` columns, or as many more as leave a number of base columns that the format takes."""
        return count + max(0, inputs - count) % 4 if self.sparsity is not None else count

    def packed_bits(self, outputs: int, inputs: int, hidden_size: int | None) -> int:
        """Count the bits of a packed layer: codes, outliers in 16 bits, scale and reduced, columns."""
        outliers = self.outlier_count(inputs, hidden_size)
        base = inputs - outliers
        codes = base * self.weight_bits if self.sparsity is None else base // 2 * self.weight_bits + 8 * -(-base // 8)
        return outputs * (codes + outliers * 16 + 64) + inputs * 32


AnyRule = Rule | CodebookRule | GroupRule


def _kind(value: Any) -> str:
    """Tell the kinds of rule apart, as objects or as JSON."""
    if isinstance(value, dict):
        return "codebook" if "data_type" in value else "groups" if "group_size" in value else "quik"
    return "codebook" if isinstance(value, CodebookRule) else "groups" if isinstance(value, GroupRule) else "quik"


class Recipe(BaseModel):
    """An ordered list of rules with a name. Unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rules: tuple[
        Annotated[
            Annotated[Rule, Tag("quik")] | Annotated[CodebookRule, Tag("codebook")] | Annotated[GroupRule, Tag("groups")],
            Discriminator(_kind),
        ],
        ...,
    ]
    distillation: Distillation | None = None
    """Train each block, once its layers are quantized, to give what the original block gives (ZeroQuant)."""

    @model_validator(mode="after")
    def _what_is_distilled_can_be_trained(self) -> "Recipe":
        if self.distillation is None:
            return self
        if not self.rules:
            raise ValueError("distillation is of quantized layers, and there are no rules to quantize any")
        for rule in self.rules:
            if isinstance(rule, CodebookRule):
                raise ValueError("distillation is of layers in QUIK format and in groups; codebooks cannot be trained")
            if isinstance(rule, Rule) and rule.sparsity is not None:
                raise ValueError("distillation is of dense layers; the pattern of sparse ones would be lost")
            if isinstance(rule, GroupRule) and rule.order == "hessian" and not rule.static_groups:
                raise ValueError('distillation is not of groups of reordered columns; take order "stored" or static_groups')
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # A recipe without distillation reads in JSON as it did before there was any.
        fields = serialize(self)
        if self.distillation is None:
            fields.pop("distillation", None)
        return fields

    def rule_for(self, path: str) -> AnyRule | None:
        """The first rule whose pattern is found in `path`, or `None`: the parameter stays as it is."""
        return next((rule for rule in self.rules if re.search(rule.match, path)), None)

    def needs_data(self) -> bool:
        """Tell whether any rule wants statistics of activations, or blocks learn from what they read."""
        return self.distillation is not None or any(rule.needs_data() for rule in self.rules)

    def with_outliers(self, outliers: int | float) -> "Recipe":
        """The same recipe with another number (int) or fraction (float) of outliers in every rule.

        Raises:
            QuikError: the number is none, or the recipe has codebook rules, whose outliers are `proxy`, or groups, without any.
        """
        if any(isinstance(rule, CodebookRule) for rule in self.rules):
            raise QuikError(f'recipe "{self.name}" has codebooks, whose outlier columns need no data: give them with --proxy')
        if any(isinstance(rule, GroupRule) for rule in self.rules):
            raise QuikError(f'recipe "{self.name}" has weights in groups, which have no outlier columns')
        try:
            rules = [Rule(**{**rule.model_dump(), "outliers": outliers}) for rule in self.rules]
        except ValidationError:
            raise QuikError(f"outliers must be a count or a fraction between 0 and 1, not {outliers}") from None
        return self.model_copy(update={"rules": tuple(rules)})

    def keeping(self, pattern: str) -> "Recipe":
        """The same recipe, but parameters whose path `pattern` (a regular expression) is found in stay as they are.

        Raises:
            QuikError: the pattern is no regular expression.
        """
        try:
            re.compile(pattern)
        except re.error as error:
            raise QuikError(f'"{pattern}" is no regular expression ({error}); give a part of a layer\'s path') from None
        rules = [rule.model_copy(update={"match": f"^(?!.*(?:{pattern})).*(?:{rule.match})"}) for rule in self.rules]
        return self.model_copy(update={"rules": tuple(rules)})

    def with_group_size(self, size: int) -> "Recipe":
        """The same recipe of weights in groups with groups of another size.

        Raises:
            QuikError: not all of its rules are of groups, or GPTQ does not find such groups.
        """
        if not self.rules or not all(isinstance(rule, GroupRule) for rule in self.rules):
            raise QuikError(f'recipe "{self.name}" has no weights in groups; --block belongs to codebooks and to groups')
        try:
            rules = [GroupRule(**{**rule.model_dump(), "group_size": size}) for rule in self.rules]
        except ValidationError as error:
            raise QuikError(f"groups cannot be of {size}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
        return self.model_copy(update={"rules": tuple(rules)})

    def with_codebook(self, **fields: Any) -> "Recipe":
        """The same recipe with other fields (`block`, `proxy`, `absmax`, `method`, ...) in every codebook rule.

        Raises:
            QuikError: the recipe has no codebooks, or a value is not one that `CodebookRule` takes.
        """
        names = " and ".join(f"--{name}" for name in fields)
        if not self.rules or not all(isinstance(rule, CodebookRule) for rule in self.rules):
            raise QuikError(f'recipe "{self.name}" has no codebooks; {names} belongs to recipes such as int4, float4 or nf4')
        try:
            rules = [CodebookRule(**{**rule.model_dump(), **fields}) for rule in self.rules]
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"][:1])
            raise QuikError(f"{where} cannot be {fields.get(where, '?')}: {first['msg'].removeprefix('Value error, ')}") from None
        return self.model_copy(update={"rules": tuple(rules)})


# The layers of a block, by published name: LLaMA, OPT and GPT-2; BERT, RoBERTa and DistilBERT; Falcon. Embeddings, norms and
# heads match nothing. BERT calls most of its layers `dense`, its heads' too, and Falcon one of its own: their parents tell.
_FALCON_WIDE = r"\.mlp\.dense_4h_to_h\.weight$"
_FALCON = r"\.(self_attention\.(query_key_value|dense)|mlp\.dense_h_to_4h)\.weight$"
_WIDE = r"\.(down_proj|mlp\.c_proj|layer\.\d+\.output\.dense|ffn\.lin2)\.weight$"
# Of the others, the layers of attention and those of the MLP.
_HEADS = r"q_proj|k_proj|v_proj|o_proj|out_proj|c_attn|attn\.c_proj"
_ENCODER_HEADS = r"attention\.(self\.(query|key|value)|output\.dense|(q|k|v|out)_lin)"
_MLP = r"gate_proj|up_proj|fc1|fc2|c_fc|layer\.\d+\.intermediate\.dense|ffn\.lin1"
_LAYERS = rf"(?<!classifier)(?<!classification_head)\.({_HEADS}|{_ENCODER_HEADS}|{_MLP})\.weight$"
_ATTENTION = rf"\.({_HEADS}|{_ENCODER_HEADS}|self_attention\.(query_key_value|dense))\.weight$"


def _rules(wide: Rule, other: Rule, damping: float = 0.01) -> tuple[Rule, ...]:
    """One rule for the layers with a wide input (8-bit in QUIK-4B), one for the others; Falcon's damping is the paper's 0.5."""

    def at(rule: Rule, match: str, its_damping: float) -> Rule:
        return rule.model_copy(update={"match": match, "damping": its_damping})

    wide = wide.model_copy(update={"scale_outliers": True})
    return (at(wide, _FALCON_WIDE, 0.5), at(other, _FALCON, 0.5), at(wide, _WIDE, damping), at(other, _LAYERS, damping))


def _uniform(name: str, rule: Rule, damping: float = 0.01) -> Recipe:
    return Recipe(name=name, rules=_rules(rule, rule, damping))


def codebook_recipe(data_type: DataType, bits: int, **fields: Any) -> Recipe:
    """A recipe that writes every linear layer of a block in one data type; `fields` are those of `CodebookRule`.

    Raises:
        QuikError: the data type does not have as many bits, or a field is not one that `CodebookRule` takes.
    """
    name = data_type if data_type == "fp4" else f"{data_type}{bits}"
    try:
        rule = CodebookRule(match="", data_type=data_type, bits=bits)
        rules = tuple(
            rule.model_copy(update={"match": match, "damping": damping})
            for match, damping in ((_FALCON_WIDE, 0.5), (_FALCON, 0.5), (_WIDE, 0.01), (_LAYERS, 0.01))
        )
    except ValidationError as error:
        raise QuikError(f"there is no data type {name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    recipe = Recipe(name=name, rules=rules)
    return recipe.with_codebook(**fields) if fields else recipe


def _sparse(recipe: Recipe, what: str, *, attention: bool, mlp: bool) -> Recipe:
    """The recipe with 2:4 sparsity in the layers of attention, of the MLP, or of both."""
    rules = []
    for rule in recipe.rules:
        assert isinstance(rule, Rule)
        here, others = rule.model_copy(update={"sparsity": "2:4"}), rule
        if rule.scale_outliers or attention == mlp:  # one of the MLP's, or all alike
            rules.append(here if mlp else others)
            continue
        ahead = "(?=" if attention else "(?!"
        rules += [here.model_copy(update={"match": f"{ahead}{_ATTENTION}){rule.match}"}), others]
    return Recipe(name=f"{recipe.name}-{what}", rules=tuple(rules))


def _groups(name: str, attention: GroupRule, mlp: GroupRule) -> Recipe:
    """A recipe of weights in groups; Falcon's damping is the paper's 0.5."""
    rules = [
        rule.model_copy(update={"match": match, "damping": damping})
        for rule, match, damping in (
            (mlp, _FALCON_WIDE, 0.5),
            (attention, f"(?={_ATTENTION}){_FALCON}", 0.5),
            (mlp, _FALCON, 0.5),
            (mlp, _WIDE, 0.01),
            (attention, f"(?={_ATTENTION}){_LAYERS}", 0.01),
            (mlp, _LAYERS, 0.01),
        )
    ]
    return Recipe(name=name, rules=tuple(rules))


def _group_recipes() -> tuple[Recipe, ...]:
    """GPTQ's options (Frantar et al., and its authors' code), rounding to nearest beside them, and ZeroQuant's scheme, also with
    its layer-by-layer distillation."""

    def uniform(name: str, **fields: Any) -> Recipe:
        rule = GroupRule(match="", group_size=128, **fields)
        return _groups(name, rule, rule)

    nearest: dict[str, Any] = {"group_size": 128, "symmetric": True, "method": "rtn", "activation_bits": 8}
    eight, four = GroupRule(match="", bits=8, **nearest), GroupRule(match="", bits=4, **nearest)
    zeroquant = (
        _groups("zeroquant-w8a8", eight, eight),
        _groups("zeroquant-w4a8", eight, four),  # the paper's W4/8A8: 4 bits in the MLP only
    )
    taught = {"zeroquant-w8a8": Distillation(rate=5e-6, step_size_rate=5e-5), "zeroquant-w4a8": Distillation()}
    return (
        uniform("rtn-w4a16-g128", method="rtn"),
        uniform("gptq-w4a16-g128"),
        uniform("gptq-w4a16-g128-actorder", order="hessian"),
        uniform("gptq-w4a16-g128-static", order="hessian", static_groups=True),
        *zeroquant,
        *(Recipe(name=f"{plain.name}-lkd", rules=plain.rules, distillation=taught[plain.name]) for plain in zeroquant),
    )


_W4A4 = Rule(match="", weight_bits=4, activation_bits=4)
_W8A8 = Rule(match="", weight_bits=8, activation_bits=8)
_NEAREST: dict[str, Any] = {"method": "rtn", "outliers": 0, "clip": False}
# A small model's Hessian is better trusted less than the paper's 0.01 does (benchmarks/notes-accuracy.md, "Damping").
_PLUS_DAMPING = 0.1
# What else pays without training (there): finer steps, outliers that many tokens share, better codes.
_W4A4_PLUS = _W4A4.model_copy(update={"level_clip": (17, 1), "outlier_score": "range", "sweeps": 2})

_QUIK_4B = Recipe(name="quik-4b", rules=_rules(wide=_W8A8, other=_W4A4))

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _QUIK_4B,
        # The same size and speed as the paper's, nearer the original.
        Recipe(name="quik-4b+", rules=_rules(wide=_W8A8, other=_W4A4_PLUS, damping=_PLUS_DAMPING)),
        _uniform("quik-8b", _W8A8),
        # Eight bits bear a wide range of activations; what is lost is lost in the weights, for whose sake outliers are kept here.
        _uniform("w4a8", Rule(match="", weight_bits=4, activation_bits=8, outlier_score="mean_square", sweeps=8), _PLUS_DAMPING),
        _uniform("rtn-w4a4", _W4A4.model_copy(update=_NEAREST)),
        # Activations rounded as in the released code of arXiv 2301.12017.
        _uniform("rtn-w4a4-sym", _W4A4.model_copy(update={**_NEAREST, "level_clip": "symmetric"})),
        _uniform("rtn-w8a8", _W8A8.model_copy(update=_NEAREST)),
        _uniform("gptq-w4a16", Rule(match="", weight_bits=4, activation_bits=16, outliers=0, clip=False)),
        # The paper's, with half of the base weights zero: of all layers, or where it is cheaper or dearer.
        _sparse(_QUIK_4B, "sparse", attention=True, mlp=True),
        _sparse(_QUIK_4B, "sparse-mlp", attention=False, mlp=True),
        _sparse(_QUIK_4B, "sparse-attention", attention=True, mlp=False),
        *_group_recipes(),
        *(codebook_recipe("int", bits) for bits in range(3, 9)),
        *(codebook_recipe("float", bits) for bits in range(3, 9)),
        codebook_recipe("dynamic", 4),
        codebook_recipe("quantile", 4),
        codebook_recipe("nf", 4),
        codebook_recipe("fp4", 4),
        Recipe(name="fp", rules=()),
    )
}


def find_recipe(name: str | Path | Recipe) -> Recipe:
    """A recipe by its name, from a JSON file (a path, or a name that ends in `.json`), or as it is.

    Raises:
        QuikError: no recipe has that name, or the file is not a recipe.
    """
    if isinstance(name, Recipe):
        return name
    if not isinstance(name, str | os.PathLike):
        raise QuikError(f"a recipe is expected, or the name of one ({', '.join(RECIPES)}), not {described(name)}")
    if isinstance(name, os.PathLike) or name.endswith(".json"):
        path = user_path(name)
        try:
            return Recipe.model_validate_json(read_text(path))
        except ValidationError as error:
            first = error.errors()[0]
            # Which kind of rule it was taken for is no part of the file's own path.
            where = ".".join(str(part) for part in first["loc"] if part not in ("quik", "codebook", "groups"))
            raise QuikError(f"{path} is not a recipe: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    if name not in RECIPES:
        raise QuikError(f'there is no recipe "{name}"; {did_you_mean(name, RECIPES)}, or a .json file')
    return RECIPES[name]
