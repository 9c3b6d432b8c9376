"""Options of the commands that generate text: two groups, each written once, which a command takes as one argument."""

import contextlib
import dataclasses
import functools
import gc
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quikjax.cli.options import Context, parse_dtype
from quikjax.errors import QuikError
from quikjax.files import read_text, typed_text, user_path

if TYPE_CHECKING:
    from quikjax.generation.settings import Sampling

KvCache = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16 or int8 (per token and head); left out, the activations' dtype, on a CPU float32."
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """How tokens are drawn, and how a chat is written."""

    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits; 0 is greedy. Left out: 0, or 1 where tokens are chosen among.")
    ] = None
    top_k: Annotated[int, typer.Option(help="Draw among so many most likely tokens; 0: all.")] = 0
    top_p: Annotated[float, typer.Option(help="Draw among the fewest tokens with this much probability.")] = 1.0
    min_p: Annotated[float, typer.Option(help="Draw among tokens at least so many times as likely as the likeliest.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens of the text so far become less likely.")] = 1.0
    no_repeat_ngram: Annotated[int, typer.Option(help="No sequence of so many tokens is written twice; 0: any may be.")] = 0
    min_new_tokens: Annotated[int, typer.Option(help="No text stops before so many tokens are added.")] = 0
    seed: Annotated[int, typer.Option(help="A text depends on its prompt and this number.")] = 0
    system: Annotated[str | None, typer.Option(help="The chat's system message.")] = None
    template: Annotated[Path | None, typer.Option(help="A Jinja chat template in place of the model's own.")] = None

    def sampling(self) -> "Sampling":
        """The settings as given; without a temperature it is 1 where tokens are chosen among, and greedy otherwise.

        Raises:
            QuikError: a setting means nothing, or the seed is none.
        """
        from quikjax.generation.settings import Sampling, check_seed

        if self.system is not None:
            typed_text(self.system, "the system message")
        check_seed(self.seed)
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if self.top_k or self.top_p < 1 or self.min_p else 0.0
        return Sampling(
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram=self.no_repeat_ngram,
            min_new_tokens=self.min_new_tokens,
        )

    def chat_template(self) -> str | None:
        """The text of the chat template that was named.

        Raises:
            QuikError: its file cannot be read, or is not UTF-8.
        """
        return None if self.template is None else read_text(user_path(self.template))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningOptions:
    """How a model is held and run."""

    context: Context = None
    kv_cache: KvCache = None
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for models that are not artifacts.")] = "float32"
    unroll: Annotated[
        bool,
        typer.Option(
            "--unroll",
            help="Compile every block by itself: longer; it pays where a CPU's products are XLA's.",
        ),
    ] = False
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Folder where compiled programs are kept [default: $QUIKJAX_CACHE, or ~/.cache/quikjax]."),
    ] = None

    def check(self) -> None:
        """Raise `QuikError` where an option names nothing, before anything heavy is imported."""
        from quikjax.models.dtypes import check_cache_kind

        parse_dtype(self.dtype)
        if self.kv_cache is not None:
            check_cache_kind(self.kv_cache)
        if self.context is not None and self.context < 2:
            raise QuikError(f"the context is at least 2 tokens, not {self.context}")

    def load(self, model: str, *, plain_tokenizer: bool = False) -> tuple[Any, Any]:
        """A model and its tokenizer, or `None`; what is compiled for it is kept.

        Raises:
            QuikError: as `quikjax.load`, or compiled programs cannot be kept where they should be.
        """
        from quikjax.checkpoint.load import load
        from quikjax.executables import keep_executables
        from quikjax.weights.compiled import compile_products_meanwhile

        keep_executables(self.cache_dir)
        compile_products_meanwhile()
        return load(model, dtype=parse_dtype(self.dtype), context=self.context, plain_tokenizer=plain_tokenizer)


_GROUPS = (DrawingOptions, RunningOptions)


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as the parser sees it: in place of each argument that is a group of options, the group's own."""
    signature = inspect.signature(command)
    groups = {name: given.annotation for name, given in signature.parameters.items() if given.annotation in _GROUPS}
    seen: list[inspect.Parameter] = []
    for name, given in signature.parameters.items():
        if name not in groups:
            seen.append(given)
            continue
        for field in dataclasses.fields(groups[name]):
            seen.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            )

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        made = {
            name: group(**{field.name: options.pop(field.name) for field in dataclasses.fields(group) if field.name in options})
            for name, group in groups.items()
        }
        with _rare_collections():
            command(*arguments, **options, **made)

    run.__signature__ = signature.replace(parameters=seen)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in seen} | {"return": None}
    return run


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for unreachable objects rarely. A start makes a million that stay: to go through them again and again,
    as it does by default, took a tenth of the time to the first token or more.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def interrupted(finish: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C inside ends the command, after `finish`: what was printed stays, and its line is ended."""
    try:
        yield
    except KeyboardInterrupt:
        finish()
        raise
