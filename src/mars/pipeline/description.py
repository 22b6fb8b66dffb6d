"""What is in a model, in numbers."""

from mars.checkpoint import MarsModel
from mars.model.language_tensors import tensors_digest
from mars.model.precision import is_rounded, weights_held


def describe_model(model: MarsModel) -> dict[str, int | str]:
    """Parameters per part, vocabulary, digests (the LLM's computed anew from memory) and bytes held."""
    transformer, codec = model.transformer, model.image_tokenizer
    vocabulary, info = transformer.vocabulary, model.info
    factor = codec.config.factor
    held = weights_held(transformer)
    whole = not is_rounded(model.precision) and not transformer.released
    return {
        "name": info.name,
        "language model": info.language,
        "precision": model.precision,
        "language expert parameters": held["language"][0],
        "visual expert parameters": held["visual"][0],
        "image tokenizer parameters": sum(weight.numel() for weight in codec.parameters()),
        "layers with a visual expert": ", ".join(map(str, transformer.config.visual_layers)),
        "text ids": vocabulary.text_size,
        "codes": vocabulary.num_codes,
        "vocabulary": vocabulary.size,
        "picture sizes": ", ".join(f"{columns * factor}x{rows * factor}" for rows, columns in info.grids),
        "super-resolution": info.upscale.text(info.grids, factor=factor) if info.upscale else "none",
        "language digest": tensors_digest(transformer.language_tensors()) if whole else "none: rounded or released",
        "language digest of the LLM": info.language_digest,
        "visual digest": model.visual_digest,
        "adapter": model.lora or "none",
        "bytes in memory": held["language"][1]
        + held["visual"][1]
        + sum(weight.numel() * weight.element_size() for weight in codec.parameters()),
    }
