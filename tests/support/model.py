"""Which model do the tests run? The small trained one of bench/models, or else a random one whose output is chaotic.

The random one has a large initialisation, so that greedy output is no fixed point and a wrong KV byte shows at once.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

TRAINED = Path(__file__).resolve().parents[2] / "bench" / "models" / "tiny"
VOCABULARY = 512


def tiny_model_path() -> Path:
    """The folder of a small causal language model with a tokenizer."""
    return TRAINED if (TRAINED / "config.json").is_file() else random_model_path()


@functools.cache
def random_model_path() -> Path:
    """Made once in a run, in about a second."""
    folder = Path(tempfile.gettempdir()) / "kvferry-random-model-1"
    if not (folder / "done").is_file():
        folder.mkdir(exist_ok=True)
        _write_tokenizer(folder)
        _write_weights(folder)
        (folder / "done").touch()
    return folder


def _write_weights(folder: Path) -> None:
    # Imported here: most callers find the trained model, and these cost seconds.
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            spread = 1.0 if "embed" in name else 2.0 / parameter.shape[1] ** 0.5
            parameter.data.normal_(0, spread, generator=generator)
    model.save_pretrained(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (Path(__file__).resolve().parent / "pair.py").read_text()
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    )
