"""Do several rows come from one document? Then a unit is less than what readers take it for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dp_flash_hf.distributed import logger_of_all_ranks
from dp_flash_hf.mechanisms.fresh_randomness import same_randomness
from dp_flash_hf.training.columns import column, column_names

logger = logger_of_all_ranks(__name__)

_ORIGINS = ("overflow_to_sample_mapping", "example_id", "document_id", "doc_id")  # columns that say which document a row is of
_LOOKED_AT = 64
_ENOUGH = 8  # rows of one length are blocks, not chance


def say_of_documents(dataset: Any) -> None:
    """Warn where rows, each of which is a unit, seem to be parts of documents."""
    with same_randomness(dataset):
        found = documents_of_rows(dataset)
    if found is not None:
        logger.warning(found)


def documents_of_rows(dataset: Any) -> str | None:
    """What to say where a unit is one row, and rows seem to be parts of documents; None where nothing shows.

    Known are columns by which tokenizers and examples of Transformers name the document of a row, and blocks of concatenated
    texts (`group_texts`): rows of one length, without padding, every token of which is a label. Texts that were all cut to one
    length look like blocks too. What was cut without a trace is not seen. Numbers of rows are not told: they may be secret.

    Args:
        dataset: of the training; up to 64 rows are read, from all over it.
    """
    names = column_names(dataset) or []
    for name in _ORIGINS:
        if name in names and len(set(map(str, column(dataset, name)))) < len(dataset):
            return (
                f"several rows are of one document (column {name!r}), and the privacy unit is one row: what is promised is for "
                f"each row by itself. PrivacyConfig(privacy_unit={name!r}, max_examples_per_unit=...) protects whole documents"
            )
    examples = [dataset[row] for row in range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT))]
    if len(examples) >= _ENOUGH and all(map(_is_full, examples)) and len({len(row["input_ids"]) for row in examples}) == 1:
        return (
            "all rows looked at have one length and no padding, as blocks of concatenated texts have (group_texts), and the "
            "privacy unit is one row: a text that lies in two blocks is two units, and a block protects the texts in it "
            "together. Tokenize one text to a row to protect each text; if rows are texts that were cut, all is as it should be"
        )
    return None


def _is_full(example: Any) -> bool:
    if not isinstance(example, Mapping) or "input_ids" not in example or "labels" not in example:
        return False
    ids, labels, mask = (_values(example.get(name)) for name in ("input_ids", "labels", "attention_mask"))
    return ids is not None and ids == labels and (mask is None or all(mask))


def _values(field: Any) -> list[Any] | None:
    """Of a list, an array or a tensor; None of a number, or of nothing."""
    found = field.tolist() if hasattr(field, "tolist") else field
    return list(found) if isinstance(found, (list, tuple)) else None
