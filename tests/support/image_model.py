"""Which model sees images? A random small Idefics3, made here whole: no hub is asked."""

from __future__ import annotations

import base64
import functools
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from instance.types import Submission
from instance.vllm.codec import encode_request
from instance.vllm.flags import engine_config, parse_serve_argv
from migration.types import RequestId
from tests.support.model import random_model_path
from tests.support.vllm_kit import engine_argv

SIDE = 64
"""Pixels of an image, in both directions; larger ones are made so small."""
PATCH = 4
SHRINKAGE = 2
NUM_EMBEDDINGS = (SIDE // PATCH // SHRINKAGE) ** 2
"""Of an image: two of the tests' blocks, so that it always covers one wholly."""
SPECIAL_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
IMAGE_TOKEN_ID = 513
NUM_IMAGE_TOKENS = NUM_EMBEDDINGS + 3
"""Of its place in a prompt: with the three tokens around the embeddings."""
VOCABULARY = 516
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


@functools.cache
def image_model_path() -> Path:
    """Made once in a run. The spread of its weights makes greedy output no fixed point, and a wrong KV byte show."""
    folder = Path(tempfile.gettempdir()) / "kvferry-image-model-1"
    if not (folder / "done").is_file():
        folder.mkdir(exist_ok=True)
        _write_processor(folder)
        _write_weights(folder)
        (folder / "done").touch()
    return folder


def question(*pictures: Picture, text: str = "what is this?") -> list[dict[str, Any]]:
    """Messages of a chat about these images."""
    shown = [{"type": "image_url", "image_url": {"url": picture.url()}} for picture in pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


class ImageFront:
    """Renders prompts with images as a gateway does, without one."""

    def __init__(self) -> None:
        config = engine_config(parse_serve_argv(engine_argv(image_model_path())))
        self._renderer = renderer_from_config(config)
        self._inputs = InputProcessor(config, self._renderer)

    def request(self, request_id: RequestId, prompt: Sequence[int | Picture], params: SamplingParams) -> Any:
        """Its EngineCoreRequest. `prompt`: token ids, and the images between them."""
        token_ids = [IMAGE_TOKEN_ID if isinstance(piece, Picture) else piece for piece in prompt]
        images = [piece.pixels() for piece in prompt if isinstance(piece, Picture)]
        rendered: Any = {"prompt_token_ids": token_ids}
        if images:
            rendered["multi_modal_data"] = {"image": images}
        (whole,) = self._renderer.render_cmpl([rendered])
        request = self._inputs.process_inputs(request_id, whole, params, ("generate",))
        request.external_req_id = f"external-{request_id}"
        return request

    def submission(self, request_id: RequestId, prompt: Sequence[int | Picture], params: SamplingParams) -> Submission:
        return submission_from(self.request(request_id, prompt, params))


def submission_from(request: Any) -> Submission:
    """Of an EngineCoreRequest."""
    request_id, params = RequestId(request.request_id), request.sampling_params
    payload = encode_request(request)
    num_prompt = len(request.prompt_token_ids)
    return Submission(request_id, request.external_req_id, request.priority, num_prompt, params.max_tokens, payload)


@functools.cache
def image_front() -> ImageFront:
    return ImageFront()


def _write_processor(folder: Path) -> None:
    from tokenizers import Tokenizer  # noqa: PLC0415

    tokenizer = Tokenizer.from_file(str(random_model_path() / "tokenizer.json"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    assert (tokenizer.token_to_id("<image>"), tokenizer.get_vocab_size()) == (IMAGE_TOKEN_ID, VOCABULARY)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((random_model_path() / "tokenizer_config.json").read_text())
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


def _write_weights(folder: Path) -> None:
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
        "vocab_size": VOCABULARY,
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
        image_token_id=IMAGE_TOKEN_ID,
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
