"""RRS on Qwen2.5-Omni-7B with the paper's settings, on one GPU: the thinker, which is the part that answers in text.

    pip install torchvision pillow
    python examples/qwen2_5_omni.py --out qwen2.5-omni-rrs

The talker and the vocoder are not loaded: RRS trains the thinker, and the adapter belongs onto the thinker. The
processor needs torchvision and Pillow even for audio. See qwen2_audio.py for the arguments and for how the memory is
computed: 17.9 GB of weights (8.9 billion parameters with the audio and vision towers), 0.6 GB for the LoRA and its
optimizer, 12.5 GB of activations: 31 GB.
"""

from __future__ import annotations

from qwen2_audio import run

from rrs import RRSConfig

if __name__ == "__main__":
    run("Qwen/Qwen2.5-Omni-7B", RRSConfig(), str(__doc__))
