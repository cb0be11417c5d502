"""Fused operations `torch.ops.gcu.*`: definitions, and one implementation per kind of target."""
