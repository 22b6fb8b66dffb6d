"""A pipeline's model on disk, with its card."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mars.checkpoint import (
    MarsModel,
    is_whole_model,
    language_source,
    read_json,
    save_model,
    stored_digest,
)
from mars.errors import CheckpointError
from mars.files import atomic_folder, place_for
from mars.model.precision import is_rounded

if TYPE_CHECKING:
    from mars.model.card import CardFacts


def save_with_card(
    model: MarsModel,
    folder: Path,
    *,
    report: Path | None,
    about: str | None = None,
    licence: str | None = None,
    hub_id: str | None = None,
) -> None:
    """Writes the visual side in fp16 and a model card, and the LLM if it lies in the folder that the model came from.

    Raises:
        CheckpointError: if it cannot be written, something else is there, or the weights in memory are rounded.
        DataError: if the report is none.
        ModelError: if the report is of other weights.
    """
    from mars.model.card import model_card  # counting takes a moment

    if is_rounded(model.precision):
        raise CheckpointError(f"weights rounded to {model.precision} cannot be saved; open the model in fp32")
    found = None if report is None else read_json(report)
    with atomic_folder(place_for(folder, error=CheckpointError, may_replace=is_whole_model)) as partial:
        save_model(partial, info=model.info, transformer=model.transformer, image_tokenizer=model.image_tokenizer)
        facts = _facts(model, visual_digest=stored_digest(partial), licence=licence, hub_id=hub_id)
        codec = model.image_tokenizer.config
        card = model_card(model.transformer.config, facts, image_tokenizer=codec, report=found, about=about)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if model.info.language.startswith("./"):
            source = language_source(model.info, folder=model.folder or Path())
            shutil.copytree(source, partial / model.info.language)


def _facts(model: MarsModel, *, visual_digest: str, licence: str | None, hub_id: str | None) -> "CardFacts":
    from mars.model.card import CardFacts, base_model_of

    info = model.info
    return CardFacts(
        name=info.name,
        language=info.language,
        language_digest=info.language_digest,
        visual_digest=visual_digest,
        grids=info.grids,
        upscale=info.upscale,
        base_model=base_model_of(info.language),
        licence=licence,
        hub_id=hub_id,
        includes_language=info.language.startswith("./"),
    )
