"""Which model sees images? A random small Idefics3, made whole: no hub is asked. And how are its prompts rendered?"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from instance.vllm.flags import engine_config, parse_serve_argv

SIDE = 64
"""Pixels of an image, in both directions; larger ones are made so small."""
PATCH = 4
SHRINKAGE = 2
NUM_EMBEDDINGS = (SIDE // PATCH // SHRINKAGE) ** 2
"""Of an image: two blocks of 32, so that it always covers one wholly."""
SPECIAL_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
NUM_IMAGE_TOKENS = NUM_EMBEDDINGS + 3
"""Of its place in a prompt: with the three tokens around the embeddings."""
CHAT_TEMPLATE = """\
{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}
{% endfor %}assistant:"""


@dataclass(frozen=True, slots=True)
class Picture:
    """Noise; equal seeds give equal images."""

    seed: int

    def pixels(self) -> Image.Image:
        chooser = np.random.default_rng(self.seed)
        return Image.fromarray(chooser.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))

    def url(self) -> str:
        """As it stands in a chat message."""
        file = io.BytesIO()
        self.pixels().save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def write_pictured_model(folder: Path, base: Path) -> Path:
    """`base`: a model whose tokenizer it has, with some tokens more. The spread of its weights makes greedy output no
    fixed point, and a wrong KV byte show. Returns the folder; what is there already stays."""
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(folder, _write_processor(folder, base))
        (folder / "done").touch()
    return folder


def question(*pictures: Picture, text: str = "what is this?") -> list[dict[str, Any]]:
    """Messages of a chat about these images."""
    shown = [{"type": "image_url", "image_url": {"url": picture.url()}} for picture in pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


class ImageFront:
    """Renders prompts with images as a gateway does, without one."""

    def __init__(self, argv: Sequence[str]) -> None:
        """`argv`: of the engines, as of `vllm serve`."""
        config = engine_config(parse_serve_argv(argv))
        self._image_token_id = config.model_config.hf_config.image_token_id
        self._renderer = renderer_from_config(config)
        self._inputs = InputProcessor(config, self._renderer)

    def request(self, request_id: str, prompt: Sequence[int | Picture], params: SamplingParams) -> Any:
        """Its EngineCoreRequest. `prompt`: token ids, and the images between them."""
        token_ids = [self._image_token_id if isinstance(piece, Picture) else piece for piece in prompt]
        images = [piece.pixels() for piece in prompt if isinstance(piece, Picture)]
        rendered: Any = {"prompt_token_ids": token_ids}
        if images:
            rendered["multi_modal_data"] = {"image": images}
        (whole,) = self._renderer.render_cmpl([rendered])
        request = self._inputs.process_inputs(request_id, whole, params, ("generate",))
        request.external_req_id = f"external-{request_id}"
        return request


def _write_processor(folder: Path, base: Path) -> Any:
    """Returns the tokenizer."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": NUM_EMBEDDINGS}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    images = {
        "image_processor_type": "Idefics3ImageProcessorPil",  # the other one needs torchvision
        "processor_class": "Idefics3Processor",
        "do_image_splitting": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "max_image_size": {"longest_edge": SIDE},
        "size": {"longest_edge": SIDE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return tokenizer


def _write_weights(folder: Path, tokenizer: Any) -> None:
    # Imported here: they cost seconds, and most runs find the folder.
    import torch  # noqa: PLC0415
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration  # noqa: PLC0415

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    text = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        scale_factor=SHRINKAGE,
        image_token_id=tokenizer.token_to_id("<image>"),
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    model = Idefics3ForConditionalGeneration(config).to(torch.float32)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            spread = 1.0 if "embed_tokens" in name else 2.0 / parameter[0].numel() ** 0.5
            parameter.data.normal_(0, spread, generator=generator)
    model.save_pretrained(folder)
