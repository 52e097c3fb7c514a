"""Layers of STDiT3 that a LoRA can stand on, by suffixes of module names."""

LORA_TARGETS: dict[str, list[str]] = {
    "default": ["qkv", "q_linear", "kv_linear"],
    "attention": ["qkv", "q_linear", "kv_linear", "attn.proj", "cross_attn.proj"],
    "all": ["qkv", "q_linear", "kv_linear", "attn.proj", "cross_attn.proj", "mlp.fc1", "mlp.fc2"],
}
"""`default` is VADER's choice and the paper's: 168 layers of XL/2, 9.3 million parameters at rank 16."""
