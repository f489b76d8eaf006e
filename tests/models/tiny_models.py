"""Tiny random models and a tiny tokenizer, made on the spot."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "whale", "sea", "ship", "."]


def word_tokenizer(bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny_config(kind: str, **changes):
    common = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    match kind:
        case "llama":
            return transformers.LlamaConfig(**common | decoder | changes)
        case "gemma3":
            return transformers.Gemma3TextConfig(**common | decoder | {"tie_word_embeddings": True} | changes)
        case "bert":
            return transformers.BertConfig(**common | {"intermediate_size": 24} | changes)
        case "whisper":
            size = {
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
            }
            feed = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "num_mel_bins": 8}
            ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
            return transformers.WhisperConfig(vocab_size=len(WORDS), **size | feed | ids | changes)
    raise AssertionError(kind)


CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "gemma3": transformers.Gemma3ForCausalLM,
    "bert": transformers.BertForMaskedLM,
    "whisper": transformers.WhisperForConditionalGeneration,
}


def tiny_model(kind: str = "llama", **changes):
    torch.manual_seed(0)
    return CLASSES[kind](tiny_config(kind, **changes)).eval()
