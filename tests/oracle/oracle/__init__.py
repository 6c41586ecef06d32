"""The numerics of Ternion in plain PyTorch: what the runtime's logits are judged against."""
