"""Architectures of `transformers`, as that library ships them, in small configurations with random weights.

`MODELS[name]` is a function that builds the model and one that makes the keyword arguments of a batch of n.
"""

import torch

VOCABULARY, HIDDEN, INNER = 200, 32, 64
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": INNER}
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {"image_size": 32, "patch_size": 8}


def of(model, config, **options):
    """A function that builds `transformers.<model>` of `transformers.<config>(**options)`."""

    def make():
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return make


def whisper_encoder():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=HIDDEN, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=INNER, max_source_positions=20
    )
    return WhisperEncoder(config)


def ids(n):
    return {"input_ids": torch.randint(3, VOCABULARY, (n, 12))}


def masked_ids(n):
    """Rows of different lengths, padded."""
    mask = (torch.arange(12) < torch.randint(6, 13, (n, 1))).long()
    return {"input_ids": ids(n)["input_ids"] * mask, "attention_mask": mask}


def images(n):
    return {"pixel_values": torch.randn(n, 3, 32, 32)}


GPT2 = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "use_cache": False}
OPT = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": INNER, "use_cache": False}
LLAMA = {**SIZES, "num_key_value_heads": 2, "use_cache": False}
T5 = {"d_model": HIDDEN, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": INNER}
SWIN = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
CLIP = {"text_config": {**SIZES, **TEXT}, "vision_config": {**SIZES, **IMAGE}, "projection_dim": 16}
WAV2VEC2 = {
    **SIZES,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

MODELS = {
    "BERT": (of("BertModel", "BertConfig", **SIZES, vocab_size=VOCABULARY), masked_ids),
    "DistilBERT": (
        of(
            "DistilBertModel",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=HIDDEN,
            n_layers=2,
            n_heads=4,
            hidden_dim=INNER,
        ),
        masked_ids,
    ),
    "RoBERTa": (of("RobertaModel", "RobertaConfig", **SIZES, vocab_size=VOCABULARY), ids),
    "ALBERT": (of("AlbertModel", "AlbertConfig", **SIZES, embedding_size=16, vocab_size=VOCABULARY), masked_ids),
    "ELECTRA": (of("ElectraModel", "ElectraConfig", **SIZES, embedding_size=16, vocab_size=VOCABULARY), masked_ids),
    "DeBERTa": (
        of(
            "DebertaV2Model",
            "DebertaV2Config",
            **{**SIZES, "num_hidden_layers": 1},
            vocab_size=VOCABULARY,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        ),
        ids,
    ),
    "GPT-2": (of("GPT2Model", "GPT2Config", **GPT2, **TEXT), ids),
    "OPT": (of("OPTModel", "OPTConfig", **OPT, **TEXT, word_embed_proj_dim=HIDDEN), ids),
    "Llama": (of("LlamaModel", "LlamaConfig", **LLAMA, **TEXT), ids),
    "T5": (of("T5EncoderModel", "T5Config", **T5, vocab_size=VOCABULARY), ids),
    "ViT": (of("ViTModel", "ViTConfig", **SIZES, **IMAGE), images),
    "DeiT": (of("DeiTModel", "DeiTConfig", **SIZES, **IMAGE), images),
    "Swin": (of("SwinModel", "SwinConfig", **SWIN), images),
    "ConvNeXt": (of("ConvNextModel", "ConvNextConfig", hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1]), images),
    "CLIP": (of("CLIPModel", "CLIPConfig", **CLIP), lambda n: {**ids(n), **images(n)}),
    "Whisper": (whisper_encoder, lambda n: {"input_features": torch.randn(n, 80, 40)}),
    "Wav2Vec2": (of("Wav2Vec2Model", "Wav2Vec2Config", **WAV2VEC2), lambda n: {"input_values": torch.randn(n, 400)}),
}
