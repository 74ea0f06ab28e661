"""The demo's text side: a CLIP tokenizer with a small vocabulary, and a small CLIP text encoder.

The tokenizer has CLIP's file format and byte alphabet, so any prompt can be tokenized; byte-pair
merges learned from the captions (Sennrich et al. 2016) make each caption word one token.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 24
WIDTH = 64
WORD_END = "</w>"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learn merges from `captions`, write `vocab.json` and `merges.txt`, load them as CLIP does."""
    alphabet = list(byte_alphabet())
    merges = learn_merges(captions)
    tokens = [*alphabet, *(c + WORD_END for c in alphabet), *("".join(m) for m in merges), BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(m) for m in merges), ""])
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": MAX_TOKENS,
                "bos_token": BOS,
                "eos_token": EOS,
                "pad_token": EOS,
                "unk_token": EOS,
            },
            indent=2,
        )
    )
    return CLIPTokenizer.from_pretrained(folder)


def learn_merges(captions: Iterable[str]) -> list[tuple[str, str]]:
    """Merge the most frequent neighbouring pair until every word is a single token.

    >>> learn_merges(["aha"])
    [('a', 'h'), ('ah', 'a</w>')]
    """
    words = Counter(w for text in captions for w in re.findall(r"[a-z]+", text.lower()))
    pieces = {w: [*w[:-1], w[-1] + WORD_END] for w in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda p: (pairs[p], [-ord(c) for c in "".join(p)]))
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder, two layers of width 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def with_tokens(
    text: CLIPTextModel, known: CLIPTokenizer, tokenizer: CLIPTokenizer
) -> CLIPTextModel:
    """`text`, which reads the tokens of `known`, for `tokenizer`; new tokens start untrained."""
    fresh = new_text_encoder(tokenizer)
    weights, start = text.state_dict(), fresh.state_dict()
    (name,) = (name for name in weights if name.endswith("token_embedding.weight"))
    old, new = known.get_vocab(), tokenizer.get_vocab()
    common = [*old.keys() & new.keys()]
    start[name][[new[token] for token in common]] = weights[name][[old[token] for token in common]]
    fresh.load_state_dict(weights | {name: start[name]})
    return fresh


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids, int64 `[N, MAX_TOKENS]`, padded and truncated as Stable Diffusion does."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def byte_alphabet() -> Iterable[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return (chr(b if b in printable else next(spare)) for b in range(256))
