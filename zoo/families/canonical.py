"""The part of a transformers config that bears on its layers, as text that names them by digest.

Fine-tunes of one base differ in what their configs say of tokens, training and answers; none of
that reaches a layer, so none of it may keep equal layers apart.
"""

import json

from zoo.families.family import Config

# What is said of training, answers and the vocabulary: no layer's arithmetic reads it.
_SILENT = {"vocab_size", "initializer_range", "use_cache", "tie_word_embeddings"}
_SILENT_ENDINGS = ("dropout", "pdrop", "dropout_prob", "token_id", "init_std")


def canonical_config(config: Config) -> str:
    """What of a config bears on the arithmetic of the layers, as canonical JSON."""
    from transformers import PreTrainedConfig

    general = PreTrainedConfig().to_dict().keys() - {"model_type"}
    said = {
        key: value
        for key, value in config.to_dict().items()
        if key not in general | _SILENT and not key.endswith(_SILENT_ENDINGS)
    }
    return json.dumps(said, sort_keys=True, separators=(",", ":"))


def config_of(text: str) -> Config:
    """The config that `canonical_config` wrote; what it left out is at its default."""
    from transformers import CONFIG_MAPPING

    said = json.loads(text)
    return CONFIG_MAPPING[said["model_type"]].from_dict(said)
