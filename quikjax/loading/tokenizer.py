"""Tokenizers from the files beside published weights, through `transformers`, offline."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from quikjax.errors import QuikError

# Any of these makes a directory one that has a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def import_transformers() -> Any:
    """`transformers`, imported without its advice to install PyTorch, which this library does not need.

    The advice is printed once, on the first import. The variable that silences it is restored, so that everything the user's own
    code does later is reported as the user wants it.
    """
    if "transformers" not in sys.modules:
        before = os.environ.get(_ADVICE)
        os.environ[_ADVICE] = "1"
        try:
            import transformers
        finally:
            if before is None:
                del os.environ[_ADVICE]
            else:
                os.environ[_ADVICE] = before
    import transformers

    return transformers


def read_tokenizer(directory: Path) -> Any | None:
    """The tokenizer in a Hugging Face directory, or None where there is none. Nothing is downloaded, no remote code is run.

    Raises:
        QuikError: its files are there and cannot be read.
    """
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        return None
    fast = (directory / "tokenizer.json").exists()
    if not fast and (directory / "tokenizer.model").exists() and importlib.util.find_spec("sentencepiece") is None:
        # transformers would fall back to another format and ask for that one's package.
        raise QuikError(f"the tokenizer in {directory} is a SentencePiece model; to read it, run: pip install sentencepiece")
    transformers = import_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # whatever the many tokenizer classes raise on damaged files
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise QuikError(f"the tokenizer in {directory} cannot be read: {reason[0]}") from None
