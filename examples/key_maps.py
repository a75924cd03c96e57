"""Maps between the checkpoints of Hugging Face's Llama and litgpt's GPT, in both directions.

    runtime.load_raw("Llama-3.2-1B/", model, keys=llama_to_litgpt(num_heads=32, num_key_value_heads=8, tied=True))
    nucleate convert Llama-3.2-1B/ litgpt.safetensors --keys llama_to_litgpt.toml

Nothing is converted on disk by the first line, and every process reads its own part only.
"""

from __future__ import annotations

from nucleate.checkpoint import Rule, concatenate, drop, inverse, rename


def llama_to_litgpt(
    num_heads: int, num_key_value_heads: int, *, tied: bool = False, legacy: bool = False
) -> list[Rule]:
    """Return the map from Hugging Face's Llama to litgpt's GPT.

    Args:
        num_heads: How many heads the queries have: `num_attention_heads` in `config.json`.
        num_key_value_heads: How many the keys and values have.
        tied: Whether the output layer is the embedding, as `tie_word_embeddings` says. The file then lacks it.
        legacy: Whether queries, keys and values of a group lie side by side, as in Lit-LLaMA and older litgpt.
    """
    heads = [num_heads, num_key_value_heads, num_key_value_heads]
    llama, litgpt = "model.layers.{i}.", "transformer.h.{i}."
    embedding = ["transformer.wte.weight", *(["lm_head.weight"] if tied else [])]
    return [
        rename("model.embed_tokens.weight", *embedding),
        rename("model.norm.{kind}", "transformer.ln_f.{kind}"),
        rename(llama + "input_layernorm.{kind}", litgpt + "norm_1.{kind}"),
        rename(llama + "post_attention_layernorm.{kind}", litgpt + "norm_2.{kind}"),
        concatenate(
            [llama + f"self_attn.{part}_proj.{{kind}}" for part in "qkv"],
            litgpt + ("attn.attn.{kind}" if legacy else "attn.qkv.{kind}"),
            sizes=heads,
            groups=num_key_value_heads if legacy else 1,
        ),
        rename(llama + "self_attn.o_proj.{kind}", litgpt + "attn.proj.{kind}"),
        rename(llama + "mlp.gate_proj.{kind}", litgpt + "mlp.fc_1.{kind}"),
        rename(llama + "mlp.up_proj.{kind}", litgpt + "mlp.fc_2.{kind}"),
        rename(llama + "mlp.down_proj.{kind}", litgpt + "mlp.proj.{kind}"),
    ]


def litgpt_to_llama(
    num_heads: int, num_key_value_heads: int, *, tied: bool = False, legacy: bool = False
) -> list[Rule]:
    """Return the map from litgpt's GPT to Hugging Face's Llama; the arguments are those of the other direction."""
    return inverse(llama_to_litgpt(num_heads, num_key_value_heads, tied=tied, legacy=legacy))


def old_llama_to_litgpt(num_heads: int, num_key_value_heads: int) -> list[Rule]:
    """Return the map from a Llama file of before 2024, which has a table of frequencies in every layer besides."""
    return [
        drop("model.layers.*.self_attn.rotary_emb.inv_freq", optional=True),
        *llama_to_litgpt(num_heads, num_key_value_heads),
    ]
